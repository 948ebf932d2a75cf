"""What checkpoints cost: of a model of 135 M parameters, and of the quickstart's throughput.

python benchmarks/checkpoints.py [parts=big,quickstart] [saves=10] [out=FILE]

The model has the shape of SmolLM2-135M, fp32 with Adam, in one process. Memory is the resident set: its peak while a
checkpoint is written beside two steps, and while one is read, above the peak of two steps alone. Throughput: the
quickstart on two ranks with a checkpoint each ten steps, the steps beside a save against those around them.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import publish, run, setting, table, trained
from conf.errors import Problem, RequestError
from launch.runtime.request import split_arguments

OWN = {"parts": "big,quickstart", "saves": "10", "out": ""}
BETWEEN = 10
"""Steps from one save to the next."""
SHAPE = {
    "model.type": "llama", "model.config.hidden_size": 576, "model.config.intermediate_size": 1536,
    "model.config.num_hidden_layers": 30, "model.config.num_attention_heads": 9, "model.config.num_key_value_heads": 3,
    "model.config.vocab_size": 49152, "model.config.tie_word_embeddings": "true",
    "model.config.max_position_embeddings": 2048,
}  # fmt: skip


def peak_of(action: Callable[[], object]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a call, by Linux' own record of the peak."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    started = time.perf_counter()
    action()
    seconds = time.perf_counter() - started
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return seconds, int(found.group(1)) * 1024 if found else 0


def of_135_million(folder: Path) -> list[list[str]]:
    """Rows of the table: time and memory of steps, of a save beside them, of a load."""
    import torch

    from launch.runtime import processes
    from launch.runtime.checkpoint import newest
    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import Progress, training_batches
    from launch.runtime.request import read_request
    from launch.runtime.saving import Saving
    from launch.runtime.session import restored
    from launch.runtime.staged import make_engine
    from recipes import recipe_class

    overrides = [
        "+recipe=quickstart", "data.seq_length=64", "batch.global_size=1", "batch.micro_size=1", "data.max_files=60",
        f"run_dir={folder / 'big'}", *(f"{key}={value}" for key, value in SHAPE.items()),
    ]  # fmt: skip
    request = read_request(overrides, "benchmarks/checkpoints.py")
    cfg, layout = request.cfg, request.layout
    processes.set_environment(request.ranks, "cpu")
    recipe = recipe_class(cfg.task)(cfg)
    recipe.prepare()
    device = processes.join(request.ranks, "cpu", None)
    engine = make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), device, 20)
    saving = Saving(folder / "checkpoints", 2, 0, asdict(cfg), "rows")
    position = 0

    def steps() -> None:
        nonlocal position
        for _ in range(2):
            engine.train_step(training_batches(position, 0, recipe, cfg, layout))
            position += 1

    steps()  # the optimizer's state appears
    alone_s, alone = peak_of(steps)
    held = 0.0

    def save() -> None:
        nonlocal held
        started = time.perf_counter()
        saving.begin(engine, position, asdict(Progress(step=position)))
        held = time.perf_counter() - started
        steps()
        assert saving.finish()

    beside_s, beside = peak_of(save)

    def save_alone() -> None:
        saving.begin(engine, position, asdict(Progress(step=position)))
        assert saving.finish()

    save_s, saved = peak_of(save_alone)
    found = newest(folder / "checkpoints")
    assert found is not None
    load_s, loaded = peak_of(lambda: restored(engine, found, layout))
    weights = sum(parameter.nbytes for parameter in engine.module.parameters())
    size = sum(facts["bytes"] for facts in found.manifest["files"].values())

    def row(what: str, seconds: float, peak: int) -> list[str]:
        above = (peak - alone) / weights
        return [what, f"{seconds:.1f} s", f"{peak / 2**30:.2f} GiB", f"{above:+.2f}"]

    torch.distributed.barrier()
    return [
        row("two steps", alone_s, alone),
        row(f"two steps with a save beside them (held up {held:.2f} s at its start)", beside_s, beside),
        row(f"a save, {size / 2**30:.2f} GiB", save_s, saved),
        row("a load, in place", load_s, loaded),
    ]


def of_the_quickstart(folder: Path, saves: int) -> list[list[str]]:
    """Rows of the table: what a save costs the quickstart's steps, and what that is at one save each 50 steps.

    Within one run, each save against the steps around it: on a machine whose speed drifts two runs cannot be compared.
    """
    outside = []
    for every, steps in ((0, BETWEEN), (BETWEEN, saves * BETWEEN)):
        run_dir = folder / f"quickstart-{every}"
        trained(2, run_dir, "+recipe=quickstart", f"train.steps={steps}", "scheduler.warmup_steps=1", "eval.every=0",
                "eval.prompt=null", f"checkpoint.every={every}")  # fmt: skip
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        seconds = [row["step_s"] for row in rows if "step_s" in row]
        evaluations = sum(row.get("eval_s", 0.0) for row in rows)
        whole = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["train_s"]
        outside.append(whole - sum(seconds) - evaluations)
    beside = []
    for step in range(BETWEEN, len(seconds) - BETWEEN + 1, BETWEEN):  # `step` steps are done, and a save begins
        usual = median([*seconds[step - 4 : step], *seconds[step + 3 : step + 7]])
        beside.append(sum(seconds[step : step + 3]) - 3 * usual)
    usual = median(seconds)
    held = max(0.0, outside[1] - outside[0]) / saves
    share = (median(beside) + held) / (50 * usual)
    low, _, high = quantiles(beside, n=4)
    return [
        ["a step", f"{usual:.2f} s"],
        [
            f"{len(beside)} saves: the three steps beside one, longer by",
            f"{median(beside):+.2f} s ({low:+.2f} – {high:+.2f})",
        ],
        ["between steps, for each save", f"{held:.2f} s"],
        ["of the throughput, at a save each 50 steps", f"{share:.2%}"],
    ]


def main(argv: list[str]) -> int:
    _, own = split_arguments(argv, OWN)
    parts: dict[str, tuple[list[str], Callable[[Path], list[list[str]]]]] = {
        "big": (
            ["135 M parameters, one process", "time", "peak", "above steps, in sizes of the weights"],
            of_135_million,
        ),
        "quickstart": (["quickstart, 2 ranks", ""], lambda folder: of_the_quickstart(folder, int(own["saves"]))),
    }
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in own["parts"].split(","):
            if part not in parts:
                raise RequestError(Problem("parts", part, f"some of {', '.join(parts)}", "parts=big,quickstart"))
            head, rows = parts[part]
            lines += [*table(head, rows(Path(folder))), ""]
    command = " ".join(["python benchmarks/checkpoints.py", *(word for word in argv if not word.startswith("out="))])
    publish([f"`{command}`", "", f"({setting()})", "", *lines[:-1]], own["out"])
    return 0


if __name__ == "__main__":
    run(main)
