"""The training state of an engine: written as stretches of tensors, read back into any layout.

Nothing here is collective: a rank writes what it holds (each element once over all ranks), and reads what it is to
hold, whatever the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from conf.errors import Problem, RequestError
from launch.runtime.engine import persistent_buffers
from launch.runtime.fragments import MASTER, STEP, fragments, prepare_state, replay_powers, states
from launch.runtime.tensor_file import reading
from recipes.models.tensor_parallel import Cut

if TYPE_CHECKING:
    from launch.runtime.engine import Engine

FROZEN, BUFFER, RNG = "frozen", "buffer", "rng"
SEPARATOR = "|"
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "last_overflow")
"""What the engine's dynamic loss scale remembers."""


def own_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """`NAME|KIND|TENSOR RANK|START` → flat tensor: this rank's part of the state; views, nothing is copied."""
    place, found = engine.topology.place, dict[str, torch.Tensor]()
    replica = place.data == place.sequence == 0
    for name, parameter in engine.module.named_parameters():
        cut = getattr(parameter, "tensor_cut", None)
        if getattr(parameter, "ds_pipe_replicated", False) or (cut is None and place.tensor > 0):
            continue
        if not parameter.requires_grad:
            for start, value in _lower_stretches(parameter, replica):
                found[_key(name, FROZEN, place.tensor, start)] = value
            continue
        for fragment in fragments(engine.ds, parameter):
            if fragment.replicated and not replica:
                continue
            for kind, value in fragment.values.items():
                found[_key(name, kind, place.tensor, fragment.start)] = value
    if replica and place.tensor == 0:
        for name, buffer in persistent_buffers(engine.module):
            found[_key(name, BUFFER, 0, 0)] = buffer.detach().reshape(-1)
    for number, state in enumerate(rng_state(engine.device)):
        found[_key(RNG, str(number), engine.topology.rank, 0)] = state
    return found


def described(engine: Engine) -> dict[str, dict[str, Any]]:
    """Name → {shape, cut} of the parameters and buffers of this rank's stage, whole."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        cut: Cut | None = getattr(parameter, "tensor_cut", None)
        shape = cut.whole if cut else getattr(parameter, "ds_shape", parameter.shape)
        found[name] = {"shape": list(shape), "cut": [cut.dim, cut.parts] if cut else None}
    buffers = {name: {"shape": list(buffer.shape), "cut": None} for name, buffer in persistent_buffers(engine.module)}
    return found | buffers


def facts(engine: Engine) -> dict[str, Any]:
    """What all ranks have alike: the optimizer's step and kinds of state, the schedule's position, the loss scale."""
    optimizer = engine.ds.optimizer
    kinds: set[str] = set()
    step = 0.0
    for state in states(optimizer):
        kinds |= {kind for kind, value in state.items() if torch.is_tensor(value) and kind != STEP}
        step = max(step, float(state.get(STEP, 0.0)))
    scaler = _scaler(optimizer)
    scale = {name: getattr(scaler, name) for name in SCALER if isinstance(getattr(scaler, name, None), int | float)}
    return {"kinds": sorted(kinds), "step": step, "schedule": engine.ds.lr_scheduler.last_epoch, "loss_scale": scale}


def _scaler(optimizer: Any) -> Any:
    """What holds a dynamic loss scale (deepspeed 0.19.8: by the stage, in one of two ways); None where it is fixed."""
    found = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    is_dynamic = getattr(found, "dynamic", False) or getattr(found, "dynamic_loss_scale", False)
    return found if is_dynamic else None


def rng_state(device: torch.device) -> list[torch.Tensor]:
    """The generators that dropout draws from."""
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


class SavedState:
    """The tensors of a checkpoint, whole or in part, read from its files as they are needed."""

    def __init__(self, files: list[Path], tensors: dict[str, dict[str, Any]], tensor_ranks: int):
        self._tensors, self._ranks = tensors, tensor_ranks
        self._stretches: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for file in files:
            try:
                with reading(file) as content:
                    keys = list(content.keys())
            except SafetensorError as error:
                raise RequestError(Problem("resume", str(file), f"is no safetensors file: {error}")) from None
            for key in keys:
                name, kind, rank, start = key.rsplit(SEPARATOR, 3)
                self._stretches.setdefault((name, kind), []).append((int(rank), int(start), file, key))

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def has(self, name: str, kind: str) -> bool:
        """Whether there are such values of a tensor."""
        return (name, kind) in self._stretches

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def whole(self, name: str, kind: str) -> torch.Tensor:
        """A tensor in the shape that Hugging Face gives it. Raises ValueError where elements are missing."""
        shape, cut = self.shape(name), self.cut_of(name)
        shares = []
        for rank, shape_of_share in enumerate(cut.shapes(self._ranks) if cut else [shape]):
            numel = torch.Size(shape_of_share).numel()
            flat, filled = None, 0
            for _, start, file, key in sorted(s for s in self._stretches.get((name, kind), ()) if s[0] == rank):
                with reading(file) as content:
                    value = content.get_tensor(key)
                flat = torch.empty(numel, dtype=value.dtype) if flat is None else flat
                flat[start : start + value.numel()] = value
                filled += value.numel()
            if flat is None or filled != numel:
                raise ValueError(f"{name}, {kind}: {filled} of {numel} elements")
            shares.append(flat.view(shape_of_share))
        return cut.join(shares) if cut else shares[0]

    def cut_of(self, name: str) -> Cut | None:
        """How the tensor ranks that wrote it divided it; None where each had all of it."""
        cut = self._tensors[name]["cut"]
        return Cut(cut[0], cut[1], self.shape(name)) if cut and self._ranks > 1 else None

    def rng(self, rank: int) -> list[torch.Tensor]:
        """The generators of a rank, in the order of `rng_state`; none where that rank has none."""
        found = sorted((kind, file, key) for (name, kind), stretches in self._stretches.items() if name == RNG
                       for owner, _, file, key in stretches if owner == rank)  # fmt: skip
        states = []
        for _, file, key in found:
            with reading(file) as content:
                states.append(content.get_tensor(key))
        return states


def restore(engine: Engine, saved: SavedState, facts: dict[str, Any], same_layout: bool) -> None:
    """Bring an engine that has not taken a step to a saved state. Learning rates stay those of its configuration."""
    optimizer, place = engine.ds.optimizer, engine.topology.place
    prepare_state(optimizer, facts["step"])
    replay_powers(optimizer, facts["step"])
    size = engine.layout.tensor
    for name, parameter in engine.module.named_parameters():
        cut: Cut | None = getattr(parameter, "tensor_cut", None)

        def share(kind: str, name: str = name, cut: Cut | None = cut) -> torch.Tensor:
            whole = saved.whole(name, kind)
            return (cut.take(whole, place.tensor, size) if cut else whole).reshape(-1)

        if not parameter.requires_grad:
            _set_lower(parameter, share(FROZEN))
            continue
        for kind in (MASTER, *facts["kinds"]):
            value = share(kind)
            for fragment in fragments(engine.ds, parameter):
                fragment.values[kind].copy_(value[fragment.start : fragment.start + fragment.numel])
            if kind == MASTER:
                _set_lower(parameter, value)
    for name, buffer in persistent_buffers(engine.module):
        buffer.copy_(saved.whole(name, BUFFER))
    _restore_schedule(engine.ds, facts["schedule"])
    scaler = _scaler(optimizer)
    for name, value in facts["loss_scale"].items() if scaler is not None else ():
        setattr(scaler, name, value)
    generators = saved.rng(engine.topology.rank) if same_layout else []
    if generators:
        torch.set_rng_state(generators[0])
        if len(generators) > 1 and engine.device.type == "cuda":
            torch.cuda.set_rng_state(generators[1], engine.device)


def _restore_schedule(ds: Any, position: int) -> None:
    schedule = ds.lr_scheduler
    schedule.last_epoch = position
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(position)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _set_lower(parameter: Any, share: torch.Tensor) -> None:
    """The values that the model computes with; under ZeRO-3 this rank's stretch, and all of it where it is kept."""
    if hasattr(parameter, "ds_id"):
        stretch = parameter.ds_tensor
        start = parameter.ds_zero_partition_rank * stretch.ds_numel
        mine = share[start : start + stretch.ds_numel]
        stretch.data.view(-1)[: mine.numel()].copy_(mine)
        if parameter.ds_status.name != "AVAILABLE":
            return
    parameter.data.view(-1).copy_(share)


def _lower_stretches(parameter: Any, replica: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, values) of a parameter that is not trained."""
    if hasattr(parameter, "ds_id"):
        stretch = parameter.ds_tensor
        start = parameter.ds_zero_partition_rank * stretch.ds_numel
        numel = min(stretch.ds_numel, max(0, parameter.ds_numel - start))
        if numel:
            yield start, stretch.detach().view(-1)[:numel]
    elif replica:
        yield 0, parameter.detach().view(-1)


def _key(name: str, kind: str, rank: int, start: int) -> str:
    return SEPARATOR.join((name, kind, str(rank), str(start)))
