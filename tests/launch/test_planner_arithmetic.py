"""FLOPs, peaks and bytes on the wire, against numbers worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.batch import Layout
from conf.schema import BatchConfig, Config, OptimizerConfig, PrecisionConfig, ZeroConfig
from launch.planner.communication import all_reduce, bytes_per_step, half_ring
from launch.planner.flops import flops_per_token, peak_flops

ROOT = Path(__file__).resolve().parents[2]


def shape(**changes: Any) -> Any:
    given = {
        "parameters": 1000, "idle": 0, "embedding": 100, "head": 0, "layers": 2, "layer_parameters": (450, 450),
        "tensors": [("embed.weight", (5, 20)), ("w", (890,)), ("norm", (10,))], "tied": True, "vocab": 5, "hidden": 20,
        "seq_length": 64,
        "heads": 2, "head_dim": 10, "activations": None,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


def config(stage: int, accumulation: int = 1, precision: str = "bf16", name: str = "adamw", **zero: Any) -> Config:
    return Config(
        batch=BatchConfig(global_size=8, micro_size=1, accumulation=accumulation),
        optimizer=OptimizerConfig(name=name),
        precision=PrecisionConfig(name=precision, accumulation_dtype="fp32"),
        zero=ZeroConfig(stage=stage, **{"param_persistence_threshold": 20, **zero}),
    )


def test_rings() -> None:
    assert (all_reduce(1000, 4), half_ring(1000, 4)) == (1500, 750)
    assert (all_reduce(1000, 1), half_ring(1000, 1)) == (0, 0)


@pytest.mark.parametrize(
    "stage,accumulation,sent",
    [
        # 1000 parameters, weights in 2 bytes, gradients in 4, over 4 ranks.
        (0, 3, {"all-reduce gradients": 6000}),
        (1, 3, {"all-reduce gradients": 6000, "all-gather updated parameters": 1500}),
        (2, 3, {"all-reduce gradients": 3 * 6000, "all-gather updated parameters": 1500}),
        (
            3,
            3,
            {
                "all-gather parameters for forward": 3 * 1485,
                "all-gather parameters for backward": 3 * 1485,
                "reduce-scatter gradients": 3 * 3000,
                "all-gather small parameters": 15,
            },
        ),
    ],
)
def test_bytes_by_stage(stage: int, accumulation: int, sent: dict[str, int]) -> None:
    assert bytes_per_step(shape(), config(stage, accumulation), Layout(4, 4)) == sent


def test_zero_plus_plus_shrinks_each_of_the_three() -> None:
    plain = bytes_per_step(shape(), config(3), Layout(8, 8))
    plus = config(3, quantized_weights=True, quantized_gradients=True, hpz_partition_size=2)
    sent = bytes_per_step(shape(), plus, Layout(8, 8))
    assert sent["all-gather parameters for forward"] * 2 == pytest.approx(
        plain["all-gather parameters for forward"], abs=2
    )
    assert sent["all-gather parameters for backward"] == 990 * 2 // 2
    assert sent["all-to-all quantised gradients"] < plain["reduce-scatter gradients"]


def test_muon_cannot_reduce_scatter() -> None:
    assert bytes_per_step(shape(), config(3, name="muon"), Layout(4, 4))["all-reduce gradients"] == 6000


def test_one_rank_sends_nothing() -> None:
    assert all(bytes_per_step(shape(), config(stage), Layout(1, 1)) == {} for stage in range(4))


def test_flops_of_a_tied_and_of_an_untied_head() -> None:
    attention = 12 * 2 * 2 * 10 * 64
    assert flops_per_token(shape()) == 6 * 1000 + attention  # the embedding multiplies, as the head
    assert flops_per_token(shape(tied=False, head=100, parameters=1100)) == 6 * 1000 + attention


def test_peaks_are_exact_or_unknown() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16_autocast") == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
    assert peak_flops("NVIDIA H100", "bf16") is None
    assert peak_flops("cpu", "fp32") is None


def test_the_planner_never_imports_torch() -> None:
    modules = ", ".join(
        f"launch.planner.{file.stem}" for file in (ROOT / "launch/planner").glob("*.py") if file.stem != "__init__"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
