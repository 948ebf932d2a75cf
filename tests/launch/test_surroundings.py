"""A run in odd surroundings is the run it is elsewhere, or says which of them to change."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, TRAIN, environment, launcher, rows, run

from conf.environment import _can_be_written, detect
from conf.errors import RequestError
from conf.schema import DataConfig
from launch.runtime import processes
from launch.runtime.request import _readable
from recipes.data.hub import HubSource

ODD = "größe 'été' \"x\" 日本"
"""A folder's name."""
SETTINGS = (
    "+recipe=quickstart", "data=jsonl", "model=llama_tiny", "data.seq_length=64", "batch.global_size=8",
    "batch.micro_size=2", "train.steps=3", "scheduler.warmup_steps=1", "eval.new_tokens=8",
)  # fmt: skip


def _quoted(path: Path) -> str:
    """As Hydra's grammar takes it."""
    return "'" + str(path).replace("'", "\\'") + "'"


@pytest.mark.slow
def test_odd_surroundings_change_nothing(tmp_path: Path) -> None:
    """A locale of ASCII, no home, no cache, few files, a closed standard output, paths with all that paths may hold."""
    odd = tmp_path / ODD
    for folder in (odd, tmp_path / "plain"):
        folder.mkdir()
        lines = (json.dumps({"text": f"Grün {n} naïve, 日本 " * 8}, ensure_ascii=False) + "\n" for n in range(200))
        (folder / "é.jsonl").write_text("".join(lines), encoding="utf-8")

    def command(folder: Path) -> list[str]:
        own = [f"{key}={_quoted(folder / name)}" for key, name in (("data.path", "é.jsonl"), ("run_dir", "run"))]
        return [*launcher("deepspeed", 2), str(TRAIN), *SETTINGS, *own, f"data.cache_dir={_quoted(folder / 'cache')}"]

    env = environment(tmp_path / "cache")
    done = run(command(tmp_path / "plain"), tmp_path, env)
    assert done.returncode == 0, done.stderr
    nowhere = {"HOME": "/proc/nonexistent", "XDG_CACHE_HOME": "/proc/nonexistent", "MPLCONFIGDIR": "/proc/nonexistent"}
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    job = subprocess.Popen(
        ["bash", "-c", 'ulimit -Sn 40 && ulimit -Hn 128 && exec "$@"', "bash", *command(odd)], cwd=tmp_path,
        env=env | nowhere | ascii_locale, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert job.stdout is not None
    job.stdout.close()
    assert job.wait(timeout=240) == 0
    expected, found = (
        [[(row["step"], row["loss"]) for row in kind] for kind in rows(folder / "run")]
        for folder in (tmp_path / "plain", odd)
    )
    assert found == expected and len(found[0]) == 3
    weights = [(folder / "run/model/model.safetensors").read_bytes() for folder in (tmp_path / "plain", odd)]
    assert weights[0] == weights[1]


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nonexistent")):
        assert not _can_be_written(folder)
    assert _can_be_written(tmp_path / "new" / "newer")
    assert detect().kernel_folder
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert not detect().kernel_folder
    assert "TORCH_EXTENSIONS_DIR=FOLDER" in " ".join(detect().missing_toolchain())


def test_a_hub_cache_that_cannot_be_written(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "file").write_text("")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    source = HubSource(DataConfig(kind="hub", name=str(tmp_path / "set")), "data", 0.5, None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "below")
    with pytest.raises(RequestError) as refused:
        source.size()
    (problem,) = refused.value.problems
    assert problem.key == "HF_HOME" and problem.nearest.startswith("HF_HOME=")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert source.size() == 2, "the advice works"


def test_arguments_that_lead_nowhere(monkeypatch):
    assert _readable(["data.path='été'", "a=~", "+recipe=x"]) == ["data.path='été'", "a=~", "+recipe=x"]
    with pytest.raises(RequestError) as refused:
        _readable(["run_dir=caf\udce9", "data.path='~nobody-of-that-name/x'"])
    said = str(refused.value)
    assert "run_dir=caf\\udce9: is not UTF-8" in said and "there is no user 'nobody-of-that-name'" in said
    said.encode()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, nor an entry of this user
    monkeypatch.setattr(os, "environ", dict(os.environ))
    _readable([])
    assert os.environ["HOME"] == "/nonexistent"


FEW = """
import resource, sys
from conf.errors import RequestError
from launch.runtime.processes import Ranks, allow_files
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
try:
    allow_files(Ranks(0, 0, 2, 2))
except RequestError as error:
    sys.exit(error.render())
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize("soft, hard, then", [(20, 40, None), (40, 64, 64), (64, 64, 64), (30, 500, 500)])
def test_few_files(soft, hard, then):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 500 and processes.MOST_FILES > 500
    words = [sys.executable, "-c", FEW, str(soft), str(hard)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8")
    if then is None:
        assert done.returncode == 1 and "ulimit -n=40" in done.stderr and "try: ulimit -n 1024" in done.stderr
    else:
        assert done.stdout == f"{then}\n", done.stderr
