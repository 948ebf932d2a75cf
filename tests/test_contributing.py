"""The examples of CONTRIBUTING.md are true: each is put where it says it belongs, in a copy of the rooms, and used."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment, rows, run

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = {
    path: body for path, body in re.findall(r"^```\w+\n# (\S+/\S+\.\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
}
"""Path → what is in the fenced block after the line with the path."""
SMALL = ("model=llama_tiny", "data.seq_length=64", "batch.global_size=8", "batch.micro_size=2")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the rooms with every example in its place, and some rows to read."""
    house = tmp_path_factory.mktemp("house")
    for room in ("conf", "recipes", "launch"):
        shutil.copytree(ROOT / room, house / room, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("conf/recipe/pretrain_notes.yaml", "conf/data/questions.yaml", "recipes/multiple_choice.py"):
        (house / path).write_text(EXAMPLES[path])
    rules = house / "conf/rules_run.py"
    rules.write_text(
        re.sub(
            r"^RULES = \((.*)\)$",
            lambda found: f"{EXAMPLES['conf/rules_run.py']}\n\nRULES = ({found[1]}, peak_is_reached)",
            rules.read_text(),
            flags=re.MULTILINE,
        )
    )
    (house / "notes").mkdir()
    for number in range(8):
        (house / "notes" / f"{number}.md").write_text(f"# Note {number}\n\n" + "A sentence about something. " * 200)
    with (house / "questions.jsonl").open("w") as file:
        for number in range(200):
            file.write(json.dumps({"question": f"What is {number} + 1?", "answer": f"It is {number + 1}."}) + "\n")
    return house


def problems(house: Path, *overrides: str) -> list[str]:
    """The keys that a request is refused for, in the copy."""
    code = (
        "import json, sys\nfrom conf.compose import compose\nfrom conf.environment import Environment\n"
        "from conf.errors import RequestError\n"
        "try:\n    compose(sys.argv[1:], 2, Environment())\n    print('[]')\n"
        "except RequestError as error:\n    print(json.dumps([p.key for p in error.problems]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *overrides], cwd=house, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_examples_are_found() -> None:
    assert len(EXAMPLES) == TEXT.count("\n```") / 2 == 5


def test_the_recipe(house: Path) -> None:
    assert problems(house, "+recipe=pretrain_notes", "data.path=notes/**/*.md") == []
    assert problems(house, "+recipe=pretrain_notes") == ["data.path"]
    header = EXAMPLES["conf/recipe/pretrain_notes.yaml"]
    assert header.startswith("# @package _global_\n# description: ") and "# needs: " in header and "# loss: " in header


def test_the_data_source(house: Path) -> None:
    assert problems(house, "+recipe=finetune_causal_lm", "model.path=owner/name", "data=questions") == []
    assert problems(house, "+recipe=quickstart", "data=questions", "data.text=x") == ["data.text"]


def test_the_rule_and_its_case(house: Path) -> None:
    wrong, key, legal, _ = eval(EXAMPLES["tests/conf/test_conf_rules.py"].strip(), {"CPU": None})
    assert problems(house, "+recipe=quickstart", *wrong) == [key]
    assert problems(house, "+recipe=quickstart", *legal) == []


@pytest.mark.slow
def test_the_task_trains(house: Path, tmp_path: Path) -> None:
    """Which answer names the number of the question: easy to learn, and chance is a third."""
    draw = random.Random(0)
    with (tmp_path / "choices.jsonl").open("w") as file:
        for _ in range(200):
            number, *others = draw.sample(range(9), 3)
            answers = [f"It is {one}." for one in sorted([number, *others])]
            row = {"question": f"Which is {number}?", "answers": answers, "label": answers.index(f"It is {number}.")}
            file.write(json.dumps(row) + "\n")
    request = ["+recipe=classify_packages", "task=multiple_choice", "data=jsonl", f"data.path={tmp_path}/choices.jsonl"]
    request += ["data.vocab_size=300", "train.epochs=null", "train.steps=60", "scheduler.warmup_steps=2"]
    request += ["optimizer.lr=2e-3", "model.config.num_hidden_layers=2", "data.seq_length=32"]
    done = run([sys.executable, house / "launch" / "train.py", *request], house, environment(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    training, held_out = rows(house / "runs" / "classify_packages")
    assert len(training) == 60 and held_out[-1]["loss"] < held_out[0]["loss"]
    assert held_out[-1]["accuracy"] > 0.5
    assert "empty rows" not in done.stdout, "a label of 0 is not an empty row"
