"""Whether a model's folder is what its files say that it is, before anything of it is loaded. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

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
MOST = (
    (re.compile(r"(num_|n_)?(\w+_)?(layers?|blocks?|depths?|heads?)"), 10**4),
    (re.compile(r"(num_|n_)?(\w+_)?experts"), 10**5),
    (re.compile(r"num_labels"), 10**6),
    (re.compile(r"(\w+_)?(hidden_sizes?|intermediate_size|ffn_dim|head_dim)|n_embd|n_inner|d_model|d_ff"), 10**7),
    (re.compile(r"(\w+_)?vocab_size"), 10**8),
    (re.compile(r"max_(\w+_)?position(s|_embeddings)|n_positions|n_ctx|max_seq_len|seq_length"), 10**8),
)
"""Names of sizes in a configuration, and what none exceeds by far."""
COUNTED = re.compile(r"(num|n)_(\w+_)?(layers?|blocks?|heads?|experts|embd)|hidden_size|intermediate_size|vocab_size")
"""Sizes of which less than nothing has no meaning; elsewhere -1 may stand for none."""
AS_IT_HAS = "the number that it has"
SCALES_OF_FP8 = ("_scale_inv", ".scale", ".qscale_weight")
"""Those that transformers 5.23 reads (`update_weight_conversions` in quantizer_finegrained_fp8.py)."""


def check_folder(folder: Path, variant: str | None = None) -> WeightFiles:
    """The files that hold the weights, once all that is read with them is whole and of a kind that can be read.

    Raises RequestError.
    """
    found = find_weights(folder, variant)
    for name in SAID:
        read_json(folder / name)
    config = read_json(folder / "config.json")
    check_sizes(config, f"{folder / 'config.json'}: ")
    method = quantised(config)
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


def impossible(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, value and rule of the sizes that no model has: in a configuration as it is written, and its parts.

    Asked of what is written, since families make a list of all layers (`layer_types`) or labels before a configuration
    can be looked at, and the time to build a model grows with its parts, also on the meta device.
    """
    waiting: list[Mapping[str, Any]] = [config]
    while waiting:
        part = waiting.pop()
        for name, value in part.items():
            if isinstance(value, Mapping):
                waiting.append(value)
            sizes = [size for size in (value if isinstance(value, list | tuple) else [value]) if _is_number(size)]
            for pattern, most in MOST:
                if pattern.fullmatch(str(name)) and any(size > most for size in sizes):
                    yield str(name), value, f"more than {most:,}: no model has as many"
            if COUNTED.fullmatch(str(name)) and any(size < 0 for size in sizes):
                yield str(name), value, "a number of parts is not negative"
        heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if _is_number(heads) and _is_number(shared) and shared > 0 and heads % shared:
            yield "num_key_value_heads", shared, f"must divide num_attention_heads={heads}"


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Raises RequestError for the sizes that no model has. where: stands before a name, as `model.config.`."""
    found = [Problem(f"{where}{name}", str(value)[:40], rule, AS_IT_HAS) for name, value, rule in impossible(config)]
    if found:
        raise RequestError(found)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
