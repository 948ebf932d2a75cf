"""Rules on the model: where it comes from, and that a local one is whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from conf.batch import Layout
from conf.environment import Environment
from conf.errors import Problem, RequestError, did_you_mean
from conf.model_folder import check_folder, impossible
from conf.rules_data import POSITIONS, nearest_path, sources
from conf.rules_values import shown
from conf.schema import Config
from conf.weight_files import find_weights

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Attention → the package that transformers 5.23 asks for it (utils/import_utils.py)."""
WIDTHS = (("hidden_size", "num_attention_heads"), ("n_embd", "n_head"), ("num_attention_heads", "num_key_value_heads"))
"""Pairs of sizes where the second divides the first (unless a head_dim says otherwise)."""
COUNTS = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
COUNTS |= {"num_key_value_heads", "n_embd", "n_layer", "n_head", "n_inner", *POSITIONS}

SMALL = {"causal_lm": "llama_60m", "translation": "bart_8m", "image_classification": "cnn_tiny"}
"""A model to begin with; bert_4m for what is not here."""


def origin(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A model is either new (type and config) or pretrained (path)."""
    model = cfg.model
    if model.type is None and model.path is None:
        rule = "say which pretrained model, or choose one to train from scratch"
        small = SMALL.get(cfg.task, "bert_4m")
        yield Problem("model.path", "null", rule, f"model.path=FOLDER_OR_HUB_NAME, or model={small}")
    elif model.type is not None and model.path is not None:
        rule = f"model.path={model.path} is given too, and a model is new or pretrained, not both"
        yield Problem("model.type", model.type, rule, f"model=pretrained model.path={model.path}")
    elif model.path is not None and model.config:
        rule = "a pretrained model brings its own config"
        yield Problem("model.config", shown(sorted(model.config)), rule, "leave model.config out")
    for name in ("variant", "subfolder"):
        if (value := getattr(model, name)) is not None and model.path is None:
            yield Problem(f"model.{name}", value, "says where in model.path the weights are", "model.path=FOLDER")
    if model.variant is not None and model.gguf_file is not None:
        rule = "is about weights in safetensors, and model.gguf_file is given"
        yield Problem("model.variant", model.variant, rule, "model.variant=null")
    if model.gguf_file is not None and model.path is None:
        yield Problem("model.gguf_file", model.gguf_file, "needs model.path, the folder it is in", "model.path=FOLDER")


def revisions(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A revision is one of the hub: a local folder is what it is, and so is a package."""
    model = cfg.model
    named = [("model", "path", model.path, model.revision)]
    named += [("model", "tokenizer", model.tokenizer, model.tokenizer_revision)]
    named += [(where, "name", source.name, source.revision) for where, source in sources(cfg) if source.kind == "hub"]
    for section, name, source, revision in named:
        if revision is None:
            continue
        key = f"{section}.tokenizer_revision" if name == "tokenizer" else f"{section}.revision"
        if not source:
            rule = f"there is no {section}.{name} that it could be a revision of"
        elif source.startswith("package:") or Path(source).expanduser().exists():
            rule = f"{section}.{name}={source} is local, and only the hub has revisions"
        else:
            continue
        yield Problem(key, revision, rule, f"{key}=null")


def config(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Sizes of a new model are positive and fit together; nothing in them names code."""
    values = cfg.model.config
    for name, value in values.items():
        key = f"model.config.{name}"
        if name in ("auto_map", "trust_remote_code") or name.startswith("_"):
            yield Problem(key, shown(value), "code of strangers is never loaded", "leave it out")
        elif name in COUNTS and value is not None and (not _is_count(value) or value < 1):
            nearest = f"{key}=1" if _is_count(value) else f"{key}=8, or another whole number"
            yield Problem(key, shown(value), "must be a whole number, at least 1", nearest)
    for name, value, rule in impossible(values):
        if name not in COUNTS or (_is_count(value) and value > 0 and rule.startswith("more")):  # else said already
            yield Problem(f"model.config.{name}", shown(value), rule, "the size that is meant")
    for whole, part in WIDTHS:
        size, count = values.get(whole), values.get(part)
        if "head_dim" in values and part == "num_attention_heads":
            continue
        if _is_count(size) and _is_count(count) and count > 0 < size and size % count:
            fitting = max(d for d in range(1, count + 1) if size % d == 0)
            rule = f"must divide model.config.{whole}={size}"
            yield Problem(f"model.config.{part}", str(count), rule, f"model.config.{part}={fitting}")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def attention(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """The attention implementation exists, and the device and the precision can run it."""
    name = cfg.model.attention
    if name is None:
        return
    if name not in ATTENTIONS:
        near = did_you_mean(name, ATTENTIONS) or "sdpa"
        yield Problem("model.attention", name, f"one of {', '.join(ATTENTIONS)}", f"model.attention={near}")
    elif name.startswith("flash"):
        if env.device != "cuda":
            yield Problem("model.attention", name, "flash attention runs on CUDA only", "model.attention=sdpa")
        elif cfg.precision.name == "fp32":
            yield Problem("model.attention", name, "flash attention computes in bf16 or fp16", "precision=bf16")
        elif importlib.util.find_spec(package := FLASH[name]) is None:
            yield Problem("model.attention", name, f"the {package} package is not installed", "model.attention=sdpa")


def weights(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A local model folder exists and holds a config and safetensors, or the GGUF file asked for."""
    path = cfg.model.path
    if not path:
        return
    if path.startswith("package:"):
        package, _, below = path.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or found.origin is None:
            rule = "no such installed Python package (its import name, not its name on PyPI)"
            near = did_you_mean(package, _packages())
            yield Problem("model.path", path, rule, f"model.path=package:{near}" if near else "pip install it first")
            return
        folder = Path(found.origin).parent / below
        if not folder.is_dir():
            holders = [file.parent for file in folder.parent.rglob("*.safetensors")]
            nearest = f"model.path=package:{package}/{holders[0].relative_to(folder.parent)}" if holders else ""
            yield Problem("model.path", path, f"the package has no folder {below}", nearest)
            return
    else:
        folder = Path(path).expanduser()
        local = path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1
        if not folder.exists():
            if local:
                yield Problem("model.path", path, "there is no such folder", f"model.path={nearest_path(folder)}")
            return
        if not folder.is_dir():
            nearest = f"model.path={folder.parent}"
            nearest += f" model.gguf_file={folder.name}" if folder.suffix == ".gguf" else ""
            yield Problem("model.path", path, "a model is a folder, this is a file", nearest)
            return
    yield from _gguf(cfg, folder) if cfg.model.gguf_file else _safetensors(cfg, folder)


def _gguf(cfg: Config, folder: Path) -> Iterator[Problem]:
    name = cfg.model.gguf_file or ""
    if (folder / name).is_file():
        return
    there = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf"))
    rule = f"is not in {folder}; GGUF files there: {', '.join(there) or 'none'}"
    near = did_you_mean(name, there) or (there[0] if there else "")
    yield Problem("model.gguf_file", name, rule, f"model.gguf_file={near}" if near else "")


def _safetensors(cfg: Config, folder: Path) -> Iterator[Problem]:
    """What is wrong with the files that `from_pretrained` would read, as far as their beginnings tell."""
    folder = folder / (cfg.model.subfolder or "")
    if not folder.is_dir():
        nearest = f"model.subfolder={nearest_path(folder).name}"
        yield Problem("model.subfolder", shown(cfg.model.subfolder), f"{folder.parent} has no such folder", nearest)
        return
    try:
        find_weights(folder, cfg.model.variant)
        if not (folder / "config.json").is_file():
            rule = "this folder has weights but no config.json"
            yield Problem("model.path", str(cfg.model.path), rule, "add the config.json")
            return
        check_folder(folder, cfg.model.variant)
    except RequestError as error:
        path = str(cfg.model.path)
        yield from (replace(one, value=path) if one.key == "model.path" else one for one in error.problems)
    except OSError as error:
        yield Problem("model.path", str(folder), f"cannot be read: {error}", "a folder of a model that can be read")


def _packages() -> list[str]:
    """Import names of installed packages."""
    import importlib.metadata

    return sorted(importlib.metadata.packages_distributions())


def set_elsewhere(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Attributes of the model that follow from other keys: given here they would be overwritten."""
    for key, value in cfg.model.config.items():
        if key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            yield Problem(
                f"model.config.{key}", str(value), "special tokens are those of the tokenizer", "leave it out"
            )
        elif key in ("num_labels", "id2label", "label2id", "problem_type"):
            rule = "the classes of a model, and what its loss is, follow from the task and its data"
            yield Problem(f"model.config.{key}", shown(value), rule, "leave it out (data.labels=[…], data.multi_label)")
        elif key == "use_cache":
            yield Problem(
                "model.config.use_cache", str(value), "training has no cache, exported models do", "leave it out"
            )
        elif key == "model_type":
            yield Problem("model.config.model_type", str(value), "the family is model.type", f"model.type={value}")


RULES = (origin, revisions, config, set_elsewhere, attention, weights)
