"""Checkpoints of a release, which every later one must resume: `python tests/golden/make.py VERSION`.

Writes `tests/golden/VERSION/`: for each run of `RUNS` a checkpoint after step 3 and what the steps behind it gave. They
stay; a release adds its own (`test_golden.py` resumes all there are). Tokenizer and rows beside them stay, too.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests")]

from commands import TRAIN, environment, launcher, rows, run

HERE = Path(__file__).resolve().parent
SAVED, STEPS = 3, 6
COMMON = (
    "data.seq_length=32", "batch.global_size=8", "batch.micro_size=2", f"train.steps={STEPS}",
    "optimizer.weight_decay=0.1", "scheduler=linear", "scheduler.warmup_steps=1", "track=none",
    "precision=fp32", "device=cpu", "seed=5", "model.tokenizer=tokenizer", "run_dir=run",
    "data.held_out=0.1", "data.cache_dir=cache",
)  # fmt: skip
RUNS = {
    "language_model": (2, (
        "+recipe=quickstart", "model=llama_tiny", "data=text", "data.path=text.txt", "model.config.vocab_size=280",
        "model.config.hidden_size=8", "model.config.intermediate_size=16", "model.config.num_attention_heads=2",
        "model.config.num_key_value_heads=1", "model.config.max_position_embeddings=32", "zero=stage2",
        "optimizer.lr=0.03", "eval.new_tokens=2", *COMMON,
    )),
    "classes": (1, (
        "+recipe=classify_packages", "model=bert_4m", "data=csv", "data.path=rows.csv", "data.vocab_size=null",
        "model.config.hidden_size=8", "model.config.intermediate_size=16", "model.config.num_attention_heads=2",
        "model.config.num_hidden_layers=1", "model.config.max_position_embeddings=32", "zero=stage3",
        "batch.accumulation=4", "optimizer.lr=0.01", *COMMON,
    )),
}  # fmt: skip
"""Name → (ranks, arguments); in a folder with the tokenizer and the rows."""


def write_rows() -> None:
    """The text, the table and the tokenizer; once, they are never written again."""
    from recipes.data.tokenizer import train_tokenizer

    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    lines = [
        f"{numbers[a]} and {numbers[b]} are {a + b}, {numbers[b]} times {numbers[a]} is {a * b}."
        for a in range(10)
        for b in range(10)
    ]
    (HERE / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = [f'"{line}",{("even", "odd")[(number // 10 + number) % 2]}' for number, line in enumerate(lines)]
    (HERE / "rows.csv").write_text("text,label\n" + "\n".join(table) + "\n", encoding="utf-8")
    train_tokenizer(iter(lines), 280).save_pretrained(HERE / "tokenizer")


def lay_out(folder: Path) -> None:
    """What the runs read."""
    shutil.copytree(HERE / "tokenizer", folder / "tokenizer")
    for name in ("text.txt", "rows.csv"):
        shutil.copy(HERE / name, folder)


def make(target: Path) -> None:
    for name, (ranks, arguments) in RUNS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            lay_out(folder)
            command = [*launcher("torchrun" if ranks > 1 else "python", ranks), TRAIN, *arguments]
            done = run(
                [*command, f"checkpoint.every={SAVED}", "checkpoint.keep=9"], folder, environment(folder / "xdg")
            )
            assert done.returncode == 0, done.stdout + done.stderr
            training, evaluations = rows(folder / "run")
            kept = [{key: row[key] for key in ("step", "loss", "grad_norm", "lr")} for row in training[SAVED:]]
            (target / name).mkdir(parents=True)
            checkpoint = f"step_{SAVED:08d}"
            shutil.copytree(folder / "run/checkpoints" / checkpoint, target / name / checkpoint)
            shutil.copy(folder / "run/config.yaml", target / name)
            expected = {"rows": kept, "held_out": evaluations[-1]["loss"]}
            (target / name / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    (version,) = sys.argv[1:]
    if (HERE / version).exists():
        raise SystemExit(f"{HERE / version} is there, and stays as it is")
    if not (HERE / "tokenizer").exists():
        write_rows()
    make(HERE / version)
