"""Whole runs through the real launchers, from another working directory, overrides in any order."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, SMALL, TRAIN, environment, launcher, rows, run

pytestmark = pytest.mark.slow
STEP_KEYS = {"step", "loss", "lr", "grad_norm", "tokens", "samples", "tokens_per_s", "step_s", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory) -> dict[str, Path]:
    """One run by each launcher; deepspeed and torchrun on two ranks."""
    made = {}
    for kind in ("python", "torchrun", "deepspeed"):
        folder = tmp_path_factory.mktemp(kind)
        overrides = list(SMALL)
        random.Random(kind).shuffle(overrides)
        done = run([*launcher(kind, 2), TRAIN, *overrides], folder, environment(cache))
        assert done.returncode == 0, done.stdout + done.stderr
        made[kind] = folder / "runs" / "quickstart"
        made[f"{kind} said"] = done.stdout
    return made


@pytest.mark.parametrize("kind", ["python", "torchrun", "deepspeed"])
def test_the_run_directory_holds_what_the_contract_says(runs, kind: str) -> None:
    run_dir = runs[kind]
    names = {path.name for path in run_dir.iterdir()}
    assert {
        "config.yaml",
        "ds_config.json",
        "metrics.jsonl",
        "summary.json",
        "loss.png",
        "model",
        "logs",
        "tensorboard",
    } <= names
    training, evaluations = rows(run_dir)
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    assert all(set(row) >= STEP_KEYS for row in training)
    assert [row["step"] for row in evaluations] == [0, 4]
    assert '"auto"' not in (run_dir / "ds_config.json").read_text()
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["held_out"]["loss"] == evaluations[-1]["loss"]


def test_losses_do_not_depend_on_launcher_or_ranks(runs) -> None:
    reference, _ = rows(runs["python"])
    for kind in ("torchrun", "deepspeed"):
        for mine, theirs in zip(rows(runs[kind])[0], reference, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
            assert (mine["tokens"], mine["samples"], mine["lr"]) == (theirs["tokens"], theirs["samples"], theirs["lr"])


def test_the_terminal_shows_what_a_person_wants(runs) -> None:
    said = runs["python said"]
    assert "8 sequences = 2 micro × 4 accumulation × 1 data rank" in said
    for words in ("held-out loss", "perplexity", "tokens/s", "loss.png", "quickstart/model", "continues"):
        assert words in said, words
    for chatter in ("[INFO]", "Warning", "warn("):
        assert chatter not in said
    assert "8 sequences = 2 micro × 2 accumulation × 2 data ranks" in runs["deepspeed said"]


def test_the_exported_model_loads_and_continues_text(runs) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(runs["deepspeed"] / "model")
    tokenizer = AutoTokenizer.from_pretrained(runs["deepspeed"] / "model")
    assert tokenizer.decode(tokenizer("def main(x):\n    é")["input_ids"]).startswith("def main(x):\n    é")
    assert model.config.vocab_size >= len(tokenizer)
    assert (
        model.generate(**tokenizer("import", return_tensors="pt", return_token_type_ids=False), max_new_tokens=3).shape[
            1
        ]
        >= 4
    )


def test_a_second_run_asks_before_it_replaces(runs, cache) -> None:
    before = (runs["python"] / "metrics.jsonl").read_bytes()
    done = run([sys.executable, TRAIN, *SMALL], runs["python"].parents[1], environment(cache))
    assert done.returncode == 2 and done.stderr.startswith("error:") and "overwrite=true" in done.stderr
    assert (runs["python"] / "metrics.jsonl").read_bytes() == before


def test_ctrl_c_leaves_a_checkpoint_and_no_process(cache, tmp_path: Path) -> None:
    """Whole rows too; and the run goes on from there."""
    command = [*launcher("deepspeed", 2), str(TRAIN), *SMALL, "train.steps=100000"]
    job = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    metrics, deadline = tmp_path / "runs/quickstart/metrics.jsonl", time.monotonic() + 120
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
            assert job.poll() is None and time.monotonic() < deadline, job.stdout.read()
            time.sleep(0.1)
        os.killpg(job.pid, signal.SIGINT)  # what a terminal does
        job.wait(timeout=60)
        deadline = time.monotonic() + 30
        while _alive(job.pid):
            assert time.monotonic() < deadline, f"orphans: {_alive(job.pid)}"
            time.sleep(0.2)
    finally:
        for pid in _alive(job.pid):
            os.kill(pid, signal.SIGKILL)
    assert job.returncode not in (0, 2)
    training, _ = rows(tmp_path / "runs/quickstart")
    done = len(training)
    assert [row["step"] for row in training] == list(range(1, done + 1))
    assert [folder.name for folder in (tmp_path / "runs/quickstart/checkpoints").iterdir()] == [f"step_{done:08d}"]
    more = [sys.executable, TRAIN, *SMALL, f"train.steps={done + 2}", "resume=auto"]
    again = run(more, tmp_path, environment(cache))
    assert again.returncode == 0, again.stderr
    assert f"resumes after step {done}" in again.stdout and f"train.steps: 100000 -> {done + 2}" in again.stdout
    training, held_out = rows(tmp_path / "runs/quickstart")
    assert [row["step"] for row in training] == list(range(1, done + 3))
    assert [row["step"] for row in held_out] == [0, done + 2]


def _alive(session: int) -> list[int]:
    """Processes of the session that the job was started in (zombies left out)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_completion_and_help_answer_without_a_recipe(cache, tmp_path: Path) -> None:
    done = run([sys.executable, TRAIN, "--help"], tmp_path, environment(cache))
    assert done.returncode == 0 and "zero" in done.stdout and "precision" in done.stdout
    done = run([sys.executable, TRAIN], tmp_path, environment(cache))
    assert done.returncode == 2 and "+recipe=quickstart" in done.stderr
    assert not list(tmp_path.iterdir()), "asking for help wrote files"


def test_every_recipe_says_its_command_and_description() -> None:
    for path in sorted((ROOT / "conf" / "recipe").glob("*.yaml")):
        header = path.read_text()
        assert "# description: " in header and f"launch/train.py +recipe={path.stem}" in header, path.name
