"""Which files of a folder hold a model's weights, and what is in them. Imports no torch.

The choice is that of transformers 5.23 (`_get_resolved_checkpoint_files` in modeling_utils.py), for every layout:
what config.json names as `transformers_weights`, then the single file, then the files of the index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import Problem, RequestError

SINGLE, INDEX, SUFFIX = "model.safetensors", "model.safetensors.index.json", ".safetensors"
ADAPTER = "adapter_config.json"
POINTER = b"version https://git-lfs"
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""
READ = ("fp8", "mxfp4")
"""Quantised weights that transformers turns into plain ones on any machine, without a further package."""
PLAIN_COPY = (
    "the model it was made of (often `base_model` in its README), or a plain copy: "
    "AutoModelForCausalLM.from_pretrained(…).dequantize().save_pretrained(FOLDER) where its packages are"
)
AGAIN = "copy or download it again"
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
"""Of an element, by the names of safetensors 0.8."""
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → (dtype, shape), as in a safetensors header."""


@dataclass(frozen=True)
class WeightFiles:
    """files: those that are read. others: weights beside them, which are not."""

    files: tuple[Path, ...]
    others: tuple[str, ...]


def find_weights(folder: Path, variant: str | None = None) -> WeightFiles:
    """The files of `folder` that hold its model's weights.

    variant: `fp16` stands for model.fp16.safetensors. Raises RequestError where there are none, or one of those that
    the index names is missing.
    """
    there = sorted(file.name for file in folder.iterdir() if file.name.endswith(SUFFIX))
    named = read_json(folder / "config.json").get("transformers_weights")
    single, index = _with(SINGLE, variant), _with(INDEX, variant)
    if isinstance(named, str):
        names = _of_index(folder, named) if named.endswith(".json") else [named]
    elif (folder / single).is_file():
        names = [single]
    elif (folder / index).is_file():
        names = _of_index(folder, index)
    else:
        for name in (single, index, *there):
            _refuse_dangling(folder / name)
        raise RequestError(_no_weights(folder, there, variant))
    for name in names:
        _refuse_dangling(folder / name)
        if Path(name).name != name or not (folder / name).is_file():
            rule = f"its index names {name}, which is not there: it is not complete"
            raise RequestError(Problem("model.path", str(folder), rule, AGAIN))
    return WeightFiles(tuple(folder / name for name in names), tuple(name for name in there if name not in names))


def single_file(variant: str | None = None) -> str:
    """The name of the file that holds all weights, where one does."""
    return _with(SINGLE, variant)


def names_of_weights(folder: Path, variant: str | None = None) -> list[str]:
    """The files that a folder's index or config.json names, whether they are there or not."""
    named = read_json(folder / "config.json").get("transformers_weights")
    if isinstance(named, str) and not named.endswith(".json"):
        return [named]
    index = named if isinstance(named, str) else _with(INDEX, variant)
    return _of_index(folder, index) if (folder / index).is_file() else []


def read_json(file: Path) -> dict[str, Any]:
    """An object in JSON; empty where the file is not there. Raises RequestError where it is something else."""
    if not file.is_file():
        return {}
    content = file.read_bytes()
    refuse_pointer(file)
    if content.startswith(b"\xef\xbb\xbf"):
        rule = "begins with a byte order mark, with which transformers does not read it"
        raise RequestError(Problem(str(file), "", rule, "save it as UTF-8 without one"))
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        rule = f"is no JSON ({error}); a page of the web, or half a download?"
        raise RequestError(Problem(str(file), "", rule, AGAIN)) from None
    if not isinstance(found, dict):
        raise RequestError(Problem(str(file), "", "holds no JSON object", AGAIN))
    return found


def refuse_pointer(file: Path) -> None:
    """Raises RequestError where Git LFS has left its pointer in the place of a file."""
    with file.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            rule = "is a pointer of Git LFS, not the file itself"
            raise RequestError(Problem(str(file), "", rule, f"`git lfs pull` in {file.parent}, or download it again"))


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of the tensors in a safetensors file, checked against the file's size.

    Raises RequestError for what is no whole safetensors file, as the library would once training has begun.
    """
    size = file.stat().st_size
    refuse_pointer(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, LARGEST_HEADER):
            raise RequestError(Problem(str(file), "", "is no whole safetensors file", AGAIN))
        try:
            found = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in found.items() if name != "__metadata__"}
            shapes = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in tensors.items()}
            places = sorted((*map(int, entry["data_offsets"]), name) for name, entry in tensors.items())
            end = 0
            for begin, after, name in places:
                kind, shape = shapes[name]
                bits = BITS[kind] * math.prod(shape)
                if begin != end or min(shape, default=0) < 0 or bits != 8 * (after - begin):
                    raise ValueError(name)
                end = after
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise RequestError(Problem(str(file), "", "is no safetensors file: its header is broken", AGAIN)) from None
    if 8 + length + end != size:
        rule = f"has {size:,} bytes, its header wants {8 + length + end:,}: it is not complete"
        raise RequestError(Problem(str(file), "", rule, AGAIN))
    return shapes


def quantised(config: dict[str, Any]) -> str | None:
    """The kind of quantised weights that a config.json says its model has, None for plain ones.

    Raises RequestError for a kind that cannot be read here.
    """
    own = [config.get("quantization_config"), config.get("compression_config")]
    parts = [part.get("quantization_config") for part in config.values() if isinstance(part, dict)]
    settings = next((found for found in (*own, *parts) if found), None)
    if settings is None:
        return None
    method = str(settings.get("quant_method") or "unknown") if isinstance(settings, dict) else str(settings)
    rule = "weights of this kind cannot be turned into plain ones here"
    if method in READ and isinstance(settings, dict):
        if settings in own:
            return method
        rule = "transformers does not read the weights of a part of a model (text_config, …) as quantised"
    rule += f" (what can: {', '.join(READ)}, and GGUF files by model.gguf_file)"
    raise RequestError(Problem("quantization_config.quant_method", method, rule, PLAIN_COPY))


def _refuse_dangling(file: Path) -> None:
    if file.is_symlink() and not file.exists():
        rule = f"is a link to {file.readlink()}, which is not there"
        nearest = "copy the folder again with what its links lead to (cp -rL), or download it again"
        raise RequestError(Problem(str(file), "", rule, nearest))


def _with(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def _of_index(folder: Path, name: str) -> list[str]:
    listed = read_json(folder / name).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        rule = "lists no files of weights (weight_map)"
        raise RequestError(Problem(str(folder / name), "", rule, AGAIN))
    return sorted({str(file) for file in listed.values()})


def _no_weights(folder: Path, there: list[str], variant: str | None) -> Problem:
    """Why there are none, and what to do instead."""
    path = str(folder)
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path") or "BASE"
        rule = f"is an adapter (PEFT) of {base}, not a model"
        nearest = f"merge it first: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "
        nearest += f"{path!r}).merge_and_unload().save_pretrained('merged')"
        return Problem("model.path", path, rule, nearest)
    variants = [name.split(".")[1] for name in there if name.startswith("model.") and name.count(".") == 2]
    variants += [file.name.split(".")[3] for file in folder.glob("model.safetensors.index.*.json")]
    if variants:
        rule = f"its weights are there as variants only: {', '.join(variants)}"
        return Problem("model.variant", variant or "null", rule, f"model.variant={variants[0]}")
    if there:
        rule = f"{', '.join(there[:3])}: none is one that transformers reads ({SINGLE}, or those of {INDEX})"
        nearest = f"rename {there[0]} to {SINGLE}" if len(there) == 1 else f"the {INDEX} that belongs to them"
        return Problem("model.path", path, rule, nearest)
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if pickles:
        rule = f"this folder has pickled weights only, which can run code and are never loaded ({', '.join(pickles)})"
        return Problem("model.path", path, rule, "save it with safetensors: model.save_pretrained(FOLDER)")
    ggufs = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf"))
    if ggufs:
        return Problem("model.path", path, "this folder has GGUF weights only", f"model.gguf_file={ggufs[0]}")
    below = sorted(file.parent for file in folder.glob(f"*/*{SUFFIX}"))
    nearest = f"model.path={below[0]}" if below else "a folder written by save_pretrained"
    return Problem("model.path", path, "this folder has no weights (*.safetensors)", nearest)
