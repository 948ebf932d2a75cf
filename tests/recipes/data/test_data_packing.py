"""Packing: every supervised label once, no token lost, positions as a document has them alone."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.packing import (
    IGNORE,
    SequenceSet,
    Tokens,
    best_fit_decreasing,
    collate,
    empty_row,
    pack,
)

PAD = 0


def stream(lengths, supervised=None) -> Tokens:
    """Documents whose tokens are 1, 2, 3, … through the whole stream, so that each token says where it comes from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(np.arange(1, offsets[-1] + 1, dtype=np.uint32), supervised, offsets)


def sequences(tokens: Tokens, seq_length: int, mode: str, cuttable: bool = True) -> SequenceSet:
    return SequenceSet([(tokens, pack(tokens, seq_length, mode, cuttable))], seq_length, mode, PAD)


def expected_labels(tokens: Tokens) -> set[int]:
    """Tokens that must be predicted somewhere: all supervised ones but the first of each document."""
    first = {int(offset) + 1 for offset in tokens.offsets[:-1]}
    kept = tokens.ids if tokens.supervised is None else tokens.ids[tokens.supervised]
    return set(kept.tolist()) - first


documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(2, 24), st.sampled_from(["documents", "blocks", "none"]))
def test_plain_text_keeps_every_token_and_label(lengths, seq_length, mode):
    tokens = stream(lengths)
    packed = sequences(tokens, seq_length, mode)
    inputs, labels = [], []
    document = np.repeat(np.arange(len(lengths)), lengths)
    for index in range(len(packed)):
        row = packed.row(index)
        real = packed.tokens(index)
        assert {len(values) for values in row.values()} == {len(row["input_ids"])}
        assert len(row["input_ids"]) == seq_length or mode == "none"
        assert len(row["input_ids"]) <= seq_length
        kept = row["labels"] != IGNORE
        assert packed.supervised(index) == kept.sum()
        assert not kept[real:].any() and (row["input_ids"][real:] == PAD).all()
        assert row["attended"][:real].all() and not row["attended"][real:].any()
        assert (row["labels"][kept] == row["input_ids"][kept] + 1).all()  # the next token, shifted once
        owner = document[row["input_ids"][:real] - 1]
        restarts = np.flatnonzero(row["position_ids"] == 0)
        if mode == "blocks":
            assert (row["position_ids"][:real] == np.arange(real)).all()
        else:  # a new document or piece exactly where the positions restart
            changes = np.flatnonzero(np.diff(row["input_ids"][:real]) != 1) + 1
            assert set(np.flatnonzero(np.diff(owner)) + 1) | set(changes) <= set(restarts)
        if real < len(row["position_ids"]):
            assert real in restarts  # padding is a document of its own
        assert (np.diff(row["position_ids"])[np.diff(row["position_ids"]) != 1] < 1).all()
        inputs += row["input_ids"][:real].tolist()
        labels += row["labels"][kept].tolist()
    assert sorted(inputs) == tokens.ids.tolist()
    assert sorted(labels) == sorted(expected_labels(tokens))


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(2, 24), st.sampled_from(["documents", "none"]), st.integers(0, 2**32))
def test_supervised_rows_are_truncated_but_not_continued(lengths, seq_length, mode, seed):
    rng = np.random.default_rng(seed)
    tokens = stream(lengths, rng.random(sum(lengths)) < 0.3)
    packing = pack(tokens, seq_length, mode, cuttable=False)
    packed = SequenceSet([(tokens, packing)], seq_length, mode, PAD)
    labels = []
    for index in range(len(packed)):
        row = packed.row(index)
        kept = row["labels"][row["labels"] != IGNORE]
        assert packed.supervised(index) == len(kept) > 0
        labels += kept.tolist()
    reach = {
        int(token)
        for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
        for token in tokens.ids[start : min(end, start + seq_length + 1)]
    }
    assert sorted(labels) == sorted(expected_labels(tokens) & reach)
    documents = [tokens.supervised[a + 1 : b] for a, b in itertools.pairwise(tokens.offsets)]
    useful = [bool(document[:seq_length].any()) for document in documents]
    kinds = [
        ("truncated", [kept and len(document) >= seq_length for kept, document in zip(useful, documents, strict=True)]),
        ("beyond", [not kept and bool(document.any()) for kept, document in zip(useful, documents, strict=True)]),
        ("unsupervised", [not document.any() for document in documents]),
    ]
    for name, those in kinds:
        found = getattr(packing, name), getattr(packing, f"first_{name}")
        assert found == (sum(those), those.index(True) if any(those) else -1), name
    assert len(packing.start) == sum(useful)


@settings(max_examples=50, deadline=None)
@given(documents, st.integers(2, 24), st.integers(0, 2**32))
def test_blocks_keep_the_supervision(lengths, seq_length, seed):
    tokens = stream(lengths, np.random.default_rng(seed).random(sum(lengths)) < 0.5)
    packed = sequences(tokens, seq_length, "blocks", cuttable=False)
    labels = np.concatenate([packed.row(i)["labels"] for i in range(len(packed))])
    assert sorted(labels[labels != IGNORE]) == sorted(expected_labels(tokens))
    assert len(packed) == -(-sum(lengths) // seq_length)


def test_layout_of_a_packed_sequence():
    """Two documents of 3 and 2 tokens in one sequence of 8: each has the positions and labels it has alone."""
    row = sequences(stream([3, 2]), 8, "documents").row(0)
    assert row["input_ids"].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert row["labels"].tolist() == [2, 3, -100, 5, -100, -100, -100, -100]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    alone = sequences(stream([3, 2]), 8, "none")
    for index, place in ((0, slice(0, 3)), (1, slice(3, 5))):
        for name in row:
            assert alone.row(index)[name][: place.stop - place.start].tolist() == row[name][place].tolist()
    assert row.pop("attended").tolist() == [True] * 5 + [False] * 3
    assert all(values.dtype == np.int64 for values in row.values())


def test_a_long_document_goes_on_in_the_next_piece():
    packed = sequences(stream([10]), 4, "documents")
    rows = [packed.row(i) for i in range(len(packed))]
    assert [row["labels"].tolist() for row in rows] == [[2, 3, 4, 5], [6, 7, 8, 9], [10, -100, -100, -100]]
    assert all(row["position_ids"].tolist()[:2] == [0, 1] for row in rows[:2])


def test_unpacked_rows_are_padded_by_the_batch():
    packed = sequences(stream([3, 13, 20]), 20, "none")
    rows = [packed.row(i) for i in range(3)]
    assert [len(row["input_ids"]) for row in rows] == [8, 16, 20]  # multiples of 8, at most seq_length
    batch = collate(rows[:2], pad_id=7)
    assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(batch, (2, 16))
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [0] * 5 + [7] * 8
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]
    assert (batch["labels"][0][2:] == IGNORE).all()
    padding = empty_row(16, 7)
    assert (padding["labels"] == IGNORE).all() and collate([rows[1], padding], 7)["labels"].shape == (2, 16)


def test_several_streams_follow_each_other():
    first, second = stream([4, 4, 4]), stream([5, 5])
    both = SequenceSet([(t, pack(t, 8, "none", True)) for t in (first, second)], 8, "none", PAD)
    assert [both.tokens(i) for i in range(len(both))] == [4, 4, 4, 5, 5]
    assert both.row(3)["input_ids"].tolist()[:5] == [1, 2, 3, 4, 5]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            both.row(index)


# Best-fit-decreasing


def reference(lengths, capacity):
    """The textbook version: for each item, look at all bins."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces[spaces.index(min(fitting))] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60), st.just(30))
def test_best_fit_decreasing_is_the_textbook_one(lengths, capacity):
    bins = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    used = np.bincount(bins, weights=lengths).astype(int) if lengths else np.zeros(0, int)
    assert sorted((capacity - used).tolist()) == reference(lengths, capacity)
    assert set(bins.tolist()) == set(range(len(used)))


def test_a_million_documents_are_packed_in_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1.2, 1_000_000).astype(np.int64), 1, 20_000)
    tokens = Tokens(np.zeros(1, np.uint16), None, np.concatenate([[0], np.cumsum(lengths)]))
    start = time.perf_counter()
    packing = pack(tokens, 2048, "documents", cuttable=True)
    assert time.perf_counter() - start < 20
    assert packing.length.sum() == lengths.sum()
    assert packing.length.sum() / (2048 * (len(packing.rows) - 1)) > 0.99
