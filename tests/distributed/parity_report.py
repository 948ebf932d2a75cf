"""The table of docs/accuracy.md, how close every layout comes: `python tests/distributed/parity_report.py`."""

# ruff: noqa: E402 - started as a script, it first puts the suite on sys.path
from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "distributed")]

os.environ["TESTS_THOROUGH"] = "1"  # all combinations, of which `make test` takes half

import conftest  # noqa: F401 - the suite's settings: CPU, one thread
import numpy as np
import test_parity as parity


def main() -> None:
    print("| ranks | ZeRO stage | loss | gradient norm | gradient of one parameter |\n| --- | --- | --- | --- | --- |")
    for world in parity.WORLDS:
        for stage in parity.STAGES:
            worst = np.zeros(3)
            for (one, _, _), steps in parity.runs(world).items():
                if one == stage:
                    worst = np.maximum(worst, errors(steps))
            print(f"| {world} | {stage} | " + " | ".join(f"{error:.1e}" for error in worst) + " |")


def errors(steps: list) -> np.ndarray:
    """Largest relative errors of loss, norm and single gradients (L2) over all steps of one run."""
    worst = np.zeros(3)
    for (loss, norm, gradients), (loss0, norm0, gradients0) in zip(steps, parity.reference(), strict=True):
        gradient = max(
            np.linalg.norm(gradients[name] - gradients0[name]) / np.linalg.norm(gradients0[name]) for name in gradients
        )
        worst = np.maximum(worst, [abs(loss - loss0) / loss0, abs(norm - norm0) / norm0, gradient])
    return worst


if __name__ == "__main__":
    main()
