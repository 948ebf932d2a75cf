"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math

from conf.schema import SchedulerConfig


def decay_length(scheduler: SchedulerConfig, steps: int) -> int:
    """Steps of WSD's final decay: as given, or a fifth of training."""
    return scheduler.decay_steps if scheduler.decay_steps is not None else max(1, steps // 5)


def lr_factor(scheduler: SchedulerConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based) of `steps`.

    Warm-up is linear and ends on the peak at step `warmup_steps - 1`; the first step is never at rate 0. Cosine:
    Loshchilov & Hutter 2017; WSD (warm-up, stable, linear decay): Hu et al. 2024.
    """
    if step < scheduler.warmup_steps:
        return (step + 1) / scheduler.warmup_steps
    floor = scheduler.min_ratio
    done = min(1.0, (step - scheduler.warmup_steps) / max(1, steps - scheduler.warmup_steps))
    if scheduler.name == "linear":
        return 1.0 - (1.0 - floor) * done
    if scheduler.name == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    if scheduler.name == "wsd":
        decay = decay_length(scheduler, steps)
        return 1.0 - (1.0 - floor) * max(0.0, (step - (steps - decay)) / decay)
    return 1.0
