"""Prepared data: tokenised once, kept by content, rebuilt when damaged, the same for every rank."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from conf.errors import RequestError
from conf.schema import SourceConfig
from recipes.data import cache, encode
from recipes.data.cache import prepare
from recipes.data.store import ArrayWriter, entry
from recipes.data.tokenizer import id_count

TEXTS = [{"text": f"row {i}: the quick brown fox jumps over {i} lazy dogs"} for i in range(60)]


def everything(sequences) -> list[list[int]]:
    """All rows of a set, comparable."""
    return [np.concatenate(list(sequences.row(i).values())).tolist() for i in range(len(sequences))]


def no_encoding(*args):
    raise AssertionError("tokenised again")


@pytest.fixture
def data(write, config):
    return config(kind="jsonl", path=str(write("rows.jsonl", TEXTS)))


def test_what_is_prepared_is_what_was_written(data, tokenizer):
    prepared = prepare(data, tokenizer, seed=0)
    (train,), held_out = prepared.train, prepared.held_out
    written = {tuple(tokenizer(row["text"])["input_ids"]) for row in TEXTS}
    read = []
    for sequences in (train, held_out):
        for index in range(len(sequences)):
            row = sequences.row(index)
            ids = row["input_ids"][: sequences.tokens(index)]
            starts = np.flatnonzero(row["position_ids"][: len(ids)] == 0).tolist()
            read += [tuple(piece[:-1].tolist()) for piece in np.split(ids, starts[1:])]
            assert all(piece[-1] == tokenizer.eos_token_id for piece in np.split(ids, starts[1:]))
    assert len(read) == len(TEXTS) and set(read) == written
    report = prepared.report["sources"][0]
    assert report["train"]["documents"] + report["held_out"]["documents"] == len(TEXTS)
    assert report["train"]["sequences"] == len(train) == len(prepared.dataset()) == len(prepared.order())
    assert report["train"]["supervised"] == sum(train.supervised(i) for i in range(len(train)))
    assert report["train"]["padding"] == pytest.approx(
        1 - sum(train.tokens(i) for i in range(len(train))) / (len(train) * data.seq_length)
    )


def test_the_second_run_opens_what_the_first_wrote(data, tokenizer, monkeypatch):
    first = prepare(data, tokenizer, seed=0)
    monkeypatch.setattr(encode.Encoder, "encode", no_encoding)
    monkeypatch.setattr(cache, "pack", no_encoding)
    second = prepare(data, tokenizer, seed=0)
    assert everything(first.train[0]) == everything(second.train[0])
    assert first.report == second.report


def test_another_sequence_length_packs_but_does_not_tokenise(data, tokenizer, monkeypatch):
    prepare(data, tokenizer, seed=0)
    monkeypatch.setattr(encode.Encoder, "encode", no_encoding)
    data.seq_length = 64
    assert len(prepare(data, tokenizer, seed=0).train[0].row(0)["input_ids"]) == 64


@pytest.mark.parametrize("change", ["content", "split", "column", "tokenizer"])
def test_whatever_changes_the_tokens_tokenises_again(data, tokenizer, chat_tokenizer, write, change):
    before = prepare(data, tokenizer, seed=0)
    if change == "content":
        stat = os.stat(data.path)
        Path(data.path).write_text(Path(data.path).read_text().replace("row 7", "ROW 7"))  # same size
        os.utime(data.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "split":
        data.held_out = 0.5
    elif change == "column":
        write("rows.jsonl", [row | {"other": "x"} for row in TEXTS])
        prepare(data, tokenizer, seed=0)
        data.text = "other"
    else:
        tokenizer = chat_tokenizer
    after = prepare(data, tokenizer, seed=0)
    assert after.report["fingerprint"] != before.report["fingerprint"]
    assert everything(after.train[0]) != everything(before.train[0])


@pytest.mark.parametrize("where", ["other.jsonl", "below/rows.jsonl", "rows.jsonl.gz"])
def test_the_same_rows_elsewhere_are_the_same_rows(data, tokenizer, write, monkeypatch, where):
    """Under another path they are found in the cache; in another form they are read again, and still the same."""
    before = prepare(data, tokenizer, seed=0)
    data.path = str(write(where, TEXTS))
    if not where.endswith(".gz"):
        monkeypatch.setattr(encode.Encoder, "encode", no_encoding)
    after = prepare(data, tokenizer, seed=0)
    assert after.report["fingerprint"] == before.report["fingerprint"]
    data.cache_dir = f"{data.cache_dir}-2"
    monkeypatch.undo()
    assert prepare(data, tokenizer, seed=0).report["fingerprint"] == before.report["fingerprint"]


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "manifest"])
def test_a_damaged_entry_is_rebuilt(data, tokenizer, damage):
    before = everything(prepare(data, tokenizer, seed=0).train[0])
    (folder,) = (path for path in Path(data.cache_dir).glob("tokens-*") if path.is_dir())
    ids = folder / "train.ids"
    if damage == "cut":
        os.truncate(ids, ids.stat().st_size - 2)
    elif damage == "longer":
        ids.write_bytes(ids.read_bytes() + b"\0\0")
    elif damage == "gone":
        ids.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    assert everything(prepare(data, tokenizer, seed=0).train[0]) == before


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder: Path):
        (folder / "half").write_text("written")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        entry(tmp_path, "name", build)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    (tmp_path / ".partial-name-killed").mkdir()
    assert entry(tmp_path, "name", lambda folder: {"fact": 1}).facts == {"fact": 1}
    assert {path.name for path in tmp_path.iterdir()} <= {"name", "name.lock"}


def test_arrays_are_written_in_parts_and_mapped(tmp_path):
    def build(folder: Path):
        for name in ("full", "empty"):
            writer = ArrayWriter(folder / name, "uint16")
            for start in range(0, 10 if name == "full" else 0, 5):
                writer.append(np.arange(start, start + 5))
            writer.close()
        return {}

    found = entry(tmp_path, "name", build)
    assert found.array("full", "uint16").tolist() == list(range(10)) and len(found.array("empty", "uint16")) == 0
    with pytest.raises(ValueError, match="read-only"):
        found.array("full", "uint16")[0] = 1


def _prepare_in_rank(data, tokenizer_path, builds, results):
    from recipes.data.tokenizer import load_tokenizer

    encode_rows = encode.Encoder.encode

    def counted(self, *args):
        with builds.get_lock():
            builds.value += 1
        return encode_rows(self, *args)

    encode.Encoder.encode = counted
    prepared = prepare(data, load_tokenizer(tokenizer_path), seed=0)
    results.put(prepared.report["fingerprint"])


def test_ranks_that_start_together_tokenise_once(data, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer(["threads of this process"] * 100)  # the forked ranks inherit the pool without its threads
    context = multiprocessing.get_context("fork")
    builds, results = context.Value("i", 0), context.Queue()
    arguments = (data, str(tmp_path / "tokenizer"), builds, results)
    ranks = [context.Process(target=_prepare_in_rank, args=arguments, daemon=True) for _ in range(3)]
    for rank in ranks:
        rank.start()
    assert len({results.get(timeout=60) for _ in ranks}) == 1
    for rank in ranks:
        rank.join()
    assert builds.value == 2  # one batch of each split, by one of the ranks


def test_tokenizer_is_trained_on_the_training_split_only(write, config, monkeypatch):
    train = write("train.jsonl", [{"text": "common words only"}] * 50)
    evaluation = write("eval.jsonl", [{"text": "zyxwvut zyxwvut"}] * 50)
    data = config(kind="jsonl", path=str(train), eval_path=str(evaluation))
    seen = []
    prepared = prepare(data, None, seed=0, vocab_size=300, progress=lambda *step: seen.append(step))
    vocabulary = set(prepared.tokenizer.get_vocab())
    assert "common" in vocabulary and not any("zy" in token for token in vocabulary)
    assert len(prepared.tokenizer) == prepared.report["vocab_size"] <= 300
    assert {what.split(" ")[0] for _, _, what in seen} == {"training", "tokenising", "packing"}
    assert all(0 <= done <= total for done, total, _ in seen)
    monkeypatch.setattr(cache, "train_tokenizer", no_encoding)
    again = prepare(data, None, seed=0, vocab_size=300)
    assert again.tokenizer.get_vocab() == prepared.tokenizer.get_vocab()


def test_stdlib_end_to_end(config):
    prepared = prepare(config(kind="stdlib", max_files=12, held_out=0.2), None, seed=1, vocab_size=400)
    row = prepared.dataset().row(3)
    kept = row["labels"] != -100
    assert np.array_equal(row["labels"][:-1][kept[:-1]], row["input_ids"][1:][kept[:-1]])
    assert "import" in "".join(prepared.tokenizer.decode(prepared.held_out.row(i)["input_ids"]) for i in range(20))


def test_real_text_in_blocks(shared, config, tokenizer):
    path = shared("tinyshakespeare/input.txt")
    data = config(kind="text", path=str(path), packing="blocks", seq_length=256, held_out=0.02)
    prepared = prepare(data, tokenizer, seed=0)
    (train,) = prepared.train
    ids = np.concatenate([train.row(i)["input_ids"][: train.tokens(i)] for i in range(len(train))])
    assert path.read_text("utf-8").startswith(tokenizer.decode(ids[:-1]))
    assert prepared.report["sources"][0]["train"]["padding"] < 1e-3


def test_mixture_of_rows_and_text(write, config, tokenizer, tmp_path):
    pairs = [{"q": f"question {i}", "a": f"answer {i}" * (1 + 10 * (i % 5 == 0))} for i in range(30)]
    pairs += [{"q": "long " * 50, "a": "never reached"}, {"q": "x", "a": ""}]
    mixture = [
        SourceConfig("jsonl", str(write("pairs.jsonl", pairs)), prompt="q", completion="a", weight=3.0),
        SourceConfig("jsonl", str(write("rows.jsonl", TEXTS)), weight=1.0),
    ]
    prepared = prepare(config(mixture=mixture, max_dropped=0.1), tokenizer, seed=0)
    first, second = prepared.report["sources"]
    assert (first["weight"], second["weight"]) == (3.0, 1.0) == tuple(prepared.weights)
    changes = {change["what"].partition(" within")[0]: change for change in prepared.report["changes"]}
    assert changes["rows without 'a'"]["count"] == 1 and changes["rows without 'a'"]["of"] == 32
    assert changes["rows in which nothing to learn comes"]["first"] == f"{tmp_path}/pairs.jsonl:31"
    assert first["train"]["without_supervision"] == 1 and first["train"]["truncated"] > 1
    counts = prepared.order().counts
    assert sum(counts) == sum(map(len, prepared.train)) and counts[0] == pytest.approx(3 * counts[1], abs=3)
    assert len(prepared.held_out) == first["held_out"]["sequences"] + second["held_out"]["sequences"]
    row = prepared.train[0].row(0)
    assert 0 < (row["labels"] != -100).sum() == prepared.train[0].supervised(0) < prepared.train[0].tokens(0)


def test_sequences_of_chats(write, config, chat_tokenizer):
    chats = [{"m": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(9)]
    data = config(kind="jsonl", path=str(write("chats.jsonl", chats)), messages="m", packing="none", seq_length=128)
    prepared = prepare(data, chat_tokenizer, seed=0)
    (train,) = prepared.train
    row = train.row(0)
    rows = [train.row(i) for i in range(len(train))]
    padding = 1 - np.mean(np.concatenate([row["attended"] for row in rows]))
    assert prepared.report["sources"][0]["train"]["padding"] == pytest.approx(padding)
    assert chat_tokenizer.decode(row["labels"][row["labels"] != -100]) == "1!<|im_end|>"


# What is refused


def refused(*args, **keys) -> str:
    with pytest.raises(RequestError) as caught:
        prepare(*args, seed=0, **keys)
    return caught.value.render()


def test_broken_rows_of_all_sources_are_reported_and_nothing_is_kept(write, config, tokenizer):
    paths = [str(write(f"{n}.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n')) for n in "ab"]
    data = config(mixture=[SourceConfig("jsonl", path) for path in paths])
    message = refused(data, tokenizer)
    assert f"{paths[0]}:2" in message and f"{paths[1]}:2" in message
    assert not [path for path in Path(data.cache_dir).iterdir() if path.is_dir()]


def test_too_few_documents(write, config, tokenizer):
    data = config(kind="jsonl", path=str(write("one.jsonl", TEXTS[:1])))
    message = refused(data, tokenizer)
    assert "the train split has no documents" in message and "data.eval_path=FILE" in message


def test_nothing_supervised_within_the_sequence(write, config, tokenizer):
    rows = [{"q": "long " * 50, "a": "x"}] * 4
    data = config(kind="jsonl", path=str(write("rows.jsonl", rows)), prompt="q", completion="a")
    message = refused(data, tokenizer)
    assert "4 of 4 rows are dropped" in message and "data.seq_length=" in message
    data.max_dropped = 1.0
    message = refused(data, tokenizer)
    assert "train split has a supervised token" in message and "held-out split" in message


def test_chats_need_a_template(write, config, tokenizer):
    path = write("rows.jsonl", [{"m": [{"role": "user", "content": "a"}]}] * 3)
    data = config(kind="jsonl", path=str(path), messages="m")
    assert "no chat template" in refused(data, tokenizer)
    assert "trained from scratch" in refused(data, None, vocab_size=300)


def test_cache_that_cannot_be_written(data, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    data.cache_dir = str(tmp_path / "file" / "cache")
    assert f"data.cache_dir={data.cache_dir}" in refused(data, tokenizer)

    def full(*args):
        raise OSError(28, "No space left on device")

    data.cache_dir = str(tmp_path / "full")
    monkeypatch.setattr(ArrayWriter, "append", full)
    assert "No space left on device" in refused(data, tokenizer)
    assert not [path for path in (tmp_path / "full").iterdir() if path.is_dir()]


def test_prepared_sets_go_to_worker_processes(data, tokenizer):
    prepared = prepare(data, tokenizer, seed=0)
    copy = pickle.loads(pickle.dumps(prepared.dataset()))
    assert copy.row(5)["input_ids"].tolist() == prepared.dataset().row(5)["input_ids"].tolist()
    shutil.rmtree(data.cache_dir)
    assert len(prepared.dataset().row(6)["input_ids"]) == data.seq_length  # mapped files outlive their names


@pytest.mark.parametrize(
    ("umask", "folders", "files"), [(0o022, 0o755, 0o644), (0o002, 0o775, 0o664), (0o077, 0o700, 0o600)]
)
def test_the_umask_says_who_else_may_read_it(umask, folders, files, data, tokenizer, tmp_path):
    """Also where a writer would leave it to the owner alone."""

    def build(folder: Path):
        (folder / "below").mkdir(mode=0o700)
        (folder / "below" / "weights").touch(mode=0o600)
        return {}

    before = os.umask(umask)
    try:
        entry(tmp_path / "by_hand", "one", build)
        data.cache_dir = str(tmp_path / "shared")
        prepare(data, None, seed=0, vocab_size=300)
    finally:
        os.umask(before)
    for root in (tmp_path / "by_hand", tmp_path / "shared"):
        for path in [root, *root.rglob("*")]:
            assert path.stat().st_mode & 0o777 == (folders if path.is_dir() else files), path


def test_what_another_user_keeps_is_named(data, tokenizer, tmp_path, monkeypatch):
    data.cache_dir = str(tmp_path / "shared")
    prepare(data, tokenizer, seed=0)
    for manifest in (tmp_path / "shared").glob("*/manifest.json"):
        manifest.unlink()  # root reads everything: as if it could not be opened
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RequestError, match="another user's, and readable for that one alone"):
        prepare(data, tokenizer, seed=0)


def test_ids_with_gaps(data):
    """A few tokens, one of them with an id that two bytes do not hold: it was another token after the cache."""
    words = {
        word: number
        for number, word in enumerate(
            ["row", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", ":", "<end>"]
        )
    }
    words |= {str(number): 70_000 + number for number in range(60)}
    backend = Tokenizer(WordLevel(words, unk_token=":"))
    backend.pre_tokenizer = Whitespace()
    sparse = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token=":")
    assert len(sparse) < 100 and id_count(sparse) == 70_060
    prepared = prepare(data, sparse, seed=0)
    ids = np.concatenate([prepared.train[0].row(index)["input_ids"] for index in range(len(prepared.train[0]))])
    assert {int(number) for number in ids} <= set(words.values()) and (ids >= 70_000).sum() > 60
    assert prepared.report["vocab_size"] == 70_060


def test_an_array_holds_no_value_that_it_would_change(tmp_path):
    writer = ArrayWriter(tmp_path / "ids", "uint16")
    for value in (65_536, -1):
        with pytest.raises(ValueError, match="uint16"):
            writer.append(np.array([1, value]))
    writer.append(np.array([65_535]))
    writer.close()
    assert writer.count == 1 and (tmp_path / "ids").stat().st_size == 2
