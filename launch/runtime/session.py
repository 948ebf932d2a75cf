"""One training run from a checked request to a closed run directory."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.batch import Layout, batch_line, sizes
from conf.compose import to_yaml
from conf.errors import Problem, RequestError
from conf.schema import Config
from launch.runtime import processes
from launch.runtime.console import Bar, Terminal
from launch.runtime.ds_config import ds_config
from launch.runtime.metrics import TRACKERS, MetricsLog
from launch.runtime.request import Request
from launch.runtime.run_dir import RunDir
from recipes import recipe_class
from recipes.base import Prediction, Recipe

if TYPE_CHECKING:
    from launch.runtime.checkpoint import Checkpoint
    from launch.runtime.engine import Engine
    from launch.runtime.loop import Progress

NOT_SHOWN = ("step", "split", "loss", "eval_s", "bits_per_token")


def prepare(request: Request, terminal: Terminal) -> Recipe:
    """Read, tokenise and cache the rows before any process group exists: one rank works, the others wait for it."""
    recipe = recipe_class(request.cfg.task)(request.cfg)
    bars: dict[str, Bar] = {}

    def progress(done: int, total: int, what: str) -> None:
        bar = bars.setdefault(what, Bar(terminal, what, total))
        bar.update(done, total=total)
        if done >= total:
            bar.close()

    try:
        recipe.prepare(progress)
    finally:
        for bar in bars.values():
            bar.close()
    return recipe


def optimizer_steps(cfg: Config, samples: int) -> int:
    """Optimizer steps of the run: `train.steps`, or enough global batches for `train.epochs` passes over `samples`.

    Raises RequestError when the warm-up is longer: with epochs that shows only once the rows are packed.
    """
    if cfg.train.steps is not None:
        return cfg.train.steps
    assert cfg.train.epochs is not None  # a rule: one of the two is set
    steps = max(1, math.ceil(cfg.train.epochs * samples / sizes(cfg.batch)[0]))
    warmup = cfg.scheduler.warmup_steps
    if warmup > steps:
        rule = f"the warm-up is longer than training, which is {steps} steps (train.epochs={cfg.train.epochs:g})"
        nearest = f"scheduler.warmup_steps={steps // 10}, or more epochs"
        raise RequestError(Problem("scheduler.warmup_steps", str(warmup), rule, nearest))
    return steps


def train(request: Request, terminal: Terminal) -> dict[str, Any]:
    """Train as requested and return the summary (the content of summary.json). All ranks call it together."""
    cfg, layout, ranks = request.cfg, request.layout, request.ranks
    processes.set_environment(ranks, request.device)
    recipe = prepare(request, terminal)
    steps = optimizer_steps(cfg, len(recipe.train))
    run_dir = RunDir(cfg.run_dir)
    engine_config = ds_config(cfg, layout, request.device)
    run_dir.create(cfg.overwrite and ranks.first and cfg.resume is None)
    if ranks.first:
        run_dir.claim(layout.world)
    terminal.say(f"{cfg.name}: {batch_line(cfg.batch, layout)}")
    if (said := recipe.said()) is not None:
        terminal.say(said)
    terminal.say("starting the engine (a machine's first run compiles a kernel: about a minute)")
    terminal.capture(run_dir.logs / f"rank_{ranks.rank}.log")
    device = processes.join(ranks, request.device, cfg.train.threads)
    try:
        return _train(request, recipe, steps, run_dir, engine_config, device, terminal)
    finally:
        processes.leave()
        run_dir.leave()


def _train(
    request: Request,
    recipe: Recipe,
    steps: int,
    run_dir: RunDir,
    engine_config: dict[str, Any],
    device: Any,
    terminal: Terminal,
) -> dict[str, Any]:
    from launch.runtime import loop
    from launch.runtime.checkpoint import Checkpoints
    from launch.runtime.engine import Evaluation
    from launch.runtime.export import export
    from launch.runtime.interruption import InterruptedRunError, Wishes
    from launch.runtime.plots import plot_loss
    from launch.runtime.staged import make_engine

    cfg, layout, first = request.cfg, request.layout, request.ranks.first
    fingerprint = str(recipe.report["fingerprint"])
    found = _resumed(request, run_dir, fingerprint, terminal)
    if first:
        run_dir.write_text("config.yaml", to_yaml(cfg))
        run_dir.write_json("ds_config.json", engine_config)
    engine = make_engine(recipe, cfg, layout, engine_config, device, steps)
    progress = loop.Progress()
    if found is not None:
        progress = restored(engine, found, layout)
    trackers = [TRACKERS[name](run_dir.path, cfg, asdict(cfg)) for name in cfg.track.to] if first else []
    metrics = MetricsLog(run_dir.metrics, trackers, progress.step if found else None) if first else None
    bar = Bar(terminal, "training", steps)
    checkpoints = Checkpoints(run_dir.path, cfg.checkpoint.keep, asdict(cfg), fingerprint)
    wishes = Wishes()

    def log(row: loop.Row) -> None:
        if metrics is not None:
            metrics.log(row)
        if "split" in row:
            terminal.say(f"step {row['step']}: held-out loss {row['loss']:.4f}" + _others(row))
        else:
            bar.update(row["step"], f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tokens/s")

    def after_step(progress: loop.Progress) -> bool:
        stop, save = engine.any_of(wishes.stop, wishes.save)
        wishes.save = False
        every, last = cfg.checkpoint.every, progress.step == steps
        saved = None
        if save or stop or (every and (last or progress.step % every == 0)):
            saved = checkpoints.save(engine, progress.step, asdict(progress))
            terminal.say(f"step {progress.step}: " + (f"no checkpoint: {saved}" if saved else "checkpoint"))
        if stop and not last:
            raise InterruptedRunError(progress.step, steps, saved is None)
        return True

    predictions: list[Prediction] = []

    def keep(evaluation: Evaluation) -> None:
        export(engine, recipe, run_dir.model, first)
        predictions[:] = evaluation.predictions
        if first and predictions:
            rows = ({key: value for key, value in row.items() if not key.startswith("_")} for row in predictions)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            run_dir.write_text("predictions.jsonl", "".join(lines))

    started = time.perf_counter()
    try:
        with wishes.heard():
            outcome = loop.run(engine, recipe, cfg, layout, request.ranks.rank, steps, log, keep, progress, after_step)
    finally:
        bar.close()
        if metrics is not None:
            metrics.close()
    seconds = time.perf_counter() - started
    summary = {
        "name": cfg.name,
        "steps": outcome.step,
        "tokens": outcome.tokens,
        "train_s": round(seconds, 1),
        "world_size": layout.world,
        "held_out_before": outcome.first,
        "held_out": outcome.last,
        "kept_at_step": outcome.kept_at,
        "model": str(run_dir.model),
    }
    if first:
        loss_png = plot_loss(run_dir.path)
        summary["sample"] = recipe.sample(run_dir.model)
        run_dir.write_json("summary.json", {**summary, **(recipe.details(predictions) if predictions else {})})
        terminal.say(_closing(summary, loss_png))
    return summary


def _resumed(request: Request, run_dir: RunDir, fingerprint: str, terminal: Terminal) -> Checkpoint | None:
    """The checkpoint to continue from, the same on all ranks; a collective call. Says what it is and what differs."""
    from torch import distributed as dist

    from launch.runtime import resume
    from launch.runtime.checkpoint import Checkpoint

    answer: list[Any] = [None]
    if request.ranks.first:
        try:
            found = resume.find(request.cfg, run_dir.path, terminal.say)
            if found is not None:
                taken = resume.check(found, request.cfg, fingerprint)
                terminal.say(f"resumes after step {found.step}, from {found.folder}")
                for line in taken:
                    terminal.say(f"  {line}")
                answer = [(found.folder, found.manifest)]
        except RequestError as error:
            answer = [error]
    if request.layout.world > 1:
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], RequestError):
        raise answer[0]
    return Checkpoint(*answer[0]) if answer[0] is not None else None


def restored(engine: Engine, found: Checkpoint, layout: Layout) -> Progress:
    """Bring a new engine to the state of a checkpoint, and say how far the run is."""
    from launch.runtime.loop import Progress
    from launch.runtime.resume import same_layout
    from launch.runtime.state import SavedState, restore

    manifest = found.manifest
    saved = SavedState(found.files, manifest["tensors"], manifest["layout"]["tensor"])
    restore(engine, saved, manifest["state"], same_layout(found, layout))
    return Progress(**manifest["progress"])


def _others(row: dict[str, Any]) -> str:
    """The metrics of an evaluation besides its loss, as a person reads them."""
    shown = {name: value for name, value in row.items() if name not in NOT_SHOWN}
    return "".join(
        f", {name} {value:,.1f}" if name == "perplexity" else f", {name} {value:.4g}" for name, value in shown.items()
    )


def _closing(summary: dict[str, Any], loss_png: Path) -> str:
    before, after = summary["held_out_before"], summary["held_out"]
    lines = [
        "",
        f"held-out loss {before['loss']:.4f} -> {after['loss']:.4f}{_others(after)}"
        f"   ({summary['tokens']:,} tokens in {summary['train_s']:.0f} s)",
        f"curve  {loss_png}",
        f"model  {summary['model']}",
    ]
    if summary["sample"] is not None:
        lines += ["", "the exported model continues:", *(f"  | {line}" for line in summary["sample"].splitlines())]
    return "\n".join(lines)
