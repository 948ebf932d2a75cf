"""Whether a model's folder is what its files say that it is, before anything of it is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from conf.errors import Problem, RequestError
from conf.weight_files import (
    PLAIN_COPY,
    Tensors,
    WeightFiles,
    find_weights,
    header,
    quantised,
    read_json,
    refuse_pointer,
)

SAID = ("config.json", "generation_config.json")
"""What is read with the weights."""
OF_TOKENIZERS = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "vocab.json",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "vocab.txt", "merges.txt",
)  # fmt: skip
NARROW = ("F8", "F6", "F4", "I8")
"""Beginnings of safetensors' names for numbers that mean something only with a scale, where one stands beside them."""
PACKED = (".qweight", ".weight_packed", ".weight.absmax", ".weight.quant_map")
"""Ends of names that only quantised weights have: GPTQ and AWQ, compressed-tensors, bitsandbytes."""
SCALES_OF_FP8 = ("_scale_inv", ".scale", ".qscale_weight")
"""Those that transformers 5.23 reads (`update_weight_conversions` in quantizer_finegrained_fp8.py)."""


def check_folder(folder: Path, variant: str | None = None) -> WeightFiles:
    """The files that hold the weights, once all that is read with them is whole and of a kind that can be read.

    Raises RequestError.
    """
    found = find_weights(folder, variant)
    for name in SAID:
        read_json(folder / name)
    method = quantised(read_json(folder / "config.json"))
    check_kind({name: entry for file in found.files for name, entry in header(file).items()}, method)
    return found


def check_kind(tensors: Tensors, method: str | None) -> None:
    """Whether weights that need scales are read with them: config.json says `method`, the files have `tensors`.

    Raises RequestError.
    """
    key = "quantization_config.quant_method"
    scales = _scales(tensors)
    if method is None:
        for name, (kind, _) in tensors.items():
            if name.endswith(PACKED) or (kind.startswith(NARROW) and name.rpartition(".")[0] in scales):
                rule = (
                    f"config.json names none, but {name} ({kind}) is quantised: without its scales it is another model"
                )
                nearest = "the config.json that belongs to these weights, with its quantization_config; "
                raise RequestError(Problem(key, "null", rule, nearest + PLAIN_COPY))
    if method == "fp8":
        for name, (kind, _) in tensors.items():
            module = name.rpartition(".")[0]
            known = (f"{name}{SCALES_OF_FP8[0]}", *(f"{module}{end}" for end in SCALES_OF_FP8[1:]))
            if kind.startswith("F8") and module in scales and not any(one in tensors for one in known):
                rule = f"the scale of {name} is {scales[module]}, and only {', '.join(SCALES_OF_FP8)} are read"
                raise RequestError(Problem(key, method, rule, PLAIN_COPY))


def check_whole(folder: Path, names: Iterable[str] = OF_TOKENIZERS) -> None:
    """Raises RequestError for a file that is a pointer, a page of the web or half of what it was."""
    for name in names:
        if name.endswith(".json"):
            read_json(folder / name)
        elif (folder / name).is_file():
            refuse_pointer(folder / name)


def _scales(tensors: Mapping[str, object]) -> dict[str, str]:
    """Module → the tensor beside its weight that is a scale."""
    found = {}
    for name in tensors:
        module, _, last = name.rpartition(".")
        if module and ("scale" in last or last in ("SCB", "absmax")):
            found[module] = name
    return found
