"""What a model's folder may be instead of a model; each advice is followed, and works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from conf.compose import compose
from conf.errors import Problem, RequestError
from conf.model_folder import check_folder, check_kind
from conf.schema import ModelConfig
from conf.weight_files import header, quantised
from recipes.data.tokenizer import load_tokenizer, train_tokenizer
from recipes.models.configuration import check_text
from recipes.models.pretrained import local_folder

SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320,
}  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"<!DOCTYPE html><html></html>"
METHOD = "quantization_config.quant_method"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a small Llama and its tokenizer."""
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(folder)
    train_tokenizer(["a b c"] * 4, 260).save_pretrained(folder)
    return folder


def refused(folder: Path) -> Problem:
    """Why a request is refused while it is composed, which is before anything starts."""
    with pytest.raises(RequestError) as error:
        accepted(folder)
    (problem,) = error.value.problems
    return problem


def accepted(folder: Path) -> None:
    compose(["+recipe=quickstart", "model=pretrained", f"model.path={folder}"], 1)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "says"),
    [(POINTER, "a pointer of Git LFS"), (PAGE, "is no"), (b"", "is no"), (b"[" * 60_000, "is no")],
)
def test_what_is_not_the_file_is_refused_and_the_file_itself_is_not(
    saved: Path, name: str, content: bytes, says: str
) -> None:
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(content)
    problem = refused(saved)
    assert problem.key == str(saved / name) and says in problem.rule and "download it again" in problem.nearest
    (saved / name).write_bytes(whole)
    accepted(saved)


def test_a_byte_order_mark(saved: Path) -> None:
    file = saved / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert refused(saved).nearest == "save it as UTF-8 without one"
    file.write_text(file.read_text(encoding="utf-8-sig"), encoding="utf-8")
    accepted(saved)


def test_links_that_lead_nowhere(saved: Path) -> None:
    """A snapshot of the hub's cache that was copied without its blobs."""
    blob = saved.parent / "blob"
    shutil.move(saved / "model.safetensors", blob)
    (saved / "model.safetensors").symlink_to("../gone")
    assert "cp -rL" in refused(saved).nearest
    blob.rename(saved.parent / "gone")
    shutil.copytree(saved, saved.parent / "copy", symlinks=False)
    accepted(saved.parent / "copy")


@pytest.mark.parametrize("content", [POINTER, PAGE])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_none(saved: Path, name: str, content: bytes) -> None:
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(content)
    with pytest.raises(RequestError, match="download it again"):
        load_tokenizer(str(saved))
    (saved / name).write_bytes(whole)
    assert len(load_tokenizer(str(saved))) > 256


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    listed = json.loads(content[8 : 8 + length])
    listed["lm_head.weight"] |= changes
    new = json.dumps(listed).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


@pytest.mark.parametrize(
    "changes", [{"shape": [320, 31]}, {"shape": [-320, -32]}, {"dtype": "Q9"}, {"dtype": "F16"}, {"data_offsets": [4]}]
)
def test_a_header_that_the_library_would_refuse_later(saved: Path, changes: dict[str, Any]) -> None:
    edited(saved, **changes)
    assert "its header is broken" in refused(saved).rule


def quantise(folder: Path, kind: torch.dtype, scale_name: str) -> dict[str, torch.Tensor]:
    """Linear layers as numbers of `kind` and a scale for each; returns the values that this leaves."""
    file = folder / "model.safetensors"
    tensors, values = load_file(file), {}
    for name, tensor in list(tensors.items()):
        values[name] = tensor
        if "proj" in name:
            scale = tensor.abs().max() / (448 if kind.is_floating_point else 127)
            tensors[name] = (tensor / scale if kind.is_floating_point else (tensor / scale).round()).to(kind)
            tensors[name.replace("weight", scale_name)] = scale
            values[name] = tensors[name].float() * scale
    save_file(tensors, file, metadata={"format": "pt"})
    return values


def declare(folder: Path, settings: Any, part: str | None = None) -> None:
    config = json.loads((folder / "config.json").read_text())
    entry = {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config | ({part: entry} if part else entry)))


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        (torch.float8_e4m3fn, "weight_scale"), (torch.float8_e5m2, "weight_scale_inv"), (torch.int8, "SCB"),
        (torch.int8, "weight_scale"),
    ],
)  # fmt: skip
def test_quantised_weights_whose_configuration_does_not_say_so(saved: Path, kind: torch.dtype, scale: str) -> None:
    """They were trained on without their scales, each weight up to 448 times too large."""
    quantise(saved, kind, scale)
    problem = refused(saved)
    assert (problem.key, problem.value) == (METHOD, "null") and "the config.json that belongs to" in problem.nearest
    with pytest.raises(RequestError, match="quant_method"):
        local_folder(ModelConfig(path=str(saved)))  # a model of the hub is not seen before


@pytest.mark.parametrize("name", ["a.qweight", "a.weight_packed", "a.weight.absmax"])
def test_packed_weights_by_their_names(name: str) -> None:
    with pytest.raises(RequestError, match="is quantised"):
        check_kind({name: ("I32", (4, 4))}, None)


@pytest.mark.parametrize("name", ["norm.scale", "attention.bias", "layer_scale.lambda1", "logit_scale"])
def test_what_only_looks_like_a_scale(name: str) -> None:
    check_kind({name: ("F32", (4,)), "norm.weight": ("F32", (4,)), "attention.mask": ("U8", (4,))}, None)
    check_kind({"position.ids": ("I64", (4,)), "a.weight": ("F8_E4M3", (4,))}, None)  # no scales: these are its values


@pytest.mark.slow
def test_the_advice_for_undeclared_fp8_gives_its_values(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(saved.parent / "cache"))
    values = quantise(saved, torch.float8_e4m3fn, "weight_scale_inv")
    assert refused(saved).key == METHOD
    declare(saved, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None})
    accepted(saved)
    folder = local_folder(ModelConfig(path=str(saved)))
    plain = load_file(folder / "model.safetensors")
    assert quantised(json.loads((folder / "config.json").read_text())) is None
    for name, value in values.items():
        torch.testing.assert_close(plain[name].float(), value, rtol=1e-6, atol=1e-7)


def test_fp8_with_scales_of_another_name(saved: Path) -> None:
    """vLLM's: transformers 5.23 reads the file, and leaves the scales out."""
    quantise(saved, torch.float8_e4m3fn, "weight_scale")
    declare(saved, {"quant_method": "fp8", "activation_scheme": "static"})
    problem = refused(saved)
    assert (problem.key, problem.value) == (METHOD, "fp8") and "weight_scale" in problem.rule


@pytest.mark.parametrize(("settings", "part"), [("fp8", None), ({"quant_method": "fp8"}, "text_config")])
def test_a_kind_where_transformers_does_not_look(saved: Path, settings: Any, part: str | None) -> None:
    declare(saved, settings, part)
    assert refused(saved).key == METHOD


def test_a_tokenizer_with_gaps_in_its_ids(saved: Path) -> None:
    """Fewer tokens than rows, and one whose id has none: an index error amid training."""
    file = saved / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["<|far|>"] = 900
    content["added_tokens"].append({**content["added_tokens"][0], "id": 900, "content": "<|far|>"})
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(saved))
    model = LlamaForCausalLM.from_pretrained(saved)
    assert len(tokenizer) < 320
    (problem,) = check_text(model.config, tokenizer, 8, str(saved))
    assert "ids up to 900" in problem.rule and "resize_token_embeddings(901)" in problem.nearest
    model.resize_token_embeddings(901)
    model.save_pretrained(saved.parent / "larger")
    check_folder(saved.parent / "larger")
    assert header(saved.parent / "larger" / "model.safetensors")["model.embed_tokens.weight"][1][0] == 901
    assert check_text(model.config, tokenizer, 8, str(saved.parent / "larger")) == []


def test_the_advice_for_an_adapter_merges_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed as it stands; peft is no requirement of this project."""
    peft = pytest.importorskip("peft")
    import transformers

    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(saved), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapter = saved.parent / "adapter"
    model.save_pretrained(adapter)
    problem = refused(adapter)
    assert f"is an adapter (PEFT) of {saved}" in problem.rule
    monkeypatch.chdir(saved.parent)
    names = {"PeftModel": peft.PeftModel, "AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    eval(problem.nearest.removeprefix("merge it first: "), names)
    accepted(saved.parent / "merged")
    tensors = [load_file(f / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
               for f in (saved, saved.parent / "merged")]  # fmt: skip
    assert not torch.equal(*tensors)
