"""Rules on one key alone: ranges of numbers and lists of legal words."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Any

from conf.batch import Layout
from conf.environment import Environment
from conf.errors import Problem, did_you_mean
from conf.schema import (
    ACCUMULATION_DTYPES,
    BLEU_TOKENS,
    DEVICES,
    EMPTY,
    OFFLOADS,
    OVERLONG,
    PACKINGS,
    PIPELINE_SCHEDULES,
    PRECISIONS,
    SCHEDULES,
    SOURCES,
    TASK_SOURCES,
    TASKS,
    TRACKERS,
    Config,
    SourceConfig,
)


@dataclass(frozen=True)
class Range:
    """low ≤ value ≤ high, or strictly between where `open` is set."""

    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        return self.low < value < self.high if self.open else self.low <= value <= self.high

    def __str__(self) -> str:
        if self.open:
            return f"greater than {self.low:g}" + ("" if math.isinf(self.high) else f" and less than {self.high:g}")
        return f"at least {self.low:g}" + ("" if math.isinf(self.high) else f" and at most {self.high:g}")


ANY_COUNT, SOME, POSITIVE, SHARE = Range(0), Range(1), Range(0, open=True), Range(0, 1)

RANGES: dict[str, Range] = {
    "seed": Range(0, 2**32 - 1),
    "model.dropout": Range(0, 0.999999),
    "data.seq_length": Range(2),
    "data.image_size": Range(1),
    "data.vocab_size": Range(260),
    "data.held_out": Range(0, 1, open=True),
    "data.max_files": Range(2),
    "data.max_dropped": SHARE,
    "data.max_expansion": SOME,
    "data.max_pixels": SOME,
    "data.max_unreadable": SHARE,
    "train.steps": SOME,
    "train.epochs": POSITIVE,
    "train.activation_checkpointing": ANY_COUNT,
    "train.threads": SOME,
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": ANY_COUNT,
    "optimizer.eps": POSITIVE,
    "optimizer.momentum": Range(0, 0.999999),
    "optimizer.gradient_clipping": ANY_COUNT,
    "scheduler.warmup_steps": ANY_COUNT,
    "scheduler.decay_steps": SOME,
    "scheduler.min_ratio": SHARE,
    "precision.loss_scale": ANY_COUNT,
    "precision.initial_scale_power": Range(0, 24),
    "precision.loss_scale_window": SOME,
    "zero.stage": Range(0, 3),
    "zero.reduce_bucket_size": SOME,
    "zero.allgather_bucket_size": SOME,
    "zero.prefetch_bucket_size": ANY_COUNT,
    "zero.param_persistence_threshold": ANY_COUNT,
    "zero.hpz_partition_size": SOME,
    "checkpoint.every": ANY_COUNT,
    "checkpoint.minutes": POSITIVE,
    "checkpoint.keep": SOME,
    "checkpoint.keep_best": ANY_COUNT,
    "checkpoint.grace_s": POSITIVE,
    "faults.spike": Range(1, open=True),
    "faults.bad_steps": SOME,
    "faults.stall_s": ANY_COUNT,
    "eval.every": ANY_COUNT,
    "eval.micro_size": SOME,
    "eval.new_tokens": SOME,
    "eval.patience": SOME,
    "eval.beams": SOME,
    "data.stride": ANY_COUNT,
}
"""Batch sizes and parallel degrees have theirs in conf/batch.py."""

WORDS: dict[str, tuple[str, ...]] = {
    "task": TASKS,
    "device": DEVICES,
    "data.kind": (*TASK_SOURCES, "mixture"),
    "data.overlong": OVERLONG,
    "data.empty": EMPTY,
    "eval.bleu_tokens": BLEU_TOKENS,
    "data.packing": PACKINGS,
    "precision.name": PRECISIONS,
    "precision.accumulation_dtype": ACCUMULATION_DTYPES,
    "scheduler.name": SCHEDULES,
    "parallel.schedule": PIPELINE_SCHEDULES,
    "zero.offload_optimizer": OFFLOADS,
    "zero.offload_param": OFFLOADS,
}

GROUP_OF = {"data.kind": "data", "precision.name": "precision", "scheduler.name": "scheduler"}
"""Where the legal word is better chosen as a group, which also sets the fields that go with it."""


LONGEST_NAME = 200
"""Bytes; file systems take 255, and names of temporary files are longer."""


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(shown(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return str(value)


def changed(section: Any, name: str) -> bool:
    """Whether field `name` of a section differs from the schema's default."""
    default = next(field for field in dataclasses.fields(section) if field.name == name).default
    return getattr(section, name) != default


def ranges(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Counts, sizes, rates and shares are in their range."""
    for key, range_ in RANGES.items():
        value = attrgetter(key)(cfg)
        if value is not None and not range_.holds(value):
            yield Problem(key, shown(value), f"must be {range_}", _nearest(cfg, key, value, range_))


def _nearest(cfg: Config, key: str, value: float, range_: Range) -> str:
    section, name = key.rpartition(".")[::2]
    owner = attrgetter(section)(cfg) if section else cfg
    default = next(field for field in dataclasses.fields(owner) if field.name == name).default
    if range_.open or not math.isfinite(value):
        return f"{key}={shown(default)}" if default is not None else f"{key}=1.0"
    return f"{key}={type(value)(min(max(value, range_.low), range_.high))}"


def words(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Keys with a fixed list of values have one of them."""
    for key, legal in WORDS.items():
        value = attrgetter(key)(cfg)
        if value not in legal:
            near = did_you_mean(value, legal) or legal[0]
            yield Problem(key, value, f"one of {', '.join(legal)}", f"{GROUP_OF.get(key, key)}={near}")
    for index, source in enumerate(cfg.data.mixture):
        if source.kind not in SOURCES:
            near = did_you_mean(source.kind, SOURCES) or SOURCES[0]
            key = f"data.mixture[{index}].kind"
            yield Problem(key, source.kind, f"one of {', '.join(SOURCES)}", f"kind: {near}")


def betas(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Two decay rates, each in [0, 1)."""
    values = cfg.optimizer.betas
    if values is not None and (len(values) != 2 or not all(0 <= beta < 1 for beta in values)):
        yield Problem("optimizer.betas", shown(values), "two numbers, each 0 ≤ β < 1", "optimizer.betas=[0.9,0.95]")


def weights(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Sources of a mixture have a positive weight."""
    for index, source in enumerate(cfg.data.mixture):
        if not POSITIVE.holds(source.weight):
            key = f"data.mixture[{index}].weight"
            yield Problem(key, shown(source.weight), f"must be {POSITIVE}", f"weight: {shown(SourceConfig.weight)}")


def trackers(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Known trackers, each once."""
    for name in cfg.track.to:
        if name not in TRACKERS:
            near = did_you_mean(name, TRACKERS)
            nearest = f"track.to=[{near}]" if near else "track=none"
            yield Problem("track.to", shown(cfg.track.to), f"{name} is not one of {', '.join(TRACKERS)}", nearest)
    if len(set(cfg.track.to)) < len(cfg.track.to):
        once = shown(list(dict.fromkeys(cfg.track.to)))
        yield Problem("track.to", shown(cfg.track.to), "each tracker once", f"track.to={once}")


def named(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A name is one of a folder below `runs`, not a way out of it."""
    parts = PurePosixPath(cfg.name).parts
    plain = re.sub(r"[^\w.+-]+", "_", parts[-1] if parts else "").strip(".")
    nearest = f"name={plain or 'run'}"
    if not parts or ".." in parts or cfg.name.startswith(("/", "~")):
        rule = "a name stands for a folder in `runs`, it leads nowhere else (that is for run_dir)"
        yield Problem("name", cfg.name, rule, nearest)
    elif not cfg.name.isprintable() or any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        rule = f"a name is of characters that can be printed, {LONGEST_NAME} bytes at most"
        yield Problem("name", repr(cfg.name)[1:61], rule, nearest[:60])


RULES = (ranges, words, named, betas, weights, trackers)
