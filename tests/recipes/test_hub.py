"""One place loads from folders and the hub: no code of theirs ever runs, and a revision reaches every call."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import ROOT, TRAIN, environment

from conf.errors import RequestError
from conf.schema import Config, DataConfig, ModelConfig, SourceConfig
from recipes import hub
from recipes.data.hub import HubSource
from recipes.data.image_processor import ImageProcessor
from recipes.data.tokenizer import load_tokenizer
from recipes.models.pretrained import local_folder, pretrained_config

LOADS = {"from_pretrained", "from_config"}
"""Methods of transformers' classes."""
FUNCTIONS = {
    "load_dataset", "load_dataset_builder", "load_from_disk", "snapshot_download", "hf_hub_download", "cached_file",
    "try_to_load_from_cache", "get_class_from_dynamic_module", "pipeline", "torch_load", "read_pickle",
}  # fmt: skip
EVIL = 'from pathlib import Path\nPath({mark!r}).write_text("ran")\n'


def calls(source: str) -> Iterator[str]:
    """Calls in Python source, and in Python programs that are texts in it, that load without this one place.

    What says `trust_remote_code=False` itself is none in a program for another process, or in a notebook.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "from_pretrained(" in node.value:
            with contextlib.suppress(SyntaxError):  # a sentence
                yield from said_otherwise(node.value)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            method = isinstance(node.func, ast.Attribute) and name in LOADS
            torch_s = ast.unparse(node.func) in ("torch.load", "torch.hub.load", "pickle.load", "pickle.loads")
            if method or torch_s or name in FUNCTIONS:
                yield ast.unparse(node)


def said_otherwise(source: str) -> Iterator[str]:
    for call in calls(source):
        if "trust_remote_code=False" not in call:
            yield call


def test_no_other_place_loads():
    found = {}
    for room in ("conf", "recipes", "launch", "benchmarks"):
        for file in (ROOT / room).rglob("*.py"):
            if file != ROOT / "recipes/hub.py":
                found[str(file.relative_to(ROOT))] = list(calls(file.read_text(encoding="utf-8")))
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            source = "".join(line for line in cell["source"] if not line.startswith(("%", "!")))
            if cell["cell_type"] == "code":
                found.setdefault(file.name, []).extend(said_otherwise(source))
    assert {name: those for name, those in found.items() if those} == {}
    assert len(found) > 100


def test_the_check_sees_every_kind_of_call():
    for code in ("AutoConfig.from_pretrained(x)", "hf.AutoModel.from_config(x)", "load_dataset(x)", "torch.load(x)"):
        assert list(calls(f"def f():\n    return {code}")) == [code]
        assert list(calls(f"P = '''{code}; AutoModel.from_pretrained(y)'''"))
    assert not list(calls("'from_pretrained(x) with words'; hub.model(x); from_pretrained(x)"))


def test_every_call_of_this_place_refuses_code():
    """Of transformers' Auto classes; the others know none."""
    source = (ROOT / "recipes/hub.py").read_text(encoding="utf-8")
    without = [call for call in calls(source) if "trust_remote_code=False" not in call]
    assert sorted(call.partition("(")[0] for call in without) == [
        "GenerationConfig.from_pretrained",
        "PreTrainedTokenizerFast.from_pretrained",
        "datasets.load_dataset",
        "snapshot_download",
    ]


def write_json(file: Path, **content: object) -> None:
    file.write_text(json.dumps(content))


@pytest.fixture
def hostile(tmp_path, monkeypatch) -> Path:
    """A folder in which everything names code that leaves a mark; whoever asks whether it may run hears yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "mark")))
    kinds = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForImageClassification")
    names = {kind: "evil.Evil" for kind in ("AutoConfig", *kinds)}
    write_json(folder / "config.json", model_type="of_a_stranger", auto_map=names)
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )
    write_json(
        folder / "preprocessor_config.json",
        image_processor_type="EvilImageProcessor",
        auto_map={"AutoImageProcessor": "evil.Evil"},
    )
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def test_no_code_of_a_folder_runs(hostile, tmp_path):
    from transformers import AutoModelForCausalLM, T5Config

    for load, file in (
        (lambda: pretrained_config(ModelConfig(path=str(hostile))), "config.json"),
        (lambda: load_tokenizer(str(hostile)), "tokenizer_config.json"),
        (lambda: ImageProcessor.of_model(hostile, None, str(hostile)), "preprocessor_config.json"),
        (lambda: hub.model(AutoModelForCausalLM, hostile), "config.json"),
    ):
        with pytest.raises(RequestError, match="never executed") as refused:
            load()
        assert file in str(refused.value)
    # A family that transformers has, but not for this task: `from_config` would ask as well.
    T5Config(auto_map={"AutoModelForCausalLM": "evil.Evil"}).save_pretrained(hostile)
    assert "auto_map" in (hostile / "config.json").read_text()
    config = hub.config(hostile)
    assert not hasattr(config, "auto_map")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        hub.new_model(AutoModelForCausalLM, config)
    assert not (tmp_path / "mark").exists()


def test_attention_from_the_hub_is_code(tmp_path):
    write_json(tmp_path / "config.json", model_type="llama", attn_implementation="kernels-community/flash-attn")
    with pytest.raises(RequestError, match="never loaded"):
        hub.config(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("named", ["config.json", "tokenizer_config.json"])
def test_a_command_executes_no_code_though_stdin_says_yes(hostile, tmp_path, named):
    if named != "config.json":
        write_json(hostile / "config.json", model_type="llama", hidden_size=32, num_attention_heads=4)
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n' * 20)
    request = ["+recipe=finetune_causal_lm", f"model.path={hostile}", "data.path=rows.jsonl", "data.held_out=0.2"]
    done = subprocess.run(
        [sys.executable, str(TRAIN), *request], input="y\ny\ny\n", capture_output=True, text=True, timeout=240,
        cwd=tmp_path, env=environment(tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules")),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr + done.stdout
    assert "error: model.path=" in done.stderr and "Traceback" not in done.stderr
    assert named in done.stderr and "never executed" in done.stderr
    assert not (tmp_path / "mark").exists() and not list(tmp_path.rglob("modules/**/evil.py"))


def test_a_revision_reaches_every_call(monkeypatch, tmp_path):
    seen = {}

    def caught(name):
        def load(*args, **kwargs):
            seen[name] = kwargs.get("revision")
            raise OSError("no network in this test")

        return load

    for name in ("AutoConfig", "AutoTokenizer", "AutoImageProcessor"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", caught(name))
    noted = lambda *args, **kwargs: seen.setdefault("sizes", kwargs.get("revision")) and ({}, {})  # noqa: E731
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", noted)
    monkeypatch.setattr("huggingface_hub.snapshot_download", caught("snapshot"))
    monkeypatch.setattr("datasets.load_dataset", caught("dataset"))
    model = ModelConfig(path="owner/name", revision="r1")
    for load in (
        lambda: pretrained_config(model),
        lambda: local_folder(model),
        lambda: load_tokenizer("owner/name", revision="r1"),
        lambda: ImageProcessor.of_model("owner/name", None, "owner/name", revision="r1"),
        lambda: HubSource(SourceConfig(kind="hub", name="o/n", revision="r1"), "data", 0.1, None, None).fingerprint(),
    ):
        with pytest.raises(RequestError):
            load()
    kinds = ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "sizes", "snapshot", "dataset")
    assert seen == dict.fromkeys(kinds, "r1")


def test_the_revision_is_of_the_data_s_identity(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: SimpleNamespace(_fingerprint="f"))
    prints = [
        HubSource(SourceConfig(kind="hub", name=os.curdir, revision=one), "data", 0.1, None, None).fingerprint()
        for one in (None, "r1", "r2")
    ]
    assert prints == ["f", "r1 f", "r2 f"]


def test_what_was_read_is_in_the_summary():
    cfg = Config(model=ModelConfig(path="a/b", revision="main", tokenizer="c/d", tokenizer_revision="t"))
    cfg.data = DataConfig(mixture=[SourceConfig(kind="hub", name="e/f", revision="r"), SourceConfig()])
    found = hub.revisions(cfg, Path("hub/models--a--b/snapshots/0123abc"))
    assert found == {"a/b": "0123abc", "c/d": "t", "e/f": "r"}
    assert hub.revisions(Config(), None) == {}
