"""Steady tokens/s of our loop against a hand-written PyTorch DDP loop and transformers.Trainer, and of each acceleration.

    python benchmarks/overhead.py [ranks=2] [steps=4] [rounds=12] [parts=contest,accelerations] [out=FILE.md]
                                  [model=quickstart|llama_1b|…] [key=value …]

All contenders of a part live in the same processes and take turns: a few steps each, round after round, so that noise
hits all alike. benchmarks/README.md tells the method and what came out.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from conf.batch import Layout, batch_line
from conf.compose import compose
from conf.errors import RequestError
from conf.schema import Config
from launch.runtime import processes
from launch.runtime.request import split_arguments
from recipes import recipe_class
from recipes.base import Recipe

OWN = {"ranks": "2", "steps": "4", "rounds": "12", "parts": "contest,accelerations", "out": "", "model": "quickstart"}
BASE = ("+recipe=quickstart", "scheduler=constant", "scheduler.warmup_steps=0", "optimizer.lr=3e-4")
"""A constant rate, small enough without warm-up: all three loops can be told so."""
OFF = ("train.fused_loss=false", "optimizer.fused=false", "train.compile=false")
WARM, SETTLE = 2, 1
"""Untimed steps after building, and at the start of each turn."""
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
}


@dataclass
class Job:
    """What a loop is given: everything but how to train."""

    cfg: Config
    recipe: Recipe
    layout: Layout
    device: Any
    rank: int
    steps: int


# The three loops. Each calls `pause` once when it is built and then after every optimizer step, and returns its model.


def ours(job: Job, pause: Callable[[], None]) -> Callable[..., Any]:
    """launch/runtime as `launch/train.py` runs it, metrics.jsonl included; without evaluation."""
    from launch.runtime import loop
    from launch.runtime.ds_config import ds_config
    from launch.runtime.engine import Engine
    from launch.runtime.metrics import MetricsLog

    job.recipe.held_out = ()  # type: ignore[assignment]
    engine_config = ds_config(job.cfg, job.layout, job.device.type)
    engine = Engine(job.recipe, job.cfg, job.layout, engine_config, job.device, job.steps)
    metrics = MetricsLog(Path(tempfile.mkdtemp(dir=".")) / "metrics.jsonl", []) if job.rank == 0 else None

    def log(row: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.log(row)
        if "split" not in row or row["step"] == 0:
            pause()

    loop.run(engine, job.recipe, job.cfg, job.layout, job.rank, job.steps, log)
    return engine.ds


def by_hand(job: Job, pause: Callable[[], None]) -> Callable[..., Any]:
    """What one writes without a framework: DDP, autocast below fp32, cross-entropy of all logits, AdamW, clipping."""
    import torch
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    from launch.runtime.engine import parameter_groups
    from launch.runtime.loop import training_batches

    cfg, half = job.cfg, job.cfg.precision.name != "fp32"
    raw = whole_model(job, "fp32").train()
    model = DistributedDataParallel(raw, gradient_as_bucket_view=True) if job.layout.data > 1 else raw
    optimizer = torch.optim.AdamW(
        parameter_groups(raw, cfg.optimizer.weight_decay),
        lr=cfg.optimizer.lr,
        betas=tuple(cfg.optimizer.betas),
        eps=cfg.optimizer.eps,
        fused=cfg.optimizer.fused or None,
    )
    pause()
    for step in range(job.steps):
        for index, batch in enumerate(training_batches(step, job.rank, job.recipe, cfg, job.layout)):
            tensors = {name: torch.from_numpy(values).to(job.device) for name, values in batch.items()}
            last = index == cfg.batch.accumulation - 1
            with contextlib.nullcontext() if last or model is raw else model.no_sync():
                with torch.autocast(job.device.type, torch.bfloat16, enabled=half):
                    logits = model(**inputs(cfg, tensors)).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), tensors["labels"].flatten())
                (loss / cfg.batch.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        pause()
    return raw


def trainer(job: Job, pause: Callable[[], None]) -> Callable[..., Any]:
    """transformers.Trainer on the engine, with our engine configuration; no logging, saving or evaluation."""
    import torch
    import transformers

    from launch.runtime.ds_config import ds_config

    cfg, recipe = job.cfg, job.recipe

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return job.steps * cfg.batch.global_size

        def __getitem__(self, index: int) -> Any:
            return recipe.train.row(index)

    def collate(rows: list[Any]) -> dict[str, Any]:
        tensors = {name: torch.from_numpy(values) for name, values in recipe.collate(rows, len(rows)).items()}
        # Our labels are shifted already.
        return {**inputs(cfg, tensors), "labels": tensors["labels"], "shift_labels": tensors["labels"]}

    class Pause(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pause()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pause()

    optimizer = cfg.optimizer
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(dir="."),
        deepspeed=ds_config(cfg, job.layout, job.device.type),
        max_steps=job.steps,
        per_device_train_batch_size=cfg.batch.micro_size,
        gradient_accumulation_steps=cfg.batch.accumulation,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant",
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.gradient_clipping,
        bf16=cfg.precision.name == "bf16",
        fp16=cfg.precision.name == "fp16",
        use_cpu=job.device.type == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    loop = transformers.Trainer(whole_model(job, cfg.precision.name), arguments, collate, Rows(), callbacks=[Pause()])
    loop.train()
    return loop.model_wrapped


LOOPS: dict[str, Callable[[Job, Callable[[], None]], Callable[..., Any]]] = {
    "ours": ours, "by_hand": by_hand, "trainer": trainer,
}  # fmt: skip


def whole_model(job: Job, precision: str) -> Any:
    """The same initial weights for everyone, unsharded."""
    from launch.runtime.engine import build_model

    plain = replace(job.cfg, zero=replace(job.cfg.zero, stage=0), precision=replace(job.cfg.precision, name=precision))
    return build_model(job.recipe, plain, {}, job.device).to(job.device)


def inputs(cfg: Config, tensors: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs: packed documents are told apart by their positions."""
    positions = {"position_ids": tensors["position_ids"]} if cfg.data.packing == "documents" else {}
    return {"input_ids": tensors["input_ids"], **positions, "use_cache": False}


class HalfSupervised:
    """Rows whose first half supervises nothing."""

    def __init__(self, rows: Any):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        row = dict(self._rows.row(index))
        row["labels"] = row["labels"].copy()
        row["labels"][: len(row["labels"]) // 2] = -100
        return row


class Turns(threading.Thread):
    """A training loop in a thread of its own that goes on only when it is its turn: whole loops, paused between steps."""

    def __init__(self, loop: Callable[[Job, Callable[[], None]], Callable[..., Any]], job: Job):
        super().__init__(daemon=True)
        self._loop, self.job = loop, job
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._left, self._error = 0, ""
        self.model: Callable[..., Any] | None = None
        self.bytes_between_steps = self.peak_bytes = 0
        self.start()

    def run(self) -> None:
        import torch

        self._go.acquire()
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # OpenMP counts threads per thread
        if self.job.device.type == "cuda":
            torch.cuda.set_device(self.job.device)
        try:
            self.model = self._loop(self.job, self._pause)
        except BaseException:
            self._error = traceback.format_exc()
        self._done.release()

    def _pause(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._done.release()
            self._go.acquire()

    def advance(self, steps: int) -> float:
        """Seconds that this rank takes for the next `steps` steps (the first one builds; 0: to the end)."""
        import torch

        cuda = self.job.device.type == "cuda"
        torch.distributed.barrier()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        self._left = steps
        self._go.release()
        self._done.acquire()
        if self._error:
            raise RuntimeError(self._error)
        if cuda:
            torch.cuda.synchronize()
            # The others hold memory too: only what this one adds counts.
            peak = self.bytes_between_steps + torch.cuda.max_memory_allocated() - before
            self.bytes_between_steps += torch.cuda.memory_allocated() - before
            self.peak_bytes = max(self.peak_bytes, peak)
        return time.perf_counter() - started


def held_out_loss(model: Callable[..., Any], job: Job, rows: Any) -> float:
    """Mean loss over one micro-batch of held-out rows: equal for all who did the same work."""
    import torch
    from torch.nn import functional as F

    batch = job.recipe.collate([rows.row(i) for i in range(job.cfg.batch.micro_size)], job.cfg.batch.micro_size)
    tensors = {name: torch.from_numpy(values).to(job.device) for name, values in batch.items()}
    with torch.no_grad():
        logits = model(**inputs(job.cfg, tensors)).logits
    return float(F.cross_entropy(logits.float().flatten(0, 1), tensors["labels"].flatten()))


def take_turns(
    ranks: processes.Ranks, options: dict[str, str], overrides: list[str], part: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Everything one rank does in a part: build all contenders, then let them run in turns. Seconds by contender."""
    import torch

    steps, rounds = int(options["steps"]), int(options["rounds"])
    device = processes.join(ranks, os.environ["DS_ACCELERATOR"], int(os.environ["OMP_NUM_THREADS"]))
    turns: dict[str, Turns] = {}
    first_step = {}
    for contender in PARTS[part]:
        cfg = compose([*BASE, *overrides, *contender.overrides], ranks.world)
        recipe = recipe_class(cfg.task)(cfg)
        recipe.prepare()
        held_out = recipe.held_out
        if contender.half:
            recipe.train = HalfSupervised(recipe.train)
        job = Job(
            cfg, recipe, Layout.of(ranks.world, cfg.parallel), device, ranks.rank, 1 + WARM + rounds * (SETTLE + steps)
        )
        turns[contender.name] = one = Turns(LOOPS[contender.loop], job)
        one.advance(1)
        first_step[contender.name] = one.advance(1)
        one.advance(WARM)
        progress(f"{part}: {contender.name}: first step after {first_step[contender.name]:.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            turns[name].advance(SETTLE)
            seconds[name].append(turns[name].advance(steps))
        progress(f"{part}: round {number + 1} of {rounds}")
    peaks = {name: one.peak_bytes for name, one in turns.items()}
    losses = {}
    for name, one in turns.items():
        one.advance(0)
        losses[name] = held_out_loss(one.model, one.job, held_out)
    batch = [recipe.collate([recipe.train.row(i)], 1) for i in range(job.steps * cfg.batch.global_size)]
    tokens = [recipe.count(b)[1] for b in batch]
    first = [(1 + WARM + r * (SETTLE + steps) + SETTLE) * cfg.batch.global_size for r in range(rounds)]
    return {
        "seconds": seconds, "first_step": first_step, "losses": losses, "peaks": peaks,
        "tokens": [sum(tokens[f : f + steps * cfg.batch.global_size]) for f in first],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }  # fmt: skip


def _rank(ranks: processes.Ranks, port: int, pipe: Connection, *arguments: Any) -> None:
    """A process of its own; what it prints, and the libraries in it, goes to a log, but for our own progress."""
    os.environ.update(
        RANK=str(ranks.rank), LOCAL_RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world),
        LOCAL_WORLD_SIZE=str(ranks.world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    log = Path(f"rank_{ranks.rank}.log").open("w")
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)

    def progress(line: str) -> None:
        if ranks.first:
            print(line, file=terminal)

    try:
        pipe.send(take_turns(ranks, *arguments, progress))
    except BaseException:
        pipe.send(traceback.format_exc())
    # Not through the interpreter's exit: threads and process groups of three frameworks would be waited for.
    os._exit(0)


def run_part(part: str, options: dict[str, str], overrides: list[str]) -> list[dict[str, Any]]:
    """The results of all ranks. The first failure ends them all."""
    context, world, port = multiprocessing.get_context("spawn"), int(options["ranks"]), processes.free_port()
    children, pipes = [], {}
    for rank in range(world):
        receive, send = context.Pipe(duplex=False)
        ranks = processes.Ranks(rank, rank, world, world)
        child = context.Process(target=_rank, args=(ranks, port, send, options, overrides, part))
        child.start()
        send.close()
        children.append(child)
        pipes[receive] = rank
    results: dict[int, dict[str, Any]] = {}
    try:
        while pipes:
            for pipe in wait(list(pipes)):
                rank = pipes.pop(pipe)  # type: ignore[call-overload]
                try:
                    result = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    result = "the process died"
                if isinstance(result, str):
                    raise SystemExit(f"error: {part}, rank {rank}:\n{result}")
                results[rank] = result
    finally:
        for child in children:
            child.join(timeout=5 if len(results) == world else 0)
            child.kill()
    return [results[rank] for rank in range(world)]


def table(part: str, results: list[dict[str, Any]], cfg: Config) -> str:
    """Markdown: medians and quartiles over the rounds; ratios are taken round by round, then their median."""
    cuda = results[0]["device"] is not None
    mfu = utilisation(results, cfg) if cuda else None
    speed = {
        name: [tokens / max(block) for tokens, *block in zip(results[0]["tokens"], *times, strict=True)]
        for name in results[0]["seconds"]
        for times in [[result["seconds"][name] for result in results]]
    }
    head = ["", "tokens/s", "quartiles", "ratio", "quartiles", "to", "first step, s", "held-out loss"]
    rows = [head + (["MFU", "peak GiB"] if cuda else [])]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for contender in PARTS[part]:
        name = contender.name
        ratios = [mine / other for mine, other in zip(speed[name], speed[contender.against], strict=True)]
        (low, _, high), (worst, _, best) = quantiles(speed[name], n=4), quantiles(ratios, n=4)
        rows.append(
            [name, f"{median(speed[name]):,.0f}", f"{low:,.0f} – {high:,.0f}", f"{median(ratios):.3f}",
             f"{worst:.3f} – {best:.3f}", contender.against, f"{results[0]['first_step'][name]:.1f}",
             f"{results[0]['losses'][name]:.4f}"]
        )  # fmt: skip
        if cuda:
            peak = max(result["peaks"][name] for result in results) / 2**30
            rows[-1] += ["–" if mfu is None else f"{mfu * median(speed[name]):.1%}", f"{peak:.1f}"]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def utilisation(results: list[dict[str, Any]], cfg: Config) -> float | None:
    """MFU of one token per second; None for a device whose peak is not known."""
    from launch.planner.flops import flops_per_token, peak_flops
    from recipes.models.shape import model_shape

    peak = peak_flops(results[0]["device"], cfg.precision.name)
    shape = model_shape(cfg.model, cfg.data, cfg.precision.name)
    return peak and flops_per_token(shape, cfg.data.seq_length) / (peak * len(results))


def check_same_work(part: str, result: dict[str, Any], precision: str) -> None:
    """Speeds may be compared only if the same steps were taken: same rows, same start, so the same loss at the end."""
    for contender in PARTS[part]:
        loss, other = (result["losses"][name] for name in (contender.name, contender.against))
        if not abs(loss - other) <= SAME_LOSS.get(precision, ABOUT_THE_SAME_LOSS):
            raise SystemExit(f"error: {contender.name} ends at loss {loss:.4f}, {contender.against} at {other:.4f}")


def setting(cfg: Config, options: dict[str, str], argv: list[str], device: str | None) -> str:
    """What a reader must know to judge the numbers: command, machine, versions, commit, date."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()

    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    layout = Layout.of(int(options["ranks"]), cfg.parallel)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    dirty = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return "\n".join(
        [
            f"`{' '.join(['python benchmarks/overhead.py', *argv])}`",
            "",
            f"- {options['model']}, {cfg.precision.name}, ZeRO-{cfg.zero.stage}: {batch_line(cfg.batch, layout)}, each "
            f"of {cfg.data.seq_length} tokens; {options['rounds']} rounds of {options['steps']} steps",
            f"- {device or names[0] if device or names else platform.machine()}, {cores} cores, {layout.world} ranks × "
            f"{os.environ['OMP_NUM_THREADS']} threads",
            f"- {packages}, Python {platform.python_version()}; {platform.system()}",
            f"- commit {git('rev-parse', '--short', 'HEAD')}{dirty}, {datetime.date.today()}",
        ]
    )


def main(argv: list[str]) -> int:
    overrides, options = split_arguments(argv, OWN)
    if options["model"] != "quickstart":
        # A large vocabulary cannot be learned from the standard library; the embedding keeps its size all the same.
        overrides = [f"model={options['model']}", "data.vocab_size=4096", *overrides]
    cfg = compose([*BASE, *overrides], int(options["ranks"]))
    if unknown := set(options["parts"].split(",")) - set(PARTS):
        raise SystemExit(f"error: parts={','.join(unknown)}: there are {', '.join(PARTS)}")
    recipe_class(cfg.task)(cfg).prepare(
        lambda done, total, what: print(f"\r{what} {done}/{total}", end="", file=sys.stderr)
    )
    from conf.environment import detect

    ranks = processes.Ranks(0, 0, int(options["ranks"]), int(options["ranks"]))
    processes.set_environment(ranks, detect().on(cfg.device).device)
    # Before torch is loaded: its libraries count the threads then, also for threads that torch knows nothing of.
    os.environ["OMP_NUM_THREADS"] = str(processes.threads_per_rank(cfg.train.threads, ranks.world))
    here, scratch = Path.cwd(), tempfile.mkdtemp()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/inductor"  # the first step then shows a cold compile
    os.chdir(scratch)
    try:
        tables, device = [], None
        for part in options["parts"].split(","):
            results = run_part(part, options, overrides)
            device = results[0]["device"]
            check_same_work(part, results[0], cfg.precision.name)
            tables.append(table(part, results, cfg))
    finally:
        os.chdir(here)
        shutil.rmtree(scratch)
    text = "\n\n".join([setting(cfg, options, argv, device), *tables])
    print(text)
    if options["out"]:
        Path(options["out"]).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except RequestError as error:
        print(error.render(), file=sys.stderr)
        code = 2
    raise SystemExit(code)
