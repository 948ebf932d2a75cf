"""Rows that do not reach the model as they are: counted by reason, said with their place, refused when many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import TRAIN, environment, launcher, run

from conf.errors import RequestError
from recipes.checksums import SEAL, seal
from recipes.data import cache, encode
from recipes.data.cache import prepare
from recipes.data.changes import check_dropped, enough, lines, place_of, where


def rows(long: int, count: int = 40) -> list[dict[str, str]]:
    """`long` of them have a prompt that fills a sequence of 32 tokens, from the third on."""
    return [{"p": "the fox " * (30 if 2 <= n < 2 + long else 1), "c": " yes"} for n in range(count)]


def kept(prepared) -> int:
    return sum(part["documents"] - part["without_supervision"] for part in sections(prepared))


def sections(prepared) -> list[dict]:
    return [prepared.report["sources"][0][split] for split in ("train", "held_out")]


@pytest.fixture
def data(write, config):
    def data(long: int, **keys):
        return config(kind="jsonl", path=str(write("rows.jsonl", rows(long))), prompt="p", completion="c", **keys)

    return data


def test_many_rows_without_anything_to_learn_are_refused_with_advice_that_works(data, tokenizer):
    with pytest.raises(RequestError) as refusal:
        prepare(data(30), tokenizer, seed=0)
    said = str(refusal.value)
    assert "30 of 40 rows are dropped, more than data.max_dropped=0.05" in said and "rows.jsonl:3" in said
    (problem,) = refusal.value.problems
    length, _, allowed = problem.nearest.partition(", ")
    prepared = prepare(data(30, seq_length=int(length.partition("=")[2])), tokenizer, seed=0)
    assert kept(prepared) == 40 and prepared.report["changes"] == []
    share = float(allowed.partition("data.max_dropped=")[2].partition(" ")[0])
    prepared = prepare(data(30, max_dropped=share), tokenizer, seed=0)
    assert kept(prepared) == 10
    with pytest.raises(RequestError):
        prepare(data(30, max_dropped=share - 0.01), tokenizer, seed=0)


def test_a_few_are_dropped_with_a_word(data, tokenizer):
    (change,) = prepare(data(2), tokenizer, seed=0).report["changes"]
    assert (change["effect"], change["count"], change["of"]) == ("dropped", 2, 40)
    (line,) = lines([change])
    assert line.startswith("dropped: 2 rows in which nothing to learn") and f"first: {change['first']}" in line
    assert change["first"].endswith("rows.jsonl:3") and "5.0% of 40 rows" in line


def test_what_is_cut_is_said_and_not_what_is_dropped(write, config, tokenizer):
    long = [{"p": "a", "c": "the fox " * (40 if n < 5 else 1)} for n in range(40)]
    data = config(kind="jsonl", path=str(write("rows.jsonl", long)), prompt="p", completion="c")
    (change,) = prepare(data, tokenizer, seed=0).report["changes"]
    assert (change["effect"], change["count"], change["first"]) == ("cut", 5, f"{data.path}:1")
    data.seq_length = change["seq_length"]
    assert prepare(data, tokenizer, seed=0).report["changes"] == []


def test_a_second_start_says_the_same_without_reading_again_and_with_the_names_of_now(
    data, tokenizer, monkeypatch, tmp_path
):
    config = data(2)
    first = prepare(config, tokenizer, seed=0).report["changes"]
    monkeypatch.setattr(encode.Encoder, "encode", lambda *args: pytest.fail("tokenised again"))
    monkeypatch.setattr(cache, "pack", lambda *args: pytest.fail("packed again"))
    assert prepare(config, tokenizer, seed=0).report["changes"] == first
    (tmp_path / "moved").mkdir()
    config.path = shutil.move(config.path, tmp_path / "moved/rows.jsonl")
    (moved,) = prepare(config, tokenizer, seed=0).report["changes"]
    assert moved["first"] == f"{tmp_path}/moved/rows.jsonl:3" and moved["count"] == 2
    config.max_dropped = 0.01
    with pytest.raises(RequestError, match=r"2 of 40 rows are dropped"):
        prepare(config, tokenizer, seed=0)


def test_a_cache_of_an_earlier_format_is_not_read(data, tokenizer, monkeypatch):
    config = data(2)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT - 1)
    prepare(config, tokenizer, seed=0)
    for folder in Path(config.cache_dir).glob("*-*/manifest.json"):  # as it was before rows were counted by reason
        manifest = json.loads(folder.read_text())
        for name in ("changes", "rows", "beyond", "first_beyond"):
            manifest["facts"].pop(name, None)
        manifest.pop(SEAL)
        folder.write_text(json.dumps(seal(manifest)))
    monkeypatch.undo()
    assert prepare(config, tokenizer, seed=0).report["changes"][0]["count"] == 2


def test_places_outlive_the_names_of_files():
    origins = ["/a/b", "/a/b:c", "/d"]
    for place in ("/a/b", "/a/b:12", "/d: question 7", "elsewhere:3"):
        assert where(place_of(place, origins), origins) == place
    assert where(place_of("/d:4", origins), ["x", "y", "z"]) == "z:4"


def test_the_length_that_is_enough():
    assert enough({}, 0) is None and enough({100: 2}, 2) is None
    assert enough({100: 2}, 1) == 104 and enough({100: 2, 50: 3}, 2) == 56


def test_no_length_is_advised_where_none_helps():
    change = {"what": "rows", "effect": "dropped", "count": 8, "of": 10, "first": "f:1", "seq_length": None}
    (problem,) = check_dropped([{**change, "source": "f"}], "data", 10, 0.05)
    assert problem.nearest == "data.max_dropped=0.8 to train without them"
    (problem,) = check_dropped([{**change, "source": "f", "count": 10}], "data", 10, 0.05)
    assert problem.nearest == "rows with something to learn"


def test_all_ranks_refuse_and_the_summary_tells(write, tmp_path):
    path = write("rows.jsonl", rows(2))
    command = [
        *launcher("torchrun", 2), TRAIN, "+recipe=finetune_causal_lm", "model=llama_tiny", "data=jsonl",
        f"data.path={path}", "data.prompt=p", "data.completion=c", "data.seq_length=32", "batch.global_size=4",
        "batch.micro_size=2", "train.steps=1", "train.epochs=null", "scheduler.warmup_steps=0", "eval.prompt=null",
        "data.vocab_size=300", "run_dir=run",
    ]  # fmt: skip
    env = environment(tmp_path / "cache")
    refusal = run([*command, "data.max_dropped=0.01"], tmp_path, env)
    assert refusal.returncode == 2 and "data.max_dropped=0.05 to train without them" in refusal.stderr, refusal.stderr
    assert not (tmp_path / "run").exists()
    done = run(command, tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert "dropped: 2 rows" in done.stdout and done.stdout.index("dropped:") < done.stdout.index("starting the engine")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    (change,) = summary["changes"]
    assert summary["unreadable"] == []
    assert (change["count"], change["of"], change["first"]) == (2, 40, f"{path}:3")
