"""What a rank holds of the training state: flat stretches of parameters in fp32 and of the optimizer's state.

Every layout divides parameters in its own way: ranks of ZeRO hold stretches of them, tensor ranks shares along one
dimension, stages some of the layers. A checkpoint keeps the stretches as they are, with the names of Hugging Face and
their places in the whole; whoever resumes takes the places that are now his (`launch/runtime/checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

MASTER = "parameter"
"""The fp32 weights among the kinds of values of a parameter; the others are the optimizer's (`exp_avg`, …)."""
STEP = "step"
"""The state that counts the optimizer's steps, one number for all."""


@dataclass
class Fragment:
    """A stretch of this rank's tensor share of a parameter, flattened: elements start to start + numel."""

    start: int
    numel: int
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    """Kind → (numel,) view into the engine's memory."""
    replicated: bool = False
    """Every data rank holds the same."""


class StateError(RuntimeError):
    """The engine keeps its state in a way that is not known here."""


def fragments(ds: Any, parameter: nn.Parameter) -> list[Fragment]:
    """The stretches of a trainable parameter that this rank's optimizer updates (deepspeed 0.19.8).

    Raises StateError for an optimizer that keeps them elsewhere.
    """
    optimizer = ds.optimizer
    if hasattr(parameter, "ds_id"):
        return _stage3(optimizer, parameter)
    if hasattr(parameter, "_hp_mapping"):
        return _stage1_and_2(optimizer, parameter)
    if isinstance(optimizer, torch.optim.Optimizer):  # stage 0: the parameter itself
        return [_fragment(optimizer, parameter, 0, parameter.numel(), 0, True)]
    for lower, master in _master_groups(optimizer):
        at = 0
        for one in lower:
            if one is parameter:
                return [_fragment(optimizer.optimizer, master, at, one.numel(), 0, True)]
            at += one.numel()
    raise StateError(f"{type(optimizer).__name__} does not have this parameter")


def _fragment(
    optimizer: Any, flat: torch.Tensor, at: int, numel: int, start: int, replicated: bool = False
) -> Fragment:
    """Elements `at` to at + numel of a tensor that the optimizer updates, and of its state."""
    values = {MASTER: flat.detach().view(-1)[at : at + numel]}
    for kind, value in optimizer.state.get(flat, {}).items():
        if torch.is_tensor(value) and kind != STEP:
            values[kind] = value.view(-1)[at : at + numel]
    return Fragment(start, numel, values, replicated)


def _stage1_and_2(optimizer: Any, parameter: Any) -> list[Fragment]:
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it is on other ranks
        return []
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    flat, address = flats[mapping.param_group_index], mapping.hp_fragment_address
    return [_fragment(optimizer.optimizer, flat, address.start, address.numel, mapping.lp_fragment_address.start)]


def _stage3(optimizer: Any, parameter: Any) -> list[Fragment]:
    group, at, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    share = parameter.ds_tensor
    start = parameter.ds_zero_partition_rank * share.ds_numel
    numel = min(numel, share.ds_numel, max(0, parameter.ds_numel - start))  # the last ranks' shares end in padding
    if numel == 0:
        return []
    return [_fragment(optimizer.optimizer, optimizer.fp32_partitioned_groups_flat[group], at, numel, start)]


def _master_groups(optimizer: Any) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """(parameters in the model's dtype, their flat or single fp32 tensor) of the engine's wrappers at stage 0."""
    if hasattr(optimizer, "fp32_groups_flat"):
        yield from zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
    elif hasattr(optimizer, "fp32_groups"):
        for lower, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from (([one], master) for one, master in zip(lower, masters, strict=True))
    else:
        raise StateError(f"{type(optimizer).__name__} keeps its fp32 weights in no way that is known")


def optimizer_of(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside the engine's wrapper."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def updated(optimizer: Any) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """The tensors that torch's optimizer updates on this rank, each with the options of its group."""
    inner = optimizer_of(optimizer)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3 hands them over one by one
        groups = [inner.param_groups[optimizer.sub_group_to_group_id[n]]
                  for n in range(len(optimizer.fp32_partitioned_groups_flat))]  # fmt: skip
        return list(zip(optimizer.fp32_partitioned_groups_flat, groups, strict=True))
    return [(tensor, group) for group in inner.param_groups for tensor in group["params"]]


def states(optimizer: Any) -> Iterator[dict[str, Any]]:
    """The state of each tensor that torch's optimizer updates on this rank; empty before the first step."""
    inner = optimizer_of(optimizer)
    for tensor, _ in updated(optimizer):
        yield inner.state.get(tensor, {})


def prepare_state(optimizer: Any, step: float) -> None:
    """Give each tensor the state that the optimizer would make at its first step, with zeros, and set its step.

    What that is, a step of an optimizer of the same kind on a single number tells.
    """
    inner = optimizer_of(optimizer)
    for tensor, group in updated(optimizer):
        if not inner.state.get(tensor):
            inner.state[tensor] = {
                kind: torch.zeros_like(tensor, dtype=value.dtype)
                if torch.is_tensor(value) and kind != STEP
                else (value.clone() if torch.is_tensor(value) else value)
                for kind, value in _first_state(inner, group, tensor).items()
            }
        state = inner.state[tensor]
        for value in state.values():  # a rewind to before the first step: there is nothing to put in their place
            if torch.is_tensor(value):
                value.zero_()
        if torch.is_tensor(state.get(STEP)):
            state[STEP].fill_(step)
        elif STEP in state:
            state[STEP] = type(state[STEP])(step)


def replay_powers(optimizer: Any, step: float) -> None:
    """Bring what the offloaded Adam knows beside its state to a step; the other optimizers know nothing.

    deepspeed 0.19.8: its kernel multiplies the powers of beta up, step by step, and begins with `pow` where a step does
    not follow the last one. That is another rounding: a resumed run would go on almost as the unbroken one.
    """
    inner: Any = optimizer_of(optimizer)
    if not hasattr(inner, "ds_opt_adam"):
        return
    group, nothing = inner.param_groups[0], torch.empty(0)
    for number in range(1, int(step) + 1):
        inner.ds_opt_adam.adam_update(
            inner.opt_id, number, group["lr"], *group["betas"], group["eps"], group["weight_decay"],
            group["bias_correction"], nothing, nothing, nothing, nothing,
        )  # fmt: skip


def _first_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], like: torch.Tensor) -> dict[str, Any]:
    single = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    single.grad = torch.zeros_like(single)
    kind: Any = type(optimizer)  # each has defaults for what a group does not say
    fresh = kind([{**group, "params": [single]}])
    fresh.step()
    return dict(fresh.state[single])
