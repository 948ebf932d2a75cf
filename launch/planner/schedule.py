"""The bubble of a pipeline: how long its stages wait for each other."""

from __future__ import annotations

from collections.abc import Sequence


def bubble(costs: Sequence[float], micro_batches: int) -> float:
    """Mean idle share (0 to 1) of the stages in a step of 1F1B (Narayanan et al. 2019).

    costs: of one micro-batch on each stage. With equal stages it is (p-1)/(m+p-1); with unequal ones all wait for the
    slowest: the step takes (m-1) of its passes, and the passes of one micro-batch through all stages.
    """
    step = (micro_batches - 1) * max(costs) + sum(costs)
    return 1.0 - micro_batches * sum(costs) / (len(costs) * step) if step else 0.0


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at once: it is that many ahead of its first backward pass."""
    return min(micro_batches, stages - stage)
