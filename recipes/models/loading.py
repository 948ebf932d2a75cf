"""Weights from safetensors into a model, layer by layer: the one loader of all layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from conf.errors import Problem, RequestError
from conf.weight_files import header

Place = Callable[[list[nn.Parameter]], None]
"""Called with a block's parameters once they are whole and final; may shard them (tensor parallelism, ZeRO-3)."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names."""
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Kinds whose elements are values of their own."""
WRAPPERS = "_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPED = rf"^((module|{WRAPPERS})\.)+|(?<=\.)({WRAPPERS})\."
"""What DistributedDataParallel, torch.compile, DeepSpeed, FSDP and activation checkpointing put into names."""
UNWRAP = """python - <<'END'
import re; from pathlib import Path; from safetensors.torch import load, save_file
for f in Path({folder!r}).glob('*.safetensors'):
    tensors = {{re.sub(r'{pattern}', '', name): value for name, value in load(f.read_bytes()).items()}}
    save_file(tensors, f, {{'format': 'pt'}})
END"""
NAMED = 3
"""Tensors that a message names; the others are counted."""


@dataclass(frozen=True)
class Differences:
    """Between a model and its weights, by the model's names.

    missing: parameters without weights. mismatched: the same, of another shape. unexpected: weights without a place,
    by their names in the files.
    """

    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def lacking(self) -> list[str]:
        """As a message names them."""
        return [*self.missing, *(f"{name} in this shape" for name in self.mismatched)]


def compare(model: PreTrainedModel, files: tuple[Path, ...]) -> Differences:
    """What would be found when `model` (whole, on the meta device) were filled: nothing is read but the headers.

    Under transformers' own renaming rules, and silent about what transformers is silent about.
    Raises RequestError for a file that is not whole, or whose tensors are no values of the model's.
    """
    shapes = {name: entry for file in files for name, entry in header(file).items()}
    renamed = _by_the_tie(model, shapes)
    tensors = {
        renamed.get(name, name): torch.empty(shape, dtype=DTYPES.get(dtype, torch.uint8), device="meta")
        for name, (dtype, shape) in shapes.items()
    }
    with _quiet():
        found, _ = convert_and_load_state_dict_in_model(model, tensors, _settings(model, torch.device("meta")))
    model._adjust_missing_and_unexpected_keys(found)
    mismatched = {name for name, *_ in found.mismatched_keys}
    # Running means are learnt as well; the count of batches beside them has no effect on a model that is given one.
    learnt = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    parameters = {name for name, _ in model.named_parameters()}
    missing = (found.missing_keys & (parameters | learnt)) - mismatched - set(model.all_tied_weights_keys)
    _refuse_other_kinds(model, shapes)
    _refuse_untied(model, files, shapes)
    return Differences(tuple(sorted(missing)), tuple(sorted(mismatched)), tuple(sorted(found.unexpected_keys)))


def _refuse_other_kinds(model: PreTrainedModel, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Integers are scaled ones whose scales are elsewhere: read as they are they would be a model of noise.

    So would the real part of complex numbers. Looked at where transformers would put them: an expert's weight has a
    name in the file that the model does not have, and running means are no parameters.
    """
    own, conversions = model.state_dict(), list(get_model_conversion_mapping(model))
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    for name, (dtype, _) in shapes.items():
        if dtype in FLOATING:
            continue
        place = own.get(name)
        if place is None:
            place = own.get(rename_source_key(name, renamings, converters, model.base_model_prefix, own)[0])
        if place is not None and place.is_floating_point():
            rule = f"{name} is stored as {dtype}, and its config.json names no quantization_config"
            raise RequestError(Problem("model.path", name, rule, "weights in bf16, fp16 or fp32"))


def _refuse_untied(
    model: PreTrainedModel, files: tuple[Path, ...], shapes: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Two tensors that are stored apart, with other values, and are one in the model: one of them would be lost."""
    tied: dict[str, list[str]] = {}
    for one, other in model.all_tied_weights_keys.items():
        tied.setdefault(other, [other]).append(one)
    for parts in tied.values():
        there = [next((name for name in shapes if _stored_as(name, {part})), None) for part in parts]
        kept, *others = dict.fromkeys(name for name in there if name) or [""]
        first = _read(files, kept) if others else torch.empty(0)
        for other in others:
            second = _read(files, other)
            if first.shape != second.shape or not torch.equal(first, second):
                rule = f"{other} and {kept} have other values, and are one tensor by its config.json"
                nearest = f"tie_word_embeddings=false in its config.json, or weights without {other}"
                if not _can_be_untied(model.config):
                    nearest = f"a {model.config.model_type} whose {other} is its {kept}: each is taken for one"
                raise RequestError(Problem("model.path", "tie_word_embeddings", rule, nearest))


def _can_be_untied(config: PretrainedConfig) -> bool:
    """Not T5's: transformers 5.23 always says that it is tied, and takes `false` for a scale of the outputs."""
    return not AutoConfig.for_model(config.model_type, tie_word_embeddings=False).tie_word_embeddings


def _stored_as(name: str, parameters: set[str]) -> bool:
    """Whether a name in a file is that of one of the parameters: a base model's lack its prefix, or have one more."""
    return any(name == own or own.endswith(f".{name}") or name.endswith(f".{own}") for own in parameters)


def _read(files: tuple[Path, ...], name: str) -> torch.Tensor:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - not a dictionary
                return tensors.get_tensor(name)
    raise KeyError(name)


def fill(model: PreTrainedModel, files: tuple[Path, ...], device: torch.device, place: Place | None) -> list[str]:
    """Load the tensors that `model` has parameters for, a layer at a time, under transformers' own renaming rules.

    Returns the names of the parameters whose tensors have another shape; they stay on the meta device.
    """
    # transformers puts a new Parameter in place of each: what was marked on the old one must follow.
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)}
    settings = _settings(model, device)
    waiting, mismatched = set(marks), list[str]()
    with _quiet(), ExitStack() as stack:
        for group in _by_layer(model, files, stack):
            found, _ = convert_and_load_state_dict_in_model(model, group, settings)
            mismatched += [name for name, *_ in found.mismatched_keys]
            loaded = [
                (name, parameter) for name, parameter in model.named_parameters()
                if name in waiting and not parameter.is_meta
            ]  # fmt: skip
            for name, parameter in loaded:
                waiting.discard(name)
                vars(parameter).update(marks[name])
                # Out of the mapped file: the engine writes into it (a broadcast), and pages once written stay.
                parameter.data = parameter.data.clone()
            if place is not None:
                place([parameter for _, parameter in loaded])
    return mismatched


def refuse_lacking(folder: Path, names: list[str], stored: Iterable[str] = ()) -> None:
    """Nothing that the weights lack is made up. stored: names without a place in the model. Raises RequestError."""
    if names:
        nearest = "a model that was trained for this task, and for these classes"
        if found := next((match.group() for name in stored if (match := re.search(WRAPPED, name))), None):
            nearest = f"the names in its file without '{found}', which a wrapper has put there:\n"
            nearest += UNWRAP.format(folder=str(folder), pattern=WRAPPED)
        raise RequestError(Problem("model.path", str(folder), f"its weights lack {listed(names)}", nearest))


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Some of the names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers 5.23 draws a bar for each call, which here is each layer, and for what only compares names."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _settings(model: PreTrainedModel, device: torch.device) -> LoadStateDictConfig:
    return LoadStateDictConfig(
        dtype=next(model.parameters()).dtype,
        device_map={"": device},
        ignore_mismatched_sizes=True,
        weight_mapping=list(get_model_conversion_mapping(model)),  # type: ignore[arg-type]
    )


def _by_the_tie(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name in the files → that of the tensor it is tied to, of which nothing else is stored."""
    stored = set(names)
    return {
        one: other
        for one, other in model.all_tied_weights_keys.items()
        if one in stored and not any(_stored_as(name, {other}) for name in stored)
    }


def _by_layer(model: PreTrainedModel, files: tuple[Path, ...], stack: ExitStack) -> Iterator[dict[str, Any]]:
    """The tensors of each layer, and each one that is of none; not yet read."""
    groups: dict[str, dict[str, Any]] = {}
    opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
    renamed = _by_the_tie(model, [name for tensors in opened for name in tensors.keys()])  # noqa: SIM118
    for tensors in opened:
        for key in tensors.keys():  # noqa: SIM118 - not a dictionary
            layer = re.match(r"(.*?\.\d+)\.", key)
            groups.setdefault(layer.group(1) if layer else key, {})[renamed.get(key, key)] = tensors.get_slice(key)
    yield from groups.values()
