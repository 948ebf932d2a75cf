"""Steady tokens/s of our loop against a hand-written DDP loop and transformers.Trainer, and of each acceleration.

    python benchmarks/overhead.py [ranks=2] [steps=3] [rounds=6] [starts=3] [parts=contest,accelerations] [out=FILE.md]
                                  [model=quickstart|llama_1b|…] [key=value …]

Every contender has processes of its own, all are built and warm at the same time, and they take turns: a few steps
each, round after round, so that noise hits all alike. benchmarks/README.md tells the method.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.contenders import LOOPS, HalfSupervised, Job, Pause, held_out_batch
from benchmarks.report import processor, publish, run, setting
from conf.batch import Layout, batch_line
from conf.compose import compose
from conf.environment import detect
from conf.errors import Problem, RequestError
from conf.schema import Config
from launch.runtime import processes
from launch.runtime.request import split_arguments
from recipes import recipe_class

OWN = {
    "ranks": "2", "steps": "3", "rounds": "6", "starts": "3", "parts": "contest,accelerations", "out": "",
    "model": "quickstart",
}  # fmt: skip
BASE = ("+recipe=quickstart", "scheduler=constant", "scheduler.warmup_steps=0", "optimizer.lr=3e-4")
"""A constant rate, small enough without warm-up: all three loops can be told so."""
OFF = ("train.fused_loss=false", "optimizer.fused=false", "train.compile=false")
WARM, SETTLE = 2, 1
"""Untimed steps after the first one, and at the start of each turn."""
SAME_LOSS = {"fp32": 2e-3}
"""How far (nats) held-out losses may lie apart after the same steps: rounding in fp32, …"""
ABOUT_THE_SAME_LOSS = 5e-2
"""… and where hand-written autocast keeps fp32 weights and the engine rounds a bf16 copy of them."""


@dataclass(frozen=True)
class Contender:
    """One line of a table: a loop, the configuration it runs under, and the line it is compared with."""

    name: str
    loop: str
    overrides: tuple[str, ...] = ()
    against: str = "default"
    half: bool = False
    """The first half of every sequence supervises nothing, as a prompt would."""


HALF = "default, half the labels"
BY_HAND, AUTOTP = "PipelineModule by hand", "the engine's AutoTP"
PLAIN = ("data.packing=blocks", "model.config.tie_word_embeddings=false")
"""What a PipelineModule of some lines can do."""
PARTS = {
    "contest": (
        Contender("hand-written DDP", "by_hand", OFF, "hand-written DDP"),
        Contender("hand-written DDP, fused AdamW", "by_hand", OFF[:1] + OFF[2:], "hand-written DDP"),
        Contender("transformers.Trainer", "trainer", (), "hand-written DDP"),
        Contender("ours, accelerations off", "ours", OFF, "hand-written DDP"),
        Contender("ours", "ours", (), "hand-written DDP"),
    ),
    "accelerations": (
        Contender("default", "ours"),
        Contender("train.fused_loss=false", "ours", ("train.fused_loss=false",)),
        Contender("optimizer.fused=false", "ours", ("optimizer.fused=false",)),
        Contender("train.compile=true", "ours", ("train.compile=true",)),
        Contender(HALF, "ours", (), HALF, half=True),
        Contender("train.fused_loss=false, half the labels", "ours", ("train.fused_loss=false",), HALF, half=True),
    ),
    "layouts": (
        Contender(BY_HAND, "by_hand_pipeline", (*PLAIN, "parallel=pipeline"), BY_HAND),
        Contender("ours, pipeline 2", "ours", (*PLAIN, "parallel=pipeline"), BY_HAND),
        Contender(AUTOTP, "autotp", (*PLAIN, "parallel=tensor"), AUTOTP),
        Contender("ours, tensor 2", "ours", (*PLAIN, "parallel=tensor"), AUTOTP),
    ),
}


def contend(
    ranks: processes.Ranks, port: int, pipe: Connection, contender: Contender, overrides: list[str], steps: int
) -> None:
    """One rank of a contender, a process of its own. What libraries print goes to a log."""
    os.environ.update(
        RANK=str(ranks.rank), LOCAL_RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world),
        LOCAL_WORLD_SIZE=str(ranks.world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    log = os.open(f"{tempfile.gettempdir()}/rank_{ranks.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        import torch

        device = processes.join(ranks, os.environ["DS_ACCELERATOR"], int(os.environ["OMP_NUM_THREADS"]))
        cfg = compose([*BASE, *overrides, *contender.overrides], ranks.world)
        recipe = recipe_class(cfg.task)(cfg)
        recipe.prepare()
        held_out = recipe.held_out
        if contender.half:
            recipe.train = HalfSupervised(recipe.train)
        job = Job(cfg, recipe, Layout.of(ranks.world, cfg.parallel), device, ranks.rank, steps)
        loss = LOOPS[contender.loop](job, Pause(pipe, device))
        cuda = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        name = torch.cuda.get_device_name(device) if cuda else None
        pipe.send({"peak": peak, "device": name, "loss": loss(held_out_batch(job, held_out))})
    except BaseException:
        pipe.send(traceback.format_exc())
    # Not through the interpreter's exit: the frameworks wait for each other's threads and process groups there.
    os._exit(0)


class Team:
    """All ranks of one contender, seen from the process that gives the turns."""

    def __init__(self, context: Any, contender: Contender, world: int, overrides: list[str], steps: int):
        self._name, self._children, self._pipes = contender.name, [], []
        port = processes.free_port()
        for rank in range(world):
            mine, theirs = context.Pipe()
            ranks = processes.Ranks(rank, rank, world, world)
            arguments = (ranks, port, theirs, contender, overrides, steps)
            self._children.append(context.Process(target=contend, args=arguments, daemon=False))
            self._children[-1].start()
            theirs.close()
            self._pipes.append(mine)
        self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append("the process died")
            if isinstance(answers[-1], str):
                raise SystemExit(f"error: {self._name}, rank {rank}:\n{answers[-1]}")
        return answers

    def advance(self, steps: int) -> Any:
        """Seconds of the slowest rank for the next `steps` steps."""
        for pipe in self._pipes:
            pipe.send(steps)
        return max(self._answers())

    def finish(self) -> dict[str, Any]:
        """What the first rank has to say at the end, with the highest peak memory of all."""
        for pipe in self._pipes:
            pipe.send(0)
        answers = self._answers()
        return {**answers[0], "peak": max(answer["peak"] for answer in answers)}

    def kill(self) -> None:
        for child in self._children:
            child.kill()
            child.join()


@dataclass
class Result:
    """What a contender did: tokens/s of each turn, seconds of its slowest first step, how it ended."""

    speed: list[float]
    first_step: float
    end: dict[str, Any]


def run_part(part: str, options: dict[str, str], overrides: list[str], tokens: list[int]) -> dict[str, Result]:
    """Build all contenders of a part and give them turns; anew for each start, since placement in memory is luck too.

    tokens: of each step.
    """
    cpu = os.environ["DS_ACCELERATOR"] == "cpu"
    context = multiprocessing.get_context("forkserver" if cpu else "spawn")  # CUDA does not survive a fork
    context.set_forkserver_preload(["torch", "deepspeed", "transformers", "launch.runtime.engine", "recipes.causal_lm"])
    steps, rounds, starts = (int(options[key]) for key in ("steps", "rounds", "starts"))
    results: dict[str, Result] = {}
    for start in range(starts):
        teams: dict[str, Team] = {}
        try:
            for contender in rotated(PARTS[part], start):
                team = Team(context, contender, int(options["ranks"]), overrides, len(tokens))
                teams[contender.name] = team
                result = results.setdefault(contender.name, Result([], 0.0, {}))
                result.first_step = max(result.first_step, team.advance(1))
                team.advance(WARM)
            for number in range(rounds):
                first = 1 + WARM + number * (SETTLE + steps) + SETTLE
                for name in rotated(teams, number):
                    teams[name].advance(SETTLE)
                    results[name].speed.append(sum(tokens[first : first + steps]) / teams[name].advance(steps))
                print(f"{part}: start {start + 1}/{starts}, round {number + 1}/{rounds}", file=sys.stderr)
            for name, team in teams.items():
                results[name].end = team.finish()
        finally:
            for team in teams.values():
                team.kill()
    return results


def rotated(items: Iterable[Any], by: int) -> list[Any]:
    """Everybody is first once."""
    items = list(items)
    return items[by % len(items) :] + items[: by % len(items)]


def table(part: str, results: dict[str, Result], cfg: Config, world: int) -> str:
    """Markdown: medians and quartiles over the turns; ratios are taken round by round, then their median."""
    head = ["", "tokens/s", "quartiles", "ratio", "quartiles", "to", "first step, s", "peak MiB", "held-out loss"]
    per_token = utilisation(results[PARTS[part][0].name].end["device"], cfg, world)
    head += ["MFU"] if per_token else []
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for contender in PARTS[part]:
        result, other = results[contender.name], results[contender.against]
        ratios = [mine / theirs for mine, theirs in zip(result.speed, other.speed, strict=True)]
        (low, _, high), (worst, _, best) = quantiles(result.speed, n=4), quantiles(ratios, n=4)
        rows.append(
            [contender.name, f"{median(result.speed):,.0f}", f"{low:,.0f} – {high:,.0f}", f"{median(ratios):.3f}",
             f"{worst:.3f} – {best:.3f}", contender.against, f"{result.first_step:.1f}",
             f"{result.end['peak'] / 2**20:,.0f}", f"{result.end['loss']:.4f}"]
        )  # fmt: skip
        if per_token:
            rows[-1].append(f"{per_token * median(result.speed):.1%}")
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def utilisation(device: str | None, cfg: Config, world: int) -> float | None:
    """MFU of one token per second; None for a device whose peak is not known."""
    from launch.planner.flops import flops_per_token, peak_flops

    peak = peak_flops(device, cfg.precision.name) if device else None
    if peak is None:
        return None
    from recipes.models.shape import model_shape

    return flops_per_token(model_shape(cfg.model, cfg.data, cfg.precision.name)) / (peak * world)


def check_same_work(part: str, results: dict[str, Result], precision: str) -> None:
    """Speeds may be compared only if the same steps were taken: same rows, same start, so the same loss at the end."""
    for contender in PARTS[part]:
        loss, other = (results[name].end["loss"] for name in (contender.name, contender.against))
        if not abs(loss - other) <= SAME_LOSS.get(precision, ABOUT_THE_SAME_LOSS):
            raise SystemExit(f"error: {contender.name} ends at loss {loss:.4f}, {contender.against} at {other:.4f}")


def heading(cfg: Config, options: dict[str, str], argv: list[str], device: str | None) -> list[str]:
    """What a reader must know to judge the numbers: command, machine, versions, commit, date."""
    layout = Layout.of(int(options["ranks"]), cfg.parallel)
    turns = f"{options['starts']} starts × {options['rounds']} rounds × {options['steps']} steps"
    return [
        f"`{' '.join(['python benchmarks/overhead.py', *argv])}`",
        f"{options['model']}, {cfg.precision.name}, ZeRO-{cfg.zero.stage}, {batch_line(cfg.batch, layout)}, "
        f"{cfg.data.seq_length} tokens each; {turns}; {layout.world} ranks × {os.environ['OMP_NUM_THREADS']} threads",
        setting(machine=f"{device + ', ' if device else ''}{processor()}"),
    ]


def check_options(options: dict[str, str]) -> None:
    """RequestError for a part that does not exist and for counts that give no quartiles."""
    least = {"ranks": 1, "steps": 1, "rounds": 2, "starts": 1}
    problems = [
        Problem(key, options[key], f"a whole number, at least {low}", f"{key}={OWN[key]}")
        for key, low in least.items()
        if not options[key].isdigit() or int(options[key]) < low
    ]
    for part in options["parts"].split(","):
        if part not in PARTS:
            problems.append(Problem("parts", part, f"one or more of {', '.join(PARTS)}", f"parts={OWN['parts']}"))
    if problems:
        raise RequestError(problems)


def main(argv: list[str]) -> int:
    overrides, options = split_arguments(argv, OWN)
    check_options(options)
    world = int(options["ranks"])
    if options["model"] != "quickstart":
        # The standard library is too small to learn a large vocabulary from; the embedding keeps its size all the same.
        overrides = [f"model={options['model']}", "data.vocab_size=4096", *overrides]
    cfg = compose([*BASE, *overrides], world)
    parts = options["parts"].split(",")
    recipe = recipe_class(cfg.task)(cfg)
    recipe.prepare()
    size = cfg.batch.global_size
    steps = 1 + WARM + int(options["rounds"]) * (SETTLE + int(options["steps"]))
    tokens = [sum(int(recipe.train.row(s * size + i)["attended"].sum()) for i in range(size)) for s in range(steps)]

    # The children find this in their environment before torch is loaded: it settles on devices and threads then.
    os.environ["DS_ACCELERATOR"] = detect().on(cfg.device).device
    os.environ["OMP_NUM_THREADS"] = str(processes.threads_per_rank(cfg.train.threads, world))
    os.environ["PYTHONWARNINGS"] = "ignore"
    scratch = os.environ["TMPDIR"] = tempfile.mkdtemp()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/inductor"  # so that the first step shows a cold compile
    try:
        results = {part: run_part(part, options, overrides, tokens) for part in parts}
    finally:
        shutil.rmtree(scratch)
    device = next(iter(results[parts[0]].values())).end["device"]
    paragraphs = [*heading(cfg, options, argv, device), *(table(part, results[part], cfg, world) for part in parts)]
    publish("\n\n".join(paragraphs).splitlines(), options["out"])
    for part in parts:
        check_same_work(part, results[part], cfg.precision.name)
    return 0


if __name__ == "__main__":
    run(main)
