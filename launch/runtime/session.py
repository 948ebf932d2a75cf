"""One training run from a checked request to a closed run directory."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.batch import Layout, batch_line, sizes
from conf.compose import to_yaml
from conf.errors import Problem, RequestError
from conf.rules_run import unsaveable
from conf.schema import Config
from launch.runtime import parents, processes
from launch.runtime.closing import closing, others
from launch.runtime.console import STARTING, Bar, Terminal
from launch.runtime.ds_config import ds_config
from launch.runtime.metrics import TRACKERS, MetricsLog, read_rows
from launch.runtime.request import Request
from launch.runtime.run_dir import DiskError, RunDir, json_lines
from launch.runtime.watchdog import Watchdog
from recipes import counted, durable, hub, recipe_class
from recipes.base import Prediction, Recipe

if TYPE_CHECKING:
    from launch.runtime.checkpoint import Checkpoint
    from launch.runtime.engine import Engine, Evaluation
    from launch.runtime.interruption import Wishes
    from launch.runtime.loop import Progress
    from launch.runtime.out_of_memory import Phase
    from launch.runtime.saving import Saving

THROUGH = "what follows the summary"
"""What a run does (`Phase.doing`) once everything is written but its sample."""


def prepare(
    request: Request, terminal: Terminal, finished: bool = False, beat: Callable[[str], None] = lambda what: None
) -> Recipe:
    """Read, tokenise and cache the rows before any process group exists: one rank works, the others wait for it.

    finished: of the recipe. beat: the work goes on.
    """
    recipe = recipe_class(request.cfg.task)(request.cfg)
    recipe.finished = finished
    bars: dict[str, Bar] = {}

    def progress(done: int, total: int, what: str) -> None:
        beat(what)
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


def train(request: Request, terminal: Terminal, wishes: Wishes | None = None) -> dict[str, Any]:
    """Train as requested and return the summary (the content of summary.json). All ranks call it together.

    wishes: of signals, where the command hears them from its start. Raises InterruptedRunError where one asked it to
    stop.
    """
    from launch.runtime.caretaker import too_late
    from launch.runtime.interruption import InterruptedRunError, Wishes
    from launch.runtime.out_of_memory import Phase, check_memory, explaining

    cfg, layout, ranks = request.cfg, request.layout, request.ranks
    processes.set_environment(ranks, request.device)
    run_dir, phase = RunDir(cfg.run_dir), Phase()

    def complain(text: str) -> None:
        print(text, file=terminal.error, flush=True)

    def late() -> int:
        if phase.doing == THROUGH:
            return 0
        return too_late(run_dir.checkpoints, cfg.checkpoint.grace_s, complain if ranks.first else lambda text: None)

    wishes = wishes or Wishes()
    wishes.limit(cfg.checkpoint.grace_s, late)
    launcher = parents.Launcher() if parents.LAUNCHED else None
    watchdog = Watchdog(run_dir.logs, ranks.rank, layout.world, cfg.faults.stall_s, complain, launcher)
    with wishes.heard(), watchdog:
        watchdog.prepares("the preparation of the data")
        recipe = prepare(request, terminal, beat=watchdog.prepares)
        check_memory(request, recipe)
        steps = optimizer_steps(cfg, len(recipe.train))
        run_dir.create()
        if ranks.first:
            run_dir.claim(layout.world)
        terminal.say(f"{cfg.name}: {batch_line(cfg.batch, layout)}")
        if (said := recipe.said()) is not None:
            terminal.say(said)
        compiles = cfg.zero.offload_optimizer != "none"
        terminal.say("starting the engine" + (" (a machine's first such run compiles a kernel)" if compiles else ""))
        log = run_dir.logs / f"rank_{ranks.rank}.log"
        # Only rank 0 knows that the folder is this run's: until they meet, the others leave the logs there alone.
        terminal.capture(log if ranks.first else log.with_name(f".{log.name}{STARTING}"))
        watchdog.beat("the meeting of the ranks")
        device = processes.join(ranks, request.device, cfg.train.threads, cfg.faults.stall_s)
        terminal.log_is(log)
        processes.wait_for_others(cfg.faults.stall_s)
        watchdog.beat("the start of the engine")
        alone = True
        try:
            with explaining(phase, request, recipe, device):
                summary = _train(request, recipe, steps, run_dir, device, terminal, wishes, watchdog, phase)
            alone = False
            return summary
        except InterruptedRunError:
            alone = False
            raise
        finally:
            processes.leave(broken=alone)
            run_dir.leave()


def _train(
    request: Request,
    recipe: Recipe,
    steps: int,
    run_dir: RunDir,
    device: Any,
    terminal: Terminal,
    wishes: Wishes,
    watchdog: Watchdog,
    phase: Phase,
) -> dict[str, Any]:
    from launch.runtime import fingerprint, loop
    from launch.runtime.caretaker import Caretaker, StopAsked
    from launch.runtime.engine import BadStepError
    from launch.runtime.export import export
    from launch.runtime.plots import plot_loss
    from launch.runtime.saving import Saving
    from launch.runtime.staged import make_engine

    cfg, layout, first = request.cfg, request.layout, request.ranks.first
    engine_config = ds_config(cfg, layout, request.device)
    data = str(recipe.report["fingerprint"])
    fingerprint.compare(fingerprint.of_start(cfg, data), "request, code and data")
    saving = Saving(run_dir.checkpoints, cfg.checkpoint.keep, cfg.checkpoint.keep_best, asdict(cfg), data, terminal.say)
    if first:
        saving.sweep()
        durable.recover(run_dir.model)
    found = _resumed(request, run_dir, data, terminal)
    phase.doing = "building the model and the engine"
    engine = phase.engine = make_engine(recipe, cfg, layout, engine_config, device, steps)
    processes.wait_for_others(cfg.faults.stall_s)
    fingerprint.compare({"parameters": fingerprint.parameters(engine)}, "model")
    progress = loop.Progress()
    if found is not None:
        progress = restored(engine, found, layout)
        stale = first and progress.best is not None and _kept(run_dir.metrics, cfg, recipe) != progress.kept_at
        _look_again(progress, found, cfg, run_dir, steps, engine.any_of(stale)[0])
        if found.folder.parent.resolve() == run_dir.checkpoints.resolve():
            saving.last = found.step
    if first:  # nothing is refused from here on: an earlier run may go
        if cfg.overwrite and cfg.resume is None:
            run_dir.clear()
        run_dir.write("config.yaml", to_yaml(cfg))
        run_dir.write_json("ds_config.json", engine_config)
    trackers = [TRACKERS[name](run_dir.path, cfg, asdict(cfg)) for name in cfg.track.to] if first else []
    metrics = MetricsLog(run_dir.metrics, trackers, progress.rows, progress.step, terminal.say) if first else None
    if metrics is not None:
        saving.before_publishing = metrics.settle
    bar, unit = Bar(terminal, "training", steps), counted(cfg)

    def beat(doing: str) -> None:
        phase.doing = doing
        watchdog.beat(doing)

    caretaker = Caretaker(
        engine, saving, wishes, cfg.checkpoint, steps, unsaveable(cfg) is None,
        recipe.METRICS.get(cfg.eval.metric or ""), beat,
    )  # fmt: skip
    predictions: list[Prediction] = []

    def log(row: loop.Row) -> None:
        if metrics is not None:
            metrics.log(row)
        if "split" in row:
            terminal.say(f"step {row['step']}: held-out loss {row['loss']:.4f}" + others(row))
        elif row["loss"] is not None:
            bar.update(row["step"], f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} {unit}/s")

    def bad_step(row: loop.Row) -> None:
        terminal.say(f"step {row['step']}: {row['what']}; samples {row['samples']}: {row['action']}")
        if first:
            try:
                run_dir.append_json("bad_steps.jsonl", row)
            except OSError as error:
                terminal.say(f"bad_steps.jsonl cannot be written: {error}")

    def keep(evaluation: Evaluation) -> None:
        # The row of its evaluation first: by the rows a resume knows of which step the model is.
        ready = metrics.settle if metrics is not None else lambda: None
        problem = export(engine, recipe, run_dir.model, first, check=partial(caretaker.look, "the export"), ready=ready)
        if engine.any_of(problem is not None)[0]:
            what = f"the model could not be written: {durable.told(problem) if problem else 'see rank 0'}"
            if progress.step == steps:
                raise DiskError(f"{what}; resume=auto tries again")
            terminal.say(f"step {progress.step}: {what}")
            progress.best = None  # the next evaluation is the best again
            return
        predictions[:] = evaluation.predictions
        if first and predictions:
            run_dir.write("predictions.jsonl", json_lines(predictions))

    def run_on() -> loop.Progress:
        return loop.run(
            engine, recipe, cfg, layout, request.ranks.rank, steps, log, keep, progress, caretaker.after_step,
            bad_step, caretaker.look,
        )  # fmt: skip

    started = time.perf_counter()
    wishes.look_later()
    try:
        if cfg.faults.on_bad_step == "rewind" and found is None:
            caretaker.save(progress)
        while True:
            try:
                outcome = run_on()
                break
            except loop.RewindError as error:
                kept_at = progress.kept_at
                progress = _rewound(request, run_dir, engine, saving, found, [*progress.passed_over, error.batch])
                if progress.kept_at != kept_at:
                    _forget(progress)  # the model that is kept is of a step that was undone
                terminal.say(f"back after step {progress.step}, and on without samples of a bad step")
                if metrics is not None:
                    metrics.cut(progress.rows, progress.step)
        caretaker.close()
    except StopAsked:
        raise caretaker.stop(progress) from None
    except BadStepError:
        caretaker.close()
        raise
    finally:
        bar.close()
        if metrics is not None:
            metrics.close()
    if first and not predictions and (run_dir.path / "predictions.jsonl").is_file():
        # Of the model that was kept before this run was resumed.
        text = (run_dir.path / "predictions.jsonl").read_text(encoding="utf-8")
        predictions = [json.loads(line) for line in text.split("\n") if line]
    summary = {
        "name": cfg.name,
        "steps": outcome.step,
        "tokens": outcome.tokens,
        "unit": unit,
        "train_s": round(time.perf_counter() - started, 1),
        "world_size": layout.world,
        "held_out_before": outcome.first,
        "held_out": outcome.last,
        "kept_at_step": outcome.kept_at,
        "model": str(run_dir.model),
        "revisions": hub.revisions(cfg, recipe.weights()),
        "rows": recipe.report.get("rows"),
        "changes": recipe.report.get("changes", []),
        "unreadable": recipe.report.get("unreadable", []),
    }
    if metrics is not None:
        beat("the summary")
        metrics.settle()
        details = recipe.details(predictions) if predictions else {}
        run_dir.write_json("summary.json", {**summary, "sample": None, **details})
        beat(THROUGH)
        try:
            curve = str(plot_loss(run_dir.path))
        except RequestError as error:
            curve = f"not drawn: {error}"
        summary["sample"] = recipe.sample(run_dir.model)
        run_dir.write_json("summary.json", {**summary, **details})
        terminal.say(closing(summary, curve))
    return summary


def _kept(metrics: Path, cfg: Config, recipe: Recipe) -> int | None:
    """The step whose model a run has kept, by the evaluations that it has written down."""
    name = cfg.eval.metric
    if name is None or not metrics.is_file():
        return None
    rows = [row for _, row in read_rows(metrics) if row is not None and "split" in row and name in row]
    sign = 1 if recipe.METRICS[name] == "max" else -1
    return int(max(rows, key=lambda row: sign * row[name])["step"]) if rows else None


def _look_again(progress: Progress, found: Checkpoint, cfg: Config, run_dir: RunDir, steps: int, stale: bool) -> None:
    """Forget the evaluations of a resumed run where this one judges otherwise, or has no model of theirs.

    stale: the model that is kept is not the checkpoint's best. Raises RequestError where this run is shorter than what
    was done.
    """
    from launch.runtime import resume

    if progress.step > steps:
        rule = f"the checkpoint is of step {progress.step}"
        nearest = f"train.steps={progress.step}, or resume=PATH of an earlier one"
        raise RequestError(Problem("train.steps", str(steps), rule, nearest))
    judged = resume.as_of_now(found.manifest["config"])["eval"]
    otherwise = any(
        judged.get(key) != getattr(cfg.eval, key) for key in ("metric", "beams", "new_tokens", "bleu_tokens")
    )
    elsewhere = found.folder.parent.resolve() != run_dir.checkpoints.resolve()
    if stale or otherwise or elsewhere or (progress.step == steps and not run_dir.model.is_dir()):
        _forget(progress)
        progress.evaluated_at = min(progress.evaluated_at, 0)


def _forget(progress: Progress) -> None:
    """The next evaluation is the best again."""
    progress.best, progress.value, progress.waiting = None, None, 0


def _rewound(
    request: Request, run_dir: RunDir, engine: Engine, saving: Saving, start: Checkpoint | None, passed_over: list[int]
) -> Progress:
    """The engine at the newest whole checkpoint of this run, and how far the run was then; a collective call.

    start: what the run was resumed from, if it has not saved since.
    """
    from launch.runtime.checkpoint import newest

    saving.finish()
    if saving.published:
        start = None
    found = _shared(request, lambda: start or newest(run_dir.checkpoints))
    if found is None:
        raise RuntimeError(f"faults.on_bad_step=rewind: no whole checkpoint in {run_dir.checkpoints} to go back to")
    progress = restored(engine, found, request.layout)
    progress.passed_over = sorted({*progress.passed_over, *passed_over})
    return progress


def _resumed(request: Request, run_dir: RunDir, data: str, terminal: Terminal) -> Checkpoint | None:
    """The checkpoint to continue from, the same on all ranks; a collective call. Says what it is and what differs."""
    from launch.runtime import resume

    def find() -> Checkpoint | None:
        found = resume.find(request.cfg, run_dir.path, terminal.say)
        if found is not None:
            taken = resume.check(found, request.cfg, data)
            terminal.say(f"resumes after step {found.step}, from {found.folder}")
            for line in taken:
                terminal.say(f"  {line}")
        return found

    return _shared(request, find)


def _shared(request: Request, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What rank 0 finds, on all ranks; so is the RequestError that it raises."""
    from torch import distributed as dist

    from launch.runtime.checkpoint import Checkpoint

    answer: list[Any] = [None]
    if request.ranks.first:
        try:
            found = find()
            answer = [(found.folder, found.manifest)] if found is not None else [None]
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
    known = Progress.__dataclass_fields__
    return Progress(**{name: value for name, value in manifest["progress"].items() if name in known})
