"""Which checkpoint a run continues from, and what may differ from the run that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.batch import Layout
from conf.errors import Problem, RequestError
from conf.rules_values import shown
from conf.schema import Config, SourceConfig
from launch.runtime.checkpoint import Checkpoint, all_of, newest, read
from recipes.data.store import ROWS

Say = Callable[[str], None]

FIXED = ("task", "seed", "model.", "data.", "batch.global_size", "optimizer.name")
"""What makes a run that run: model, rows and their order, the kind of optimizer's state."""
FREE = (
    "data.cache_dir", "data.max_dropped", "data.max_unreadable", "data.max_expansion", "data.max_pixels",
    "model.attention",
)  # fmt: skip
LENGTH = ("train.steps", "train.epochs")
"""What the learning rate's schedule ends with."""
PLACES = ("path", "eval_path", "target_path", "eval_target_path")
"""Keys of a source of rows that say where they are; what they are is compared by their content."""
SILENT = ("run_dir", "resume", "overwrite", "name")
"""Different by nature, and not worth a line."""


def find(cfg: Config, run_dir: Path, say: Say) -> Checkpoint | None:
    """The checkpoint that `resume` means, whole; None for `auto` where there is none, and without `resume`.

    Raises RequestError for a path without a checkpoint, or with a damaged one.
    """
    if cfg.resume is None:
        return None
    if cfg.resume == "auto":
        folder = run_dir / "checkpoints"
        found = newest(folder, say)
        if found is None and (entry := next((entry for entry, _ in all_of(folder)), None)):
            rule = "every checkpoint of this run is damaged, and training does not start anew unasked"
            nearest = "overwrite=true without resume for a new run, or resume=PATH of another one"
            raise RequestError(Problem("resume", f"auto ({entry})", rule, nearest))
        if found is None:
            say(f"resume=auto: no whole checkpoint in {folder}, so training starts at step 0")
        return found
    path = Path(cfg.resume).expanduser()
    if (path / "checkpoints").is_dir():
        found = newest(path / "checkpoints", say)
        if found is None:
            raise RequestError(Problem("resume", cfg.resume, "no whole checkpoint in this run", "resume=null"))
        return found
    found = read(path)
    if damage := found.damage():
        older = newest(path.parent, lambda text: None)
        nearest = f"resume={older.folder}" if older else "resume=null"
        raise RequestError(Problem("resume", cfg.resume, "; ".join(damage), nearest))
    return found


def check(found: Checkpoint, cfg: Config, fingerprint: str) -> list[str]:
    """What differs from the run that wrote it and is taken, a line each.

    Raises RequestError for what makes it another run: model, data, order of the rows, optimizer.
    """
    problems, taken = [], []
    for key, before, now in differences(as_of_now(found.manifest["config"]), asdict(cfg)):
        if key in SILENT:
            continue
        if is_gone(key):
            taken.append(f"{key}: {shown(before)} -> this version has no such key")
        elif key.startswith(FIXED) and not (key in FREE or _only_moved(key, before, now)):
            rule = f"the run that is resumed had {shown(before)}"
            problems.append(Problem(key, shown(now), rule, f"{key}={shown(before)}, or a new run (resume=null)"))
        else:
            taken.append(f"{key}: {shown(before)} -> {shown(now)}")
            if key in LENGTH and cfg.scheduler.name != "constant":
                taken[-1] += f"; the learning rate goes on as in a run of that length (scheduler={cfg.scheduler.name})"
    if not str(found.manifest["data"]).startswith(ROWS):
        taken.append("data: an earlier version's checkpoint, which does not say which rows it was trained on")
    elif not problems and found.manifest["data"] != fingerprint:
        rule = "the rows are not those that the resumed run was trained on"
        problems.append(Problem("data", fingerprint, rule, "the data as they were, or a new run (resume=null)"))
    if problems:
        raise RequestError(problems)
    return taken


def as_of_now(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint, with what this version's other keys do when nobody sets them.

    They are all that an earlier version did: a key changes nothing unless it is asked for.
    """
    return _filled(saved, asdict(Config()))


def _filled(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **saved}
    for name, default in defaults.items():
        value = filled[name]
        if isinstance(default, Mapping) and default and isinstance(value, Mapping):
            filled[name] = _filled(value, default)
        elif name == "mixture":
            known = asdict(SourceConfig())
            filled[name] = [{k: v for k, v in {**known, **source}.items() if k in known} for source in value or ()]
    return filled


def is_gone(key: str) -> bool:
    """Whether a key of a saved configuration is none of this version's."""
    there: Any = asdict(Config())
    for name in key.split("."):
        if not there:  # free: what the model's class or the engine takes
            return False
        if name not in there:
            return True
        there = there[name]
    return False


def config_of(found: Checkpoint, say: Say) -> Config:
    """The configuration that a checkpoint was written with; `say` hears of keys that this version does not have."""
    from omegaconf import OmegaConf

    def kept(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        left = {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            if is_gone(key):
                say(f"{key}: {shown(value)}: this version has no such key")
            else:
                left[name] = kept(value, f"{key}.") if isinstance(value, Mapping) else value
        return left

    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), kept(as_of_now(found.manifest["config"]))))
    assert isinstance(cfg, Config)
    return cfg


def _only_moved(key: str, before: Any, now: Any) -> bool:
    """Whether two values of a key of `data` differ in no more than where the rows lie."""
    if key in [f"data.{name}" for name in PLACES]:
        return True
    if key != "data.mixture" or len(before) != len(now):
        return False
    kept = [[{k: v for k, v in source.items() if k not in PLACES} for source in sources] for sources in (before, now)]
    return kept[0] == kept[1]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) of what differs between two configurations as plain values."""
    for name in [*before, *(name for name in now if name not in before)]:
        key, old, new = f"{prefix}{name}", before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{key}.")
        elif _plain(old) != _plain(new):
            yield key, old, new


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def same_layout(found: Checkpoint, layout: Layout) -> bool:
    """Whether every rank has the place that it had."""
    saved = found.manifest["layout"]
    return all(saved[axis] == getattr(layout, axis) for axis in saved)
