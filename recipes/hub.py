"""The one place that loads from a folder or from the hub: models, configurations, tokenizers, processors, data sets.

Nothing that is loaded runs code of its own. transformers asks on the terminal whether it may, unless it is told that it
may not, and takes the answer from whatever stands on stdin; `datasets` 4 and later knows no code of strangers. Every
call takes the `revision` (branch, tag or commit) that the request names. `tests/recipes/test_hub.py` finds any other
call in the repository.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conf.errors import Problem, RequestError
from conf.model_folder import check_sizes
from conf.schema import Config
from recipes.durable import of_the_system

CONVERT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
# The weights are plain tensors by now, but transformers 5.23 still marks the model as quantised and refuses to save it.
model.hf_quantizer, model.is_quantized = None, False
del model.config.quantization_config
model.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False).save_pretrained(out)
"""
"""The program that turns a GGUF file into a folder, in a process of its own."""
DEQUANTISE = """
import sys, torch, transformers
folder, variant, out = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
config.quantization_config = {**config.quantization_config, "dequantize": True}
family = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
options = {"use_safetensors": True, "variant": variant or None, "dtype": "auto"}
model = family.from_pretrained(folder, config=config, trust_remote_code=False, **options)
# As above.
model.hf_quantizer, model.is_quantized = None, False
vars(model.config).pop("quantization_config", None)
kinds = {parameter.dtype for parameter in model.parameters()}
assert kinds <= {torch.float32, torch.bfloat16, torch.float16}, f"some weights are still of {kinds}"
# In the format that it was read in (the default) it would be quantised again.
model.save_pretrained(out, variant=variant or None, save_original_format=False)
"""
"""The same for weights that are quantised."""


def config(source: Path | str, *, revision: str | None = None, key: str = "model.path", **options: Any) -> Any:
    """The configuration of a model, which names no code any more. Raises as transformers does, and RequestError."""
    from transformers import AutoConfig, PretrainedConfig

    if "gguf_file" not in options:  # its sizes are those of tensors that it has
        extra = {"revision": revision} if revision else {}
        with of_the_system(source):
            said, _ = PretrainedConfig.get_config_dict(source, trust_remote_code=False, **extra, **options)
        check_sizes(said, f"{source}, config.json: ")
    found = _without_code(AutoConfig, source, key, "config.json", revision, options)
    check_sizes(found.to_dict(), f"{source}, config.json: ")  # under any other names, too
    if "/" in str(getattr(found, "_attn_implementation", "")):  # a kernel of the hub: compiled code of a stranger
        rule = "its config.json wants attention from the hub, which is code of its own and is never loaded"
        raise RequestError(Problem(key, str(source), rule, "no attn_implementation in it (model.attention=sdpa)"))
    if hasattr(found, "auto_map"):
        del found.auto_map  # `from_config` asks for the code that it names where transformers has no class for a task
    return found


def tokenizer(source: Path | str, *, revision: str | None = None, key: str = "model.path", **options: Any) -> Any:
    """The tokenizer of a model. Raises as transformers does, and RequestError where it is code."""
    from transformers import AutoTokenizer

    return _without_code(AutoTokenizer, source, key, "tokenizer_config.json", revision, options)


def trained_tokenizer(folder: Path) -> Any:
    """One that was trained here, from its folder in the cache."""
    from transformers import PreTrainedTokenizerFast

    with of_the_system(folder):
        return PreTrainedTokenizerFast.from_pretrained(str(folder))


def image_processor(source: Path | str, *, revision: str | None = None, key: str = "model.path", **options: Any) -> Any:
    """The image processor of a model. Raises as transformers does, and RequestError where it is code."""
    from transformers import AutoImageProcessor

    return _without_code(AutoImageProcessor, source, key, "preprocessor_config.json", revision, options)


def model(hf_class: Any, folder: Path | str, *, key: str = "model.path", **options: Any) -> Any:
    """A model of an Auto class with the weights of a local folder, in safetensors."""
    return _without_code(hf_class, folder, key, "config.json", None, {"use_safetensors": True, **options})


def new_model(hf_class: Any, config: Any, **options: Any) -> Any:
    """A model of an Auto class with the weights of its initialisation."""
    return hf_class.from_config(config, trust_remote_code=False, **options)


CODE = ("custom_generate", "trust_remote_code")
"""Settings of generation that name code, or allow it."""
MOST_TEXTS = 1_000


def generation_config(folder: Path) -> Any:
    """How a model's folder says that it writes texts, without code. Raises RequestError for what cannot be done."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    try:
        found = GenerationConfig.from_pretrained(folder)
        found.validate()
    except (ValueError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(
            Problem(str(file), "", f"transformers refuses it: {reason}", "correct it, or remove it")
        ) from None
    for name in CODE:
        vars(found).pop(name, None)
    legal = {
        **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"), _is_id),
        **dict.fromkeys(("max_length", "max_new_tokens"), _is_count),
        **dict.fromkeys(("num_beams", "num_return_sequences"), lambda value: _is_count(value) and value <= MOST_TEXTS),
        "temperature": lambda value: _is_number(value) and value >= 0,
        "top_p": lambda value: _is_number(value) and 0 <= value <= 1,
    }
    wrong = [
        Problem(f"{file}: {name}", str(value), "no model can write texts so", f"remove {name} from it")
        for name, is_legal in legal.items()
        if (value := getattr(found, name, None)) is not None and not is_legal(value)
    ]
    if wrong:
        raise RequestError(wrong)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_id(value: Any) -> bool:
    return all(isinstance(one, int) and one >= -1 for one in (value if isinstance(value, list) else [value]))


def snapshot(name: str, *, revision: str | None = None, patterns: Iterable[str]) -> Path:
    """The folder of the cache with the files of a model of the hub; raises as huggingface_hub does."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def dataset(name: str, subset: str | None, split: str, *, revision: str | None = None) -> Any:
    """A split of a data set of the hub, of its cache, or of a local folder; raises as `datasets` does."""
    import datasets

    return datasets.load_dataset(name, subset, split=split, revision=revision)


def revisions(cfg: Config, weights: Path | None) -> dict[str, str]:
    """Name on the hub → the commit that was read (of the model), or the revision that was asked for.

    weights: the folder that the model was read from; in the hub's cache it is `…/snapshots/COMMIT`.
    """
    model, found = cfg.model, {}
    if model.path and weights is not None and weights.parent.name == "snapshots":
        found[model.path] = weights.name
    asked = [(model.tokenizer, model.tokenizer_revision)]
    asked += [(source.name, source.revision) for source in (cfg.data, *cfg.data.mixture)]
    return found | {name: revision for name, revision in asked if name and revision}


def _without_code(
    loader: Any, source: Path | str, key: str, file: str, revision: str | None, options: dict[str, Any]
) -> Any:
    """`loader.from_pretrained`. Raises RequestError where transformers would need code that comes with the files."""
    extra = {"revision": revision} if revision else {}
    try:
        with of_the_system(source):
            return loader.from_pretrained(source, trust_remote_code=False, **extra, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        files = ", ".join(_naming_code(Path(source))) or file
        rule = f"it needs code that comes with it (auto_map in {files}), and code of strangers is never executed"
        raise RequestError(Problem(key, str(source), rule, "a model whose classes transformers itself has")) from None


def _naming_code(folder: Path) -> list[str]:
    """The files of a local folder that name code."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [file.name for file in files if b'"auto_map"' in file.read_bytes()]
