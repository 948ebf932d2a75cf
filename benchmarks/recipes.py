"""What a step of every recipe costs beside its arithmetic, on one rank.

    python benchmarks/recipes.py DATA_FOLDER [only=mnist,sst2] [steps=12] [out=FILE.md]

Each recipe takes a step of ours (`loop.run`, with data, metrics.jsonl and the engine), then the same micro-batches go
through a second copy of its model by hand: forward and backward alone, and with clipping and the same AdamW; and so on
in turns, `steps` times after two that are not counted, in a process of its own. The *share* is the time of forward and
backward by hand over that of our step, and the *ratio* that of our step over the whole one by hand (medians of the
turns' own quotients). Recipes of the hub read stand-ins (benchmarks/standins.py). DATA_FOLDER is that of
benchmarks/tasks.py.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import ROOT, publish, run, setting, table
from benchmarks.tasks import TASKS
from conf.compose import compose
from conf.errors import Problem, RequestError
from conf.schema import Config
from launch.runtime import processes
from launch.runtime.request import split_arguments

OWN = {"only": "", "steps": "12", "out": "", "one": ""}
WARM = 2
LEAST = 0.8
"""Of a step that is well spent; what is below is looked into."""
PRETRAINING = {"quickstart": (), "pretrain_llama": ("model=llama_4m",), "pretrain_gpt2": ("model=gpt2_tiny",)}
"""Language models on the standard library's source, which needs no file."""


def requests(data: Path, made: Path) -> dict[str, list[str]]:
    """Recipe → its overrides, of those whose files are there."""
    tasks = {
        task.recipe: task.arguments(data, made, seed=0) for task in TASKS
        if all((data / name).is_file() for name in task.files)
    }  # fmt: skip
    return {name: list(words) for name, words in PRETRAINING.items()} | tasks


def by_hand(cfg: Config, recipe: Any, device: Any) -> tuple[Any, Any]:
    """The recipe's model, whole and untouched by the engine, and an optimizer as the recipe's."""
    import torch

    from benchmarks.contenders import Job, whole_model
    from conf.batch import Layout
    from launch.runtime.engine import parameter_groups

    model = whole_model(Job(cfg, recipe, Layout(1, 1), device, 0, 0), "fp32").eval()
    optimizer = cfg.optimizer
    settings = {"betas": tuple(optimizer.betas), "eps": optimizer.eps} if optimizer.betas and optimizer.eps else {}
    groups = parameter_groups(model, optimizer.weight_decay)
    return model, torch.optim.AdamW(groups, lr=optimizer.lr, fused=True, **settings)


def measured(overrides: list[str], steps: int) -> dict[str, Any]:
    """Seconds of each turn: `ours`, `arithmetic` (forward and backward by hand), `by_hand` (the whole step so)."""
    from conf.batch import Layout, sizes
    from launch.runtime import loop
    from launch.runtime.ds_config import ds_config
    from launch.runtime.metrics import MetricsLog
    from launch.runtime.staged import make_engine
    from recipes import recipe_class

    ranks = processes.Ranks(0, 0, 1, 1)
    processes.set_environment(ranks, "cpu")
    import torch

    device = processes.join(ranks, "cpu")
    cfg = compose([*overrides, "train.epochs=null", f"train.steps={WARM + steps}", "scheduler.warmup_steps=0"], 1)
    cfg.eval.every, cfg.eval.metric = None, None
    recipe = recipe_class(cfg.task)(cfg)
    recipe.prepare()
    layout = Layout(1, 1)
    model, optimizer = by_hand(cfg, recipe, device)
    plain = copy.copy(recipe)
    plain.adopt(model)
    model.train()
    engine = make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), device, WARM + steps)
    engine.evaluate = lambda batches: type("", (), {"metrics": {"loss": 0.0}, "predictions": []})()  # type: ignore
    times: dict[str, list[float]] = {"ours": [], "arithmetic": [], "by_hand": []}
    clipping = cfg.optimizer.gradient_clipping or float("inf")

    def turn(row: dict[str, Any]) -> None:
        metrics.log(row)
        if "split" in row:
            return
        batches = loop.training_batches(row["step"] - 1, 0, recipe, cfg, layout)
        started = time.perf_counter()
        for batch in batches:
            tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
            (plain.loss(model, tensors) / sizes(cfg.batch)[0]).backward()
        middle = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        optimizer.zero_grad()
        ended = time.perf_counter()
        for name, seconds in (("ours", row["step_s"]), ("arithmetic", middle - started), ("by_hand", ended - started)):
            times[name].append(seconds)

    with tempfile.TemporaryDirectory() as folder:
        metrics = MetricsLog(Path(folder) / "metrics.jsonl", [])
        loop.run(engine, recipe, cfg, layout, 0, WARM + steps, turn)
        metrics.close()
    return {name: values[WARM:] for name, values in times.items()}


def row(name: str, times: dict[str, list[float]]) -> list[str]:
    """Cells of the table."""
    turns = list(zip(times["ours"], times["arithmetic"], times["by_hand"], strict=True))
    share, ratio = median(bare / ours for ours, bare, _ in turns), median(ours / hand for ours, _, hand in turns)
    mark = "" if share >= LEAST else " *"
    return [f"`{name}`", f"{1000 * median(times['ours']):.0f} ms", f"{share:.2f}{mark}", f"{ratio:.2f}"]


def main(argv: list[str]) -> int:
    words = [word for word in argv if "=" not in word]
    extra, own = split_arguments([word for word in argv if "=" in word], OWN)
    if own["one"]:
        print(json.dumps(measured(json.loads(own["one"]), int(own["steps"]))))
        sys.stdout.flush()
        os._exit(0)
    if len(words) != 1 or not Path(words[0]).is_dir():
        rule = "the folder of the data sets"
        raise RequestError(Problem("DATA_FOLDER", " ".join(words), rule, "python benchmarks/recipes.py DATA_FOLDER"))
    wanted, rows = own["only"].split(",") if own["only"] else None, []
    with tempfile.TemporaryDirectory() as made:
        for name, overrides in requests(Path(words[0]).resolve(), Path(made)).items():
            if wanted is not None and name not in wanted:
                continue
            request = json.dumps([f"+recipe={name}", *overrides, *extra])
            command = [sys.executable, str(ROOT / "benchmarks/recipes.py"), f"one={request}", f"steps={own['steps']}"]
            done = subprocess.run(command, capture_output=True, encoding="utf-8")
            if done.returncode:
                raise SystemExit(f"{name}\n{done.stderr[-3000:]}")
            rows.append(row(name, json.loads(done.stdout.splitlines()[-1])))
            print(*rows[-1], file=sys.stderr, flush=True)
    head = ["recipe", "our step", "forward and backward", "ours to by hand"]
    publish([f"({setting('1 rank')})", "", *table(head, rows)], own["out"])
    return 0


if __name__ == "__main__":
    run(main)
