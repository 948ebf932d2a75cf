"""Rules on the run: its length, its schedule, what it shows, and the directory it writes to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from conf.batch import Layout
from conf.environment import Environment
from conf.errors import Problem, did_you_mean
from conf.rules_values import changed, shown
from conf.schema import BAD_STEPS, Config

RUN_FILES = (
    "config.yaml", "ds_config.json", "metrics.jsonl", "metrics.csv", "evaluations.csv", "summary.json", "loss.png",
    "predictions.jsonl", "bad_steps.jsonl",
)  # fmt: skip
RUN_FOLDERS = ("model", "logs", "tensorboard", "checkpoints")
"""What a run writes into its directory."""
COMPILE_OFF = "train.compile=false"
RESUMED = ("adam", "adamw", "sgd", "lion", "adagrad")
"""Optimizers whose state has the shape of the parameters: any layout can take it over."""


def length(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A run ends after a number of steps or of epochs."""
    steps, epochs = cfg.train.steps, cfg.train.epochs
    if steps is None and epochs is None:
        yield Problem("train.steps", "null", "say how long: train.steps or train.epochs", "train.steps=1000")
    elif steps is not None and epochs is not None:
        rule = f"train.steps={steps} is given too, and a run has one length"
        yield Problem("train.epochs", shown(epochs), rule, "train.epochs=null, or train.steps=null")


def schedule(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Warm-up and decay fit into training, and only the schedules that have them take their keys."""
    scheduler, steps = cfg.scheduler, cfg.train.steps
    if scheduler.name != "wsd" and scheduler.decay_steps is not None:
        rule = f"only the wsd schedule has a final decay, not {scheduler.name}"
        yield Problem("scheduler.decay_steps", str(scheduler.decay_steps), rule, "scheduler=wsd")
    if scheduler.name == "constant" and scheduler.min_ratio != 0:
        rule = "a constant rate never falls"
        nearest = "scheduler=linear, or scheduler.min_ratio=0"
        yield Problem("scheduler.min_ratio", shown(scheduler.min_ratio), rule, nearest)
    if steps is None or steps < 1:
        return
    warmup = scheduler.warmup_steps
    if warmup > steps:
        rule = f"warm-up is longer than training (train.steps={steps})"
        yield Problem("scheduler.warmup_steps", str(warmup), rule, f"scheduler.warmup_steps={max(1, steps // 10)}")
    elif scheduler.name == "wsd":
        decay = scheduler.decay_steps if scheduler.decay_steps is not None else max(1, steps // 5)
        if warmup + decay > steps:
            rule = f"warm-up {warmup} and decay {decay} are together longer than training (train.steps={steps})"
            fitting = max(1, steps - warmup)
            nearest = f"scheduler.decay_steps={fitting}"
            if warmup + fitting > steps:
                nearest = f"scheduler.warmup_steps={max(0, steps - decay)}"
            yield Problem("scheduler.decay_steps", shown(scheduler.decay_steps), rule, nearest)


def device(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """device=cuda needs a GPU, and a torch that can use it."""
    if cfg.device == "cuda" and env.device != "cuda":
        yield Problem("device", "cuda", "there is no GPU here that the installed torch can use", "device=auto")


def compiling(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """torch.compile writes C++ on CPUs, and for GPUs Triton compiles what launches its kernels."""
    if not cfg.train.compile:
        return
    if not env.compiler:
        what = "on a CPU" if env.device == "cpu" else "for what launches kernels on a GPU"
        yield Problem("train.compile", "true", f"torch.compile needs a C++ compiler {what} (c++, or CXX)", COMPILE_OFF)
    elif env.device == "cuda" and not env.python_headers:
        rule = "torch.compile needs the headers of this Python (Python.h) for what launches kernels on a GPU"
        yield Problem("train.compile", "true", rule, COMPILE_OFF)


def without_effect(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Keys that would change nothing are refused, so that nobody believes they did."""
    if cfg.eval.prompt is None and changed(cfg.eval, "new_tokens") and cfg.task != "translation":
        rule = "without a prompt nothing is completed"
        yield Problem("eval.new_tokens", str(cfg.eval.new_tokens), rule, "eval.prompt='Once upon a time'")
    if changed(cfg.track, "project") and not {"wandb", "mlflow"} & set(cfg.track.to):
        rule = "only wandb and mlflow have projects"
        yield Problem("track.project", cfg.track.project, rule, "track=wandb, or track=mlflow")


def installed_trackers(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """W&B and MLflow are not in requirements.txt: who tracks with them has them."""
    for name in cfg.track.to:
        if name in ("tensorboard", "wandb", "mlflow") and name not in env.trackers:
            rule = f"the Python package {name} is not installed"
            yield Problem("track.to", shown(cfg.track.to), rule, f"pip install {name}, or track=csv")


def unsaveable(cfg: Config) -> tuple[str, str] | None:
    """(why the state of such a run cannot be resumed, what works instead), or None."""
    if cfg.optimizer.name.lower() not in RESUMED:
        rule = f"the state of {cfg.optimizer.name} cannot be taken over by another layout; {', '.join(RESUMED)} can"
        return rule, "optimizer=adamw"
    if "nvme" in (cfg.zero.offload_optimizer, cfg.zero.offload_param):
        return "state that is swapped to NVMe is not read", "zero=stage3_offload"
    if cfg.zero.hpz_partition_size > 1:
        return "the second shards of ZeRO++ (zero.hpz_partition_size) are not filled at resume", "zero=stage3"
    return None


def checkpoints(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """What is saved can be resumed, and what stays of it is said where something is saved."""
    saving = cfg.checkpoint
    regular = bool(saving.every) or saving.minutes is not None
    for key in ("keep", "keep_best"):
        if changed(saving, key) and not regular:
            yield Problem(f"checkpoint.{key}", str(getattr(saving, key)), "none is written", "checkpoint.every=50")
    if saving.keep_best and cfg.eval.metric is None:
        rule = "no metric says which is best"
        yield Problem("checkpoint.keep_best", str(saving.keep_best), rule, "eval.every=50 eval.metric=loss")
    wanted: dict[str, object] = {
        "resume": cfg.resume,
        "checkpoint.every": saving.every or None,
        "checkpoint.minutes": saving.minutes,
    }
    asked = next((key for key, value in wanted.items() if value is not None), None)
    if asked is not None and (problem := unsaveable(cfg)) is not None:
        off = "0" if asked == "checkpoint.every" else "null"
        yield Problem(asked, str(wanted[asked]), problem[0], f"{asked}={off}, or {problem[1]}")
    if cfg.resume is not None and cfg.overwrite:
        yield Problem("overwrite", "true", "resume continues the run that overwrite would delete", "overwrite=false")


def faults(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """What is done about a bad step, and keys that only some answers have."""
    answer, key = cfg.faults.on_bad_step, "faults.on_bad_step"
    if answer not in BAD_STEPS:
        near = did_you_mean(answer, BAD_STEPS) or BAD_STEPS[0]
        yield Problem(key, answer, f"must be one of {', '.join(BAD_STEPS)}", f"{key}={near}")
    elif answer == "rewind" and not cfg.checkpoint.every and cfg.checkpoint.minutes is None:
        yield Problem(key, answer, "without checkpoints there is nothing to go back to", "checkpoint.every=50")
    if answer == "stop" and changed(cfg.faults, "bad_steps"):
        yield Problem("faults.bad_steps", str(cfg.faults.bad_steps), "the first one stops the run", f"{key}=skip")


def run_dir(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """The run directory can be written and holds nothing that would be lost or mixed up."""
    try:
        path = Path(cfg.run_dir).expanduser()
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a user that does not exist, a null byte
        reason = getattr(error, "strerror", None) or str(error)
        yield Problem(
            "run_dir", cfg.run_dir[:80], f"is no path of this system: {reason}", f"run_dir=runs/{cfg.name[:40]}"
        )
        return
    if not existing.is_dir():
        yield Problem("run_dir", cfg.run_dir, f"{existing} is a file, not a folder", f"run_dir={_free(existing)}")
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Problem("run_dir", cfg.run_dir, f"{existing} cannot be written", "run_dir=FOLDER on a writable disk")
        return
    if not path.is_dir():
        return
    if not _is_run(path) and _foreign(path):
        rule = f"a folder with other things in it ({', '.join(_foreign(path)[:3])}) is not a run directory"
        yield Problem("run_dir", cfg.run_dir, rule, f"run_dir={path / 'run'}")
    elif not cfg.overwrite and not _continues(cfg, path):
        if (path / "summary.json").is_file():
            rule = "holds a finished run, which is never overwritten unasked"
            yield Problem("run_dir", cfg.run_dir, rule, f"run_dir={_free(path)}, or overwrite=true")
        elif (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
            rule = "holds an unfinished run, which is never overwritten unasked"
            yield Problem("run_dir", cfg.run_dir, rule, f"resume=auto, run_dir={_free(path)}, or overwrite=true")


def _continues(cfg: Config, path: Path) -> bool:
    """Whether the run in this folder is the one that is resumed."""
    if cfg.resume is None or cfg.resume == "auto":
        return cfg.resume == "auto"
    return path.resolve() in (Path(cfg.resume).expanduser().resolve(), *Path(cfg.resume).expanduser().resolve().parents)


def _is_run(path: Path) -> bool:
    names = ("summary.json", "metrics.jsonl", "ds_config.json", "checkpoints")
    return any((path / name).exists() for name in names)


def _foreign(path: Path) -> list[str]:
    """Visible entries of a folder that no run writes."""
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    return [name for name in names if name not in (*RUN_FILES, *RUN_FOLDERS, "lost+found")]


def _free(path: Path) -> Path:
    """`path` with the first number behind it that no file or folder has."""
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")


def best(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A best model is chosen among several evaluations, and waited for by a metric."""
    metric, every = cfg.eval.metric, cfg.eval.every
    if metric is not None and not every:
        often = max(1, min(50, (cfg.train.steps or 100) // 2))
        yield Problem("eval.metric", metric, "there is one evaluation, and so no choice", f"eval.every={often}")
    if metric is not None and every and cfg.train.steps and every >= cfg.train.steps > 1:
        rule = f"after train.steps={cfg.train.steps} there is one evaluation, and so no choice"
        yield Problem("eval.every", str(every), rule, f"eval.every={cfg.train.steps // 2}")
    if cfg.eval.patience is not None and metric is None:
        yield Problem("eval.patience", str(cfg.eval.patience), "no metric says what is better", "eval.metric=loss")
    if cfg.eval.beams != 1 and cfg.task != "translation":
        yield Problem("eval.beams", str(cfg.eval.beams), f"{cfg.task} does not search", "eval.beams=1")
    if changed(cfg.eval, "bleu_tokens") and cfg.task != "translation":
        yield Problem("eval.bleu_tokens", cfg.eval.bleu_tokens, f"{cfg.task} has no BLEU", "eval.bleu_tokens=13a")


RULES = (best, length, schedule, device, compiling, without_effect, installed_trackers, checkpoints, faults, run_dir)
