"""From a flat stream of tokenised documents to training sequences.

Labels are pre-shifted: labels[t] is the token that follows position t, where that token is supervised and belongs to
the same document, and -100 elsewhere. A sequence is a list of *pieces*, stretches of one document:

documents  best-fit-decreasing packing; positions restart at 0 in each piece, which is what keeps packed documents from
           attending to each other (Ding et al. 2024, "Fewer Truncations Improve Language Modeling")
blocks     the stream cut every `seq_length` tokens; positions run through, attention crosses documents, labels do not
none       one piece per sequence, padded

A plain document longer than `seq_length` is cut into pieces and loses nothing: the last label of a piece is the first
token of the next. Prompt/completion rows and chats are cut off at `seq_length`, because a later piece would lack its
prompt.
Padding is -100 in the labels and restarts the positions, so that it is a document of its own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

IGNORE = -100
MULTIPLE = 8
"""Lengths of unpacked sequences are rounded up to this: matrix products like it."""


def round_up(length: Any) -> Any:
    """The next multiple of MULTIPLE, of one length or an array of them."""
    return -(-length // MULTIPLE) * MULTIPLE


Row = dict[str, np.ndarray]
"""input_ids, labels, position_ids: each (T,) int64; attended: (T,) bool, False on padding."""


@dataclass(frozen=True)
class Tokens:
    """Tokenised documents, end to end. All arrays may be memory-mapped.

    ids: (tokens,) unsigned. supervised: (tokens,) bool, or None when every token is. offsets: (documents + 1,) int64.
    """

    ids: np.ndarray
    supervised: np.ndarray | None
    offsets: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Packing:
    """Which pieces of the stream make up each sequence.

    start, length: (pieces,) int64, in the order of the sequences. follows: (pieces,) bool, whether the token behind
    the piece belongs to the same document and so is the label of its last position. rows: (sequences + 1,) int64,
    first piece of each sequence. supervised: (sequences,) int64 labels that count. truncated: rows cut off at
    `seq_length`. beyond: rows dropped because what is supervised in them comes later than that. unsupervised: rows
    dropped because nothing in them is. first_…: the number of the first such document, -1 where there is none.
    """

    start: np.ndarray
    length: np.ndarray
    follows: np.ndarray
    rows: np.ndarray
    supervised: np.ndarray
    truncated: int = 0
    beyond: int = 0
    unsupervised: int = 0
    first_truncated: int = -1
    first_beyond: int = -1
    first_unsupervised: int = -1


def pack(tokens: Tokens, seq_length: int, mode: str, cuttable: bool) -> Packing:
    """Lay the documents out in sequences of at most `seq_length` tokens.

    mode: documents | blocks | none. cuttable: whether a longer document may be continued in another sequence.
    """
    if mode == "blocks":
        start, length, follows = _cut_stream(tokens.offsets, seq_length)
        return _lay_out(tokens, start, length, follows, start // seq_length)
    if cuttable:
        start, length, follows = _cut_documents(tokens.offsets, seq_length)
    else:
        full = np.diff(tokens.offsets)
        start, length, follows = tokens.offsets[:-1], np.minimum(full, seq_length), full > seq_length
    counts = _supervised(tokens, start, length, follows)
    useful, found = counts > 0, dict[str, int]()
    if not cuttable:
        whole = _supervised(tokens, start, full, np.zeros(len(full), bool)) > 0
        for name, those in (
            ("truncated", follows & useful), ("beyond", whole & ~useful), ("unsupervised", ~whole & ~useful),
        ):  # fmt: skip
            found[name] = int(those.sum())
            found[f"first_{name}"] = int(those.argmax()) if found[name] else -1
        start, length, follows = start[useful], length[useful], follows[useful]
    sequence = best_fit_decreasing(length, seq_length) if mode == "documents" else np.arange(len(start))
    return replace(_lay_out(tokens, start, length, follows, sequence), **found)  # type: ignore[arg-type]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item: the longest first, each into the fullest bin that still holds it.

    lengths: (items,) in 1..capacity. Returns (items,) int64, bins counted from 0 without gaps. Items of one length are
    placed together, so the time is O(items log items + distinct lengths × distinct spaces).
    """
    bins = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    values, first = np.unique(-lengths[order], return_index=True)
    bounds = [*first.tolist(), len(lengths)]
    waiting: dict[int, list[np.ndarray]] = {}  # space left → bins with that space
    spaces: list[int] = []  # the keys of `waiting`, sorted
    opened = 0

    def put(space: int, numbers: np.ndarray) -> None:
        if space and len(numbers):
            if space not in waiting:
                waiting[space] = []
                insort(spaces, space)
            waiting[space].append(numbers)

    for group, length in enumerate((-values).tolist()):
        items = order[bounds[group] : bounds[group + 1]]
        while len(items):
            at = bisect_left(spaces, length)
            if at < len(spaces):
                space = spaces[at]
                numbers = waiting[space].pop()
                if not waiting[space]:
                    del waiting[space], spaces[at]
            else:
                space = capacity
                numbers = np.arange(opened, opened + -(-len(items) // (capacity // length)))
                opened += len(numbers)
            # A bin that took one item is now the fullest that fits, so it takes the next one too.
            each = space // length
            full = min(len(numbers), len(items) // each)
            bins[items[: full * each]] = np.repeat(numbers[:full], each)
            put(space - each * length, numbers[:full])
            items, numbers = items[full * each :], numbers[full:]
            if len(items) and len(numbers):
                bins[items] = numbers[0]
                put(space - len(items) * length, numbers[:1])
                items, numbers = items[:0], numbers[1:]
            put(space, numbers)
    return bins


class SequenceSet:
    """Sequences of one or several packed streams of one mode and length, read by index.

    parts: (tokens, packing) of each stream. pad_id: what padding is filled with.
    """

    def __init__(self, parts: Sequence[tuple[Tokens, Packing]], seq_length: int, mode: str, pad_id: int):
        self.parts, self.seq_length, self.mode, self.pad_id = list(parts), seq_length, mode, pad_id
        self.first = np.cumsum([0] + [len(packing.rows) - 1 for _, packing in self.parts])

    def __len__(self) -> int:
        return int(self.first[-1])

    def row(self, index: int) -> Row:
        """One sequence, padded: to `seq_length`, or without packing to a multiple of 8 (`seq_length` at most)."""
        tokens, packing, pieces = self._find(index)
        real = int(packing.length[pieces].sum())
        width = int(widths(np.array([real]), self.seq_length, self.mode)[0])
        row = empty_row(width, self.pad_id)
        at = 0
        for piece in range(pieces.start, pieces.stop):
            start, length = int(packing.start[piece]), int(packing.length[piece])
            row["input_ids"][at : at + length] = tokens.ids[start : start + length]
            labelled = length if packing.follows[piece] else length - 1
            labels = tokens.ids[start + 1 : start + 1 + labelled].astype(np.int64)
            if tokens.supervised is not None:
                labels[~tokens.supervised[start + 1 : start + 1 + labelled]] = IGNORE
            row["labels"][at : at + labelled] = labels
            first = at if self.mode == "blocks" else 0
            row["position_ids"][at : at + length] = np.arange(first, first + length)
            at += length
        row["attended"][:at] = True
        row["position_ids"][at:] = np.arange(width - at)
        return row

    def supervised(self, index: int) -> int:
        """Labels of this sequence that are not -100."""
        part, row = self._locate(index)
        return int(self.parts[part][1].supervised[row])

    def tokens(self, index: int) -> int:
        """Real tokens of this sequence, without padding."""
        _, packing, pieces = self._find(index)
        return int(packing.length[pieces].sum())

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        part = int(np.searchsorted(self.first, index, side="right")) - 1
        return part, index - int(self.first[part])

    def _find(self, index: int) -> tuple[Tokens, Packing, slice]:
        part, row = self._locate(index)
        tokens, packing = self.parts[part]
        return tokens, packing, slice(int(packing.rows[row]), int(packing.rows[row + 1]))


def widths(real: np.ndarray, seq_length: int, mode: str) -> np.ndarray:
    """(sequences,) lengths with padding of sequences of `real` tokens: `seq_length`, or unpacked a multiple of 8."""
    if mode == "none":
        return np.minimum(round_up(real), seq_length)
    return np.full(len(real), seq_length)


def empty_row(length: int, pad_id: int = 0) -> Row:
    """A sequence of padding only, which adds nothing to the loss: fills up the last, uneven batch."""
    return {
        "input_ids": np.full(length, pad_id, np.int64),
        "labels": np.full(length, IGNORE, np.int64),
        "position_ids": np.arange(length, dtype=np.int64),
        "attended": np.zeros(length, bool),
    }


def collate(rows: Sequence[Row], pad_id: int) -> Row:
    """Stack rows to (B, T), T the longest of them; what is added is padding as in `empty_row`."""
    width = max(len(row["input_ids"]) for row in rows)
    padded = []
    for row in rows:
        padding = empty_row(width - len(row["input_ids"]), pad_id)
        padded.append({name: np.concatenate([values, padding[name]]) for name, values in row.items()})
    return {name: np.stack([row[name] for row in padded]) for name in padded[0]}


def _cut_documents(offsets: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, follows) of the pieces of all documents, none longer than `seq_length`."""
    lengths = np.diff(offsets)
    counts = -(-lengths // seq_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = offsets[document] + number * seq_length
    end = np.minimum(start + seq_length, offsets[document + 1])
    return start, end - start, end < offsets[document + 1]


def _cut_stream(offsets: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, follows) of the pieces between all document ends and all multiples of `seq_length`."""
    bounds = np.union1d(offsets, np.arange(0, int(offsets[-1]), seq_length))
    start, end = bounds[:-1], bounds[1:]
    inside = ~np.isin(end, offsets)
    return start, end - start, inside


def _lay_out(
    tokens: Tokens, start: np.ndarray, length: np.ndarray, follows: np.ndarray, sequence: np.ndarray
) -> Packing:
    """Sort the pieces by sequence, in the order of the stream within each."""
    order = np.argsort(sequence, kind="stable")
    start, length, follows = start[order], length[order], follows[order]
    rows = np.concatenate([[0], np.cumsum(np.bincount(sequence))]).astype(np.int64)
    counts = np.concatenate([[0], np.cumsum(_supervised(tokens, start, length, follows))])
    return Packing(start, length, follows, rows, np.diff(counts[rows]))


def _supervised(tokens: Tokens, start: np.ndarray, length: np.ndarray, follows: np.ndarray) -> np.ndarray:
    """(pieces,) labels of each piece that count: its own tokens but the first, and the one that follows it."""
    labelled = length - 1 + follows
    if tokens.supervised is None or not len(start):
        return labelled
    order = np.argsort(start, kind="stable")
    first, last = start[order] + 1, start[order] + 1 + labelled[order]
    # reduceat sums between neighbouring indices, so every other sum is the gap between two pieces; its indices must lie
    # inside the array, and the last end may lie one behind it.
    values = np.append(tokens.supervised[: int(last.max())], [False, False])
    sums = np.add.reduceat(values, np.column_stack([first, last]).ravel(), dtype=np.int64)[::2]
    counts = np.empty(len(start), np.int64)
    counts[order] = np.where(labelled[order] > 0, sums, 0)
    return counts
