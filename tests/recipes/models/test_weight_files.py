"""Which files of a folder are a model's weights, and what becomes of those that are not plain, whole or expected."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from conf.compose import compose
from conf.errors import Problem, RequestError
from conf.model_folder import impossible
from conf.schema import Config, EvalConfig, ModelConfig
from conf.weight_files import find_weights, header, quantised
from recipes import hub
from recipes.causal_lm import CausalLM
from recipes.data.tokenizer import train_tokenizer
from recipes.models.attention import check_causal, check_padding, check_right_padding
from recipes.models.build import check_weights, from_pretrained
from recipes.models.configuration import check_text, scratch_config
from recipes.models.pretrained import local_folder, pretrained_config

SIZE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip
SETTINGS: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a small Llama."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights_of(folder: Path, sharded: bool, hf_class: Any = AutoModelForCausalLM, **more: Any) -> dict[str, Any]:
    """As plain layouts and as those with `place` (ZeRO-3, tensor parallel) load them."""
    place = {"place": lambda parameters: None} if sharded else {}
    return dict(from_pretrained(hf_class, folder, **SETTINGS, **place, **more).state_dict())


@pytest.mark.parametrize("sharded", [False, True])
def test_other_files_beside_the_weights_are_named_and_not_read(saved: Path, sharded: bool) -> None:
    """A consolidated copy, an adapter, an older save: all layouts read what transformers reads."""
    expected = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(saved / "model.safetensors").items()}
    for name in ("adapter_model", "consolidated", "model-00001-of-00002", "zz"):
        save_file(zeros, saved / f"{name}.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(weights_of(saved, sharded), dict(expected), rtol=0, atol=0)
    whole = on_meta(AutoModelForCausalLM, LlamaConfig(**SIZE))
    (said,) = check_weights(whole, saved, None, new_head=False)
    assert said.endswith("adapter_model.safetensors, consolidated.safetensors, model-00001-of-00002.safetensors, "
                         "zz.safetensors not read")  # fmt: skip


def test_the_index_chooses_its_files(saved: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    model.save_pretrained(saved, max_shard_size="100KB")
    stray = {"lm_head.weight": torch.zeros(64, 64)}
    save_file(stray, saved / "zz.safetensors")
    found = find_weights(saved)
    assert len(found.files) > 1 and found.others == ("zz.safetensors",)
    torch.testing.assert_close(weights_of(saved, True), dict(model.state_dict()), rtol=0, atol=0)
    found.files[1].unlink()
    with pytest.raises(RequestError, match=f"its index names {found.files[1].name}, which is not there"):
        find_weights(saved)


@pytest.mark.parametrize("sharded", [False, True])
def test_no_bar_is_drawn_for_each_layer(saved: Path, sharded: bool, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    weights_of(saved, sharded)
    check_weights(on_meta(AutoModelForCausalLM, LlamaConfig(**SIZE)), saved, None, new_head=False)
    assert "Loading weights" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant(saved: Path, sharded: bool) -> None:
    model = LlamaForCausalLM.from_pretrained(saved)
    shutil.rmtree(saved)
    model.save_pretrained(saved, variant="fp16")
    with pytest.raises(RequestError, match=r"model\.variant=fp16"):
        find_weights(saved)
    torch.testing.assert_close(weights_of(saved, sharded, variant="fp16"), dict(model.state_dict()), rtol=0, atol=0)
    model.save_pretrained(saved, variant="fp16", max_shard_size="100KB")
    (saved / "model.fp16.safetensors").unlink(missing_ok=True)
    assert len(find_weights(saved, "fp16").files) > 1


def on_meta(hf_class: Any, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return hf_class.from_config(config)


def test_the_differences_are_told_before_anything_is_read(saved: Path) -> None:
    """A head is new and said to be; a lacking layer is refused; what has no place is named."""
    config = LlamaConfig(**SIZE, num_labels=3)
    classifier = AutoModelForSequenceClassification
    said = check_weights(on_meta(classifier, config), saved, None, new_head=True)
    assert said == [
        "new in the model, its weights lack it: score.weight",
        "in its weights, without a place in the model: lm_head.weight",
    ]
    with pytest.raises(RequestError, match=r"its weights lack score\.weight"):
        check_weights(on_meta(classifier, config), saved, None, new_head=False)
    file = saved / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "score.weight": torch.zeros(5, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"its weights lack score\.weight in this shape"):
        check_weights(on_meta(classifier, config), saved, None, new_head=False)
    lacking = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    for sharded in (False, True):
        with pytest.raises(RequestError, match=r"its weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
            weights_of(saved, sharded)
    with pytest.raises(RequestError, match=r"its weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        check_weights(on_meta(AutoModelForCausalLM, LlamaConfig(**SIZE)), saved, None, new_head=False)
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": lacking.T.contiguous()}, file, metadata={"format": "pt"})
    for sharded in (False, True):
        with pytest.raises(RequestError, match=r"up_proj\.weight in this shape"):
            weights_of(saved, sharded)


def broken(folder: Path, what: str) -> None:
    file, config = folder / "model.safetensors", folder / "config.json"
    if what == "half a download":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "nothing":
        file.write_bytes(b"")
    elif what == "a pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n")
    elif what == "a page":
        config.write_text("<!DOCTYPE html><html></html>")
    elif what == "a header of exabytes":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    elif what == "a header of nothing":
        file.write_bytes((4).to_bytes(8, "little") + b"[[[[")
    elif what == "an adapter":
        file.rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    elif what == "another name":
        file.rename(folder / "weights.safetensors")
    else:
        settings = json.loads(config.read_text()) | {"quantization_config": {"quant_method": what}}
        config.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("what", "says", "advice"),
    [
        ("half a download", "it is not complete", "copy or download it again"),
        ("nothing", "is no whole safetensors file", "copy or download it again"),
        ("a pointer", "is a pointer of Git LFS", "git lfs pull"),
        ("a page", "is no JSON", "copy or download it again"),
        ("a header of exabytes", "is no whole safetensors file", "copy or download it again"),
        ("a header of nothing", "its header is broken", "copy or download it again"),
        ("an adapter", "is an adapter (PEFT) of some/base", "merge_and_unload"),
        ("another name", "none is one that transformers reads", "rename weights.safetensors to model.safetensors"),
        *((method, "cannot be turned into plain ones", "the model it was made of")
          for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", "of tomorrow")),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_the_start(saved: Path, what: str, says: str, advice: str) -> None:
    broken(saved, what)
    with pytest.raises(RequestError) as refused:
        compose(["+recipe=quickstart", "model=pretrained", f"model.path={saved}"], 1)
    (problem,) = refused.value.problems
    assert says in problem.rule and advice in problem.nearest
    if "rename" in advice:  # advice that works when it is followed
        (saved / "weights.safetensors").rename(saved / "model.safetensors")
        compose(["+recipe=quickstart", "model=pretrained", f"model.path={saved}"], 1)
    if "quantis" in says or what == "gptq":
        assert problem.key == "quantization_config.quant_method" and problem.value == what


def in_fp8(folder: Path, block: int = 32) -> dict[str, torch.Tensor]:
    """Put the linear layers into fp8 with a scale for each block; returns the values that this leaves."""
    file = folder / "model.safetensors"
    tensors, values = load_file(file), {}
    for name, tensor in list(tensors.items()):
        values[name] = tensor
        if "proj" not in name:
            continue
        rows, columns = tensor.shape[0] // block, tensor.shape[1] // block
        blocks = tensor.reshape(rows, block, columns, block)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = small.reshape(tensor.shape), scale
        values[name] = (small.float() * scale[:, None, :, None]).reshape(tensor.shape)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return values


@pytest.mark.slow
def test_weights_in_fp8_are_read_with_their_scales(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layout the same plain weights, and a model that says no more that it is quantised."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(saved.parent / "cache"))
    (saved / "tokenizer.json").write_text("{}")
    values = in_fp8(saved)
    assert any(kind == "F8_E4M3" for kind, _ in header(saved / "model.safetensors").values())
    model = ModelConfig(path=str(saved))
    compose(["+recipe=quickstart", "model=pretrained", f"model.path={saved}"], 1)
    folder = local_folder(model)
    assert (folder / "tokenizer.json").is_file() and local_folder(model) == folder
    assert quantised(json.loads((folder / "config.json").read_text())) is None
    assert not hasattr(pretrained_config(model, folder), "quantization_config")
    assert not hasattr(pretrained_config(model), "quantization_config"), "as the plan reads it"
    for sharded in (False, True):
        torch.testing.assert_close(weights_of(folder, sharded), values, rtol=1e-6, atol=1e-7)


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The sixteen numbers of e2m1 (OCP Microscaling Formats v1.0, 5.3.3)."""


@pytest.mark.slow
def test_weights_in_mxfp4_are_read_with_their_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-OSS as it is published: pairs of numbers in a byte, a power of two for every 32 of them."""
    from transformers import GptOssConfig, GptOssForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    size = {**SIZE, "intermediate_size": 64, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    model, folder = GptOssForCausalLM(GptOssConfig(**size)), tmp_path / "model"
    model.save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, columns, rows // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(120, 128, (experts, columns, rows // 32), generator=draw, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([torch.tensor(FP4)[(blocks & 15).long()], torch.tensor(FP4)[(blocks >> 4).long()]], -1)
        values = pairs.flatten(-2) * (2.0 ** (scales.float() - 127))[..., None]
        expected[name] = values.reshape(experts, columns, rows).transpose(1, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    plain = weights_of(local_folder(ModelConfig(path=str(folder))), True)
    assert len(expected) == 4
    for name, values in expected.items():
        torch.testing.assert_close(plain[name], values, rtol=0, atol=0)


def test_a_tokenizer_larger_than_the_embedding(saved: Path) -> None:
    """The advice works when it is followed: a copy whose embedding has a row for each token."""
    tokenizer = train_tokenizer(["a b c"] * 4, 260)
    model = LlamaForCausalLM.from_pretrained(saved)
    (problem,) = check_text(model.config, tokenizer, 8, str(saved))
    assert problem.key == "model.path" and f"resize_token_embeddings({len(tokenizer)})" in problem.nearest
    model.resize_token_embeddings(len(tokenizer))
    assert check_text(model.config, tokenizer, 8, str(saved)) == []
    (problem,) = check_text(LlamaConfig(**SIZE), tokenizer, 8)
    assert problem.nearest.startswith("model.config.vocab_size=")


def test_a_folder_inside(saved: Path) -> None:
    """`model.subfolder` says where in a path the model is: for the checks, the loader and the plan's configuration."""
    model = ModelConfig(path=str(saved.parent), subfolder=saved.name)
    assert local_folder(model) == saved
    assert pretrained_config(model).to_dict()["hidden_size"] == SIZE["hidden_size"], "as the plan reads it"
    words = ["+recipe=quickstart", "model=pretrained", f"model.path={saved.parent}"]
    assert compose([*words, f"model.subfolder={saved.name}"], 1).model.subfolder == saved.name
    for wrong, key, nearest in (
        ([*words, "model.subfolder=modle"], "model.subfolder", f"model.subfolder={saved.name}"),
        (["+recipe=quickstart", "model.subfolder=x"], "model.subfolder", "model.path=FOLDER"),
        (["+recipe=quickstart", "model.variant=fp16"], "model.variant", "model.path=FOLDER"),
    ):
        with pytest.raises(RequestError) as refused:
            compose(wrong, 1)
        (problem,) = refused.value.problems
        assert (problem.key, problem.nearest) == (key, nearest)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a folder's file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def tied(folder: Path) -> PreTrainedModel:
    """A folder whose configuration says that head and embedding are one, whose file has both alike; as it is read."""
    model = LlamaForCausalLM(LlamaConfig(**SIZE | {"tie_word_embeddings": True}))
    model.save_pretrained(folder)
    rewritten(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    return model


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tie_of_two_tensors(tmp_path: Path, sharded: bool) -> None:
    """Alike: one. Only the head there: it is the embedding too. Not alike: one would be lost, which is refused."""
    model = tied(tmp_path)
    check_weights(on_meta(AutoModelForCausalLM, model.config), tmp_path, None, new_head=False)
    embedding = "model.embed_tokens.weight"
    rewritten(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if name != embedding})
    check_weights(on_meta(AutoModelForCausalLM, model.config), tmp_path, None, new_head=False)
    torch.testing.assert_close(weights_of(tmp_path, sharded), dict(model.state_dict()), rtol=0, atol=0)
    rewritten(tmp_path, lambda tensors: tensors | {embedding: tensors["lm_head.weight"] + 1})
    with pytest.raises(RequestError, match="have other values, and are one tensor by its") as refused:
        check_weights(on_meta(AutoModelForCausalLM, model.config), tmp_path, None, new_head=False)
    (problem,) = refused.value.problems
    assert problem.nearest.startswith("tie_word_embeddings=false in its config.json")
    settings = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    expected = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    torch.testing.assert_close(weights_of(tmp_path, sharded), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("other", ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_tie_of_more_than_two_tensors(tmp_path: Path, kept: str, other: str) -> None:
    """Whichever of them are stored. T5 is tied whatever its configuration says, so no advice to untie it."""
    size = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(size).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda all: {kept if name == "shared.weight" else name: all[name] for name in all})
    check_weights(on_meta(AutoModelForSeq2SeqLM, size), tmp_path, None, new_head=False)
    if other == kept:
        return
    rewritten(tmp_path, lambda all: all | {other: all[kept] + 1})
    with pytest.raises(RequestError, match=f"{other} and {kept} have other values") as refused:
        check_weights(on_meta(AutoModelForSeq2SeqLM, size), tmp_path, None, new_head=False)
    assert "tie_word_embeddings=false" not in refused.value.render()


@pytest.mark.parametrize("kind", [torch.int8, torch.uint16, torch.bool, torch.complex64])
def test_kinds_of_numbers_are_looked_at_where_they_go(tmp_path: Path, kind: torch.dtype) -> None:
    """Experts that become one tensor, norms under an older name, running means: none has its own name in the model."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for hf_class, config, older, part in (
        (AutoModelForCausalLM, MixtralConfig(**size, num_key_value_heads=2, num_local_experts=2), "", "experts"),
        (AutoModelForMaskedLM, BertConfig(**size), "LayerNorm.gamma", "gamma"),
        (AutoModelForImageClassification, ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]), "", "running"),
    ):
        folder = tmp_path / part
        hf_class.from_config(config).save_pretrained(folder)
        if older:
            rewritten(folder, lambda all: {name.replace("LayerNorm.weight", older): all[name] for name in all})  # noqa: B023
        check_weights(on_meta(hf_class, config), folder, None, new_head=False)
        rewritten(folder, lambda all: {n: v.to(kind) if part in n else v for n, v in all.items()})  # noqa: B023
        with pytest.raises(RequestError, match=rf"{part}.* is stored as [IUBC]\w+, and its config.json names no"):
            check_weights(on_meta(hf_class, config), folder, None, new_head=False)


def test_weights_that_are_no_values(saved: Path) -> None:
    """Integers without scales."""
    whole = on_meta(AutoModelForCausalLM, LlamaConfig(**SIZE))
    rewritten(saved, lambda tensors: tensors | {"lm_head.weight": (100 * tensors["lm_head.weight"]).to(torch.int8)})
    with pytest.raises(RequestError, match=r"lm_head.weight is stored as I8, and its config.json names no"):
        check_weights(whole, saved, None, new_head=False)


@pytest.mark.parametrize(
    "plain, wrapped, found",
    [
        ("", "module.", "module."), ("", "_orig_mod.", "_orig_mod."), ("", "module._orig_mod.", "module._orig_mod."),
        ("model.", "model._orig_mod.", "_orig_mod."), ("layers.0.", "layers.0._fsdp_wrapped_module.", "_fsdp_wrapped"),
        ("layers.1.", "layers.1._checkpoint_wrapped_module.", "_checkpoint_wrapped_module."),
    ],
)  # fmt: skip
def test_the_advice_for_names_that_a_wrapper_has_changed_works(
    saved: Path, plain: str, wrapped: str, found: str
) -> None:
    whole, before = on_meta(AutoModelForCausalLM, LlamaConfig(**SIZE)), load_file(saved / "model.safetensors")
    rewritten(saved, lambda all: {name.replace(plain, wrapped, 1): value.clone() for name, value in all.items()})
    with pytest.raises(RequestError, match=f"without '{found}") as refused:
        check_weights(whole, saved, None, new_head=False)
    command = refused.value.problems[0].nearest.partition("\n")[2].replace("python", sys.executable, 1)
    subprocess.run(["bash", "-c", command], check=True, timeout=120)
    check_weights(whole, saved, None, new_head=False)
    torch.testing.assert_close(load_file(saved / "model.safetensors"), before, rtol=0, atol=0)


def test_running_means_are_weights() -> None:
    """Without them a network judges by means of nothing."""
    with tempfile.TemporaryDirectory() as folder:
        small = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
        ResNetForImageClassification(small).save_pretrained(folder)
        rewritten(Path(folder), lambda tensors: {n: v for n, v in tensors.items() if "num_batches" not in n})
        whole = on_meta(AutoModelForImageClassification, small)
        check_weights(whole, Path(folder), None, new_head=False)
        rewritten(Path(folder), lambda tensors: {n: v for n, v in tensors.items() if "running" not in n})
        with pytest.raises(RequestError, match=r"its weights lack resnet.embedder.embedder.normalization.running_mean"):
            check_weights(whole, Path(folder), None, new_head=False)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"num_beams": 0}, "num_beams"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"max_length": "many"}, "max_length"),
        ({"bad_words_ids": 5, "num_beams": "3"}, "num_beams"),
        ({"bad_words_ids": 5}, "bad_words_ids=5"),
        ({"top_k": "x", "repetition_penalty": 0}, 'top_k="x"'),
        ({"top_k": "x", "repetition_penalty": 0}, "repetition_penalty=0"),
        ({"typical_p": -1.5}, "typical_p"),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty"),
        ({"sequence_bias": {"a": 1}}, "sequence_bias"),
        ({"stop_strings": [1]}, "stop_strings"),
        ({"num_beams": 10**12}, "num_beams"),
        ({"use_mtp": True}, "use_mtp"),
    ],
)
def test_how_a_model_writes_texts_is_looked_at_before_the_start(saved: Path, settings: dict, key: str) -> None:
    """Else `generate` ends in a traceback, behind the training."""
    (saved / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(RequestError, match=r"generation_config\.json") as refused:
        check_weights(on_meta(AutoModelForCausalLM, LlamaConfig(**SIZE)), saved, None, new_head=False)
    assert key in refused.value.render()


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token_id": 128000, "eos_token_id": [128001, 128009], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"eos_token_id": [1, 106], "cache_implementation": "hybrid", "top_k": 64, "pad_token_id": 0},
        {"forced_bos_token_id": 0, "forced_eos_token_id": 2, "no_repeat_ngram_size": 3, "num_beams": 4,
         "early_stopping": True, "length_penalty": 2.0, "min_length": 56, "max_length": 142},
        {"bad_words_ids": [[63]], "decoder_start_token_id": 63, "renormalize_logits": True},
        {"suppress_tokens": [1, 2, 7], "begin_suppress_tokens": [5, 6], "alignment_heads": [[1, 0]], "is_multilingual":
         True, "lang_to_id": {"<|en|>": 5}, "return_timestamps": False, "max_initial_timestamp_index": 1},
        {"repetition_penalty": 1.05, "top_k": 20, "stop_strings": ["\n\n"], "return_dict_in_generate": True},
        {"_from_model_config": True, "transformers_version": "4.30.0", "custom_generate": "x/y",
         "trust_remote_code": True},
    ],
)  # fmt: skip
def test_what_published_models_say_of_writing_is_no_mistake(saved: Path, settings: dict) -> None:
    (saved / "generation_config.json").write_text(json.dumps(settings))
    state = torch.random.get_rng_state()
    check_weights(on_meta(AutoModelForCausalLM, LlamaConfig(**SIZE)), saved, None, new_head=False)
    assert torch.equal(state, torch.random.get_rng_state()), "trying draws nothing from the run"


def test_a_sample_of_a_model_with_words_to_stop_at(saved: Path) -> None:
    """transformers wants the tokenizer for them, and returns more than tokens where a model says so."""
    LlamaForCausalLM(LlamaConfig(**SIZE | {"vocab_size": 260})).save_pretrained(saved)
    train_tokenizer(["the quick brown fox"] * 4, 260).save_pretrained(saved)
    settings = {"stop_strings": ["fox"], "return_dict_in_generate": True}
    (saved / "generation_config.json").write_text(json.dumps(settings))
    recipe = CausalLM(Config(eval=EvalConfig(prompt="the quick", new_tokens=3)))
    assert str(recipe.sample(saved)).startswith("the quick")


def test_code_of_strangers_does_not_go_along(saved: Path) -> None:
    settings = {"custom_generate": "x/y", "trust_remote_code": True, "top_k": 7}
    (saved / "generation_config.json").write_text(json.dumps(settings))
    found = hub.generation_config(saved)
    assert found.top_k == 7 and not {"custom_generate", "trust_remote_code"} & vars(found).keys()


@pytest.mark.parametrize(
    "family, name, value",
    [
        ("llama", "num_hidden_layers", 10**9), ("llama", "num_hidden_layers", 10_001), ("gpt2", "n_layer", 10**9),
        ("qwen2", "num_hidden_layers", 10**9), ("gemma3_text", "num_hidden_layers", 10**9),
        ("llama", "num_key_value_heads", 10**9), ("llama", "vocab_size", 10**12), ("bart", "d_model", 10**8),
        ("bert", "max_position_embeddings", 10**9),
    ],
)  # fmt: skip
def test_models_without_end_are_refused_at_once(saved: Path, family: str, name: str, value: int) -> None:
    """Before a configuration is made: Qwen2's and Gemma's list their layers in it."""
    words = ["+recipe=quickstart", f"model.type={family}", f"model.config={{{name}: {value}}}"]
    with pytest.raises(RequestError, match=f"model.config.{name}={value}: more than .*: no model has as many"):
        compose(words, 1)
    with pytest.raises(RequestError, match="no model has as many"):
        scratch_config(family, {name: value})
    settings = {"model_type": family, name: value}
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RequestError, match="no model has as many"):
        pretrained_config(ModelConfig(path=str(saved)))


@pytest.mark.parametrize("settings", [{"num_labels": 10**9}, {"text_config": {"num_hidden_layers": 10**9}}])
def test_lists_without_end_in_parts_of_a_configuration(tmp_path: Path, settings: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"} | settings))
    with pytest.raises(RequestError, match="no model has as many"):
        hub.config(tmp_path)


@pytest.mark.parametrize("family", ["llama4", "bamba", "doge", "t5", "swin"])
def test_families_are_within_the_bounds(family: str) -> None:
    assert not list(impossible(CONFIG_MAPPING[family]().to_dict()))


def test_weights_that_are_not_finite_are_called_so(saved: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    (problem,) = check_causal(model, torch.device("cpu"))
    assert problem.rule == "its weights are not finite: model.norm.weight"


@pytest.mark.parametrize("probe", [check_causal, check_padding, check_right_padding])
def test_no_probe_takes_what_is_not_finite_for_what_is_seen(saved: Path, probe: Callable[..., list[Problem]]) -> None:
    model = LlamaForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    nothing = torch.full((1, 4), float("nan"))
    words = (nothing, nothing) if probe is check_right_padding else (torch.device("cpu"),)
    (problem,) = probe(model, *words)
    assert problem.rule == "its weights are not finite: model.norm.weight"
