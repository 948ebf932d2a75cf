"""What checkpoints cost: of a model of 135 M parameters, and of the quickstart's throughput.

python benchmarks/checkpoints.py [rounds=2] [steps=100] [out=FILE]

The model has the shape of SmolLM2-135M, fp32 with Adam, in one process. Memory is the resident set: its peak while a
checkpoint is written beside two steps, and while one is read, above the peak of two steps alone. Throughput: the
quickstart on two ranks with a checkpoint each 50 steps and without, in turns.
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
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import publish, run, setting, table, trained
from launch.runtime.request import split_arguments

OWN = {"rounds": "2", "steps": "100", "out": ""}
SHAPE = {
    "model.type": "llama", "model.config.hidden_size": 576, "model.config.intermediate_size": 1536,
    "model.config.num_hidden_layers": 30, "model.config.num_attention_heads": 9, "model.config.num_key_value_heads": 3,
    "model.config.vocab_size": 49152, "model.config.tie_word_embeddings": "true",
    "model.config.max_position_embeddings": 2048,
}  # fmt: skip


def peak_of(action: Callable[[], object]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a call, by Linux' own record of the peak."""
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    action()
    seconds = time.perf_counter() - started
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return seconds, int(found.group(1)) * 1024 if found else 0


def of_135_million(folder: Path) -> list[list[str]]:
    """Rows of the table: time and memory of steps, of a save beside them, of a load."""
    import torch

    from conf.compose import compose
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
        "+recipe=quickstart", "data.seq_length=64", "batch.global_size=1", "data.max_files=60",
        f"run_dir={folder / 'big'}", *(f"{key}={value}" for key, value in SHAPE.items()),
    ]  # fmt: skip
    assert compose(overrides, 1) is not None
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


def of_the_quickstart(folder: Path, rounds: int, steps: int) -> list[list[str]]:
    """Rows of the table: seconds of all steps without checkpoints and with one each 50."""
    seconds: dict[int, list[float]] = {0: [], 50: []}
    for number in range(rounds):
        for every, found in seconds.items():
            run_dir = folder / f"quickstart-{every}-{number}"
            trained(2, run_dir, "+recipe=quickstart", f"train.steps={steps}", "eval.every=0", "eval.prompt=null",
                    f"checkpoint.every={every}")  # fmt: skip
            rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            evaluations = sum(row.get("eval_s", 0.0) for row in rows)
            found.append(json.loads((run_dir / "summary.json").read_text())["train_s"] - evaluations)
    ratios = [with_ / without for without, with_ in zip(seconds[0], seconds[50], strict=True)]
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    return [
        ["no checkpoint", f"{median(seconds[0]):.1f} s", ""],
        ["one each 50 steps", f"{median(seconds[50]):.1f} s", f"{median(ratios):.3f} ({shown})"],
    ]


def main(argv: list[str]) -> int:
    _, own = split_arguments(argv, OWN)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quick = of_the_quickstart(folder, int(own["rounds"]), int(own["steps"]))
        big = of_135_million(folder)
    command = " ".join(["python benchmarks/checkpoints.py", *(word for word in argv if not word.startswith("out="))])
    publish(
        [
            f"`{command}`", "", f"({setting()})", "",
            *table(["135 M parameters, one process", "time", "peak", "above steps, in sizes of the weights"], big), "",
            *table([f"quickstart, 2 ranks, {own['steps']} steps", "time of the steps", "ratio in turns"], quick),
        ],
        own["out"],
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
