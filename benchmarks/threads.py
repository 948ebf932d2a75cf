"""How long threads that wait for each other should spin: a step alone on the machine, and beside a second job like it.

    python benchmarks/threads.py [spins=default,0,3000,30000] [turns=5] [out=FILE]

Each job is one process with as many threads as the machine has cores, as a run on one rank has. `default` leaves
libgomp to itself. Times are medians over the turns, which go through all settings one after the other.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import publish, run, setting, table
from launch.runtime.request import split_arguments

OWN = {"spins": "default,0,3000,30000", "turns": "5", "out": ""}
MODELS = ("convnext, 8×8 pixels, 32 rows", "llama_4m, 4 × 256 tokens")
WORK = """
import os, time, torch
from transformers import ConvNextConfig, ConvNextForImageClassification, LlamaConfig, LlamaForCausalLM
torch.set_num_threads(len(os.sched_getaffinity(0)))
small = ConvNextForImageClassification(ConvNextConfig(image_size=8, num_channels=1, patch_size=1, num_stages=2,
                                                      hidden_sizes=[16, 32], depths=[1, 1], num_labels=10))
pixels, ids = torch.randn(32, 1, 8, 8), torch.randint(4096, (4, 256))
large = LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=4, vocab_size=4096,
                                     num_attention_heads=4, num_key_value_heads=2))
for model, loss, seconds in ((small, lambda: small(pixel_values=pixels).logits.sum(), 5),
                             (large, lambda: large(input_ids=ids, labels=ids).loss, 5)):
    optimizer, steps = torch.optim.AdamW(model.parameters(), fused=True), 0
    for _ in range(2):
        loss().backward(); optimizer.step()
    started = time.perf_counter()
    while (now := time.perf_counter()) - started < seconds or steps < 2:
        loss().backward(); optimizer.step(); optimizer.zero_grad(); steps += 1
    print((now - started) / steps)
"""


def steps(spins: str, jobs: int) -> list[float]:
    """Seconds of a step of each model, while `jobs` processes do the same."""
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    environment |= {} if spins == "default" else {"GOMP_SPINCOUNT": spins}
    started = [subprocess.Popen([sys.executable, "-c", WORK], env=environment, stdout=subprocess.PIPE, encoding="utf-8")
               for _ in range(jobs)]  # fmt: skip
    found = [[float(line) for line in job.communicate()[0].split()] for job in started]
    return [statistics.mean(times) for times in zip(*found, strict=True)]


def main(argv: list[str]) -> int:
    _, own = split_arguments(argv, OWN)
    settings, turns = own["spins"].split(","), int(own["turns"])
    found: dict[tuple[str, int], list[list[float]]] = {}
    for _ in range(turns):
        for spins in settings:
            for jobs in (1, 2):
                found.setdefault((spins, jobs), []).append(steps(spins, jobs))
    rows = []
    for spins in settings:
        cells = [
            f"{1000 * statistics.median(turn[model] for turn in found[spins, jobs]):.1f}"
            for model in range(len(MODELS))
            for jobs in (1, 2)
        ]
        rows.append([spins, *cells])
    head = ["GOMP_SPINCOUNT", *(f"{model}: ms {how}" for model in MODELS for how in ("alone", "beside another"))]
    command = f"`{' '.join(['python benchmarks/threads.py', *argv])}`"
    publish([command, "", f"({setting()})", "", *table(head, rows)], own["out"])
    return 0


if __name__ == "__main__":
    run(main)
