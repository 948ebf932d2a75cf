"""Examples of a supervised task: encoded once, kept by content, read by index, batches of similar lengths.

An example is a dictionary of flat arrays of any length; each array of a split is one file and its offsets another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.changes import recorded
from recipes.data.order import permute
from recipes.data.packing import round_up
from recipes.data.readable import Reading
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import Source
from recipes.data.store import ArrayWriter, Entry, entry, writing

Example = dict[str, np.ndarray]
Progress = Callable[[int, int, str], None]
SPLITS = ("train", "held_out")
BATCH_ROWS = 1024


class Examples:
    """The examples of one split, memory-mapped."""

    def __init__(self, store: Entry, split: str, arrays: Mapping[str, str]):
        self._values = {name: store.array(f"{split}.{name}", dtype) for name, dtype in arrays.items()}
        self._offsets = {name: store.array(f"{split}.{name}.offsets", "int64") for name in arrays}

    def __len__(self) -> int:
        return len(next(iter(self._offsets.values()))) - 1

    def row(self, index: int) -> Example:
        """The arrays of one example, and its number as `id`."""
        found = {name: self._values[name][at[index] : at[index + 1]] for name, at in self._offsets.items()}
        return {**found, "id": np.array(index)}

    def lengths(self, name: str) -> np.ndarray:
        """(examples,) elements of one array of each."""
        return np.diff(self._offsets[name])


def by_length(lengths: Sequence[np.ndarray]) -> np.ndarray:
    """The order of N rows in which those that follow each other need little padding.

    lengths: (N,) for each array of a row that is padded by itself. All but the last one count as they are padded
    (`round_up`), so that the next one has a say.
    """
    *others, last = lengths
    return np.lexsort([last, *(round_up(each) for each in reversed(others))])  # sorts by the last of these first


class Shuffled:
    """Training examples by global sample index: each epoch has each once, in an order of its own.

    With `lengths`, stretches of `window` global batches are sorted by length and dealt into batches, whose order is
    shuffled: a batch has rows of similar length, and which rows meet changes with every epoch. With a window of one
    batch its rows stay those of the draw, and its micro-batches, in every layout, have rows of similar length. A pure
    function of (seed, epoch, index, global batch size).
    """

    def __init__(
        self, examples: Examples, seed: int, batch: int, lengths: Sequence[np.ndarray] | None, window: int = 1
    ):
        self._examples, self._seed, self._batch, self._lengths = examples, seed, batch, lengths
        self._window = window * batch
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._examples)

    def row(self, index: int) -> Example:
        return self._examples.row(self.locate(index))

    def locate(self, index: int) -> int:
        """The example at a global sample index."""
        epoch, place = divmod(index, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._arranged(epoch)
        return int(self._order[place])

    def _arranged(self, epoch: int) -> np.ndarray:
        drawn = permute(np.arange(len(self)), len(self), self._seed, "examples", epoch)
        if self._lengths is None:
            return drawn
        # Batches do not begin where epochs do: what completes the last one of the epoch before stays as it is drawn.
        lead = -epoch * len(self) % self._batch
        parts = [drawn[:lead]]
        for start in range(lead, len(drawn), self._window):
            window = drawn[start : start + self._window]
            window = window[by_length([each[window] for each in self._lengths])]
            batches = [window[at : at + self._batch] for at in range(0, len(window), self._batch)]
            whole = len(batches) - (len(batches[-1]) < self._batch)  # one that is not full stays at the end
            order = permute(np.arange(whole), max(1, whole), self._seed, "batches", epoch, start)
            parts += [batches[number] for number in order] + batches[whole:]
        return np.concatenate(parts)


def encoded(
    root: Path,
    name: str,
    source: Source,
    arrays: Mapping[str, str],
    encode: Callable[[Sequence[Row], Problems, Meter], list[list[Example]]],
    progress: Progress,
    reading: Reading | None = None,
    measure: Callable[[Reading, Row, list[Example]], None] = lambda reading, row, examples: None,
) -> Entry:
    """The store `name` below `root`, built from `source` when there is none yet.

    arrays: name of each array of an example → its dtype on disk. encode: rows → the examples of each.
    reading, measure: how much of a row and its examples can be read.
    The entry's facts are the examples of each split, the rows, what became of those that are not there as they are
    (`changes.recorded`), and what of them is unreadable (`Reading.recorded`).
    Raises RequestError with all broken rows.
    """

    def build(folder: Path) -> dict[str, Any]:
        with writing(folder):
            writers = {
                (split, array): ArrayWriter(folder / f"{split}.{array}", dtype)
                for split in SPLITS
                for base, kind in arrays.items()
                for array, dtype in ((base, kind), (f"{base}.offsets", "int64"))
            }
            for split in SPLITS:
                for base in arrays:
                    writers[split, f"{base}.offsets"].append(np.zeros(1))
        problems, meter = Problems(), Meter(source.size())
        counts, read, encoding = dict.fromkeys(SPLITS, 0), 0, Meter()
        try:
            for batch in _batches(source.read(problems, meter)):
                made = encode(batch, problems, encoding)
                read += len(batch)
                if reading is not None:
                    for row, examples in zip(batch, made, strict=True):
                        measure(reading, row, examples)
                for held_out, split in enumerate(SPLITS):
                    pairs = zip(batch, made, strict=True)
                    examples = [one for row, found in pairs if row.held_out == bool(held_out) for one in found]
                    counts[split] += len(examples)
                    with writing(folder):
                        _append(writers, split, arrays, examples)
                progress(*source.read_so_far(meter, "encoding"))
        finally:
            with writing(folder):
                for writer in writers.values():
                    writer.close()
        problems.raise_any()
        total, changes = read + meter.dropped, [*meter.changes.values(), *encoding.changes.values()]
        origins = source.origins()
        unreadable = reading.recorded(origins) if reading else []
        return {**counts, "rows": total, "changes": recorded(changes, origins, total), "unreadable": unreadable}

    return entry(root, name, build)


def _append(
    writers: dict[tuple[str, str], ArrayWriter], split: str, arrays: Mapping[str, str], examples: list[Example]
) -> None:
    if not examples:
        return
    for name in arrays:
        values = [np.atleast_1d(example[name]).ravel() for example in examples]
        offsets = writers[split, name].count + np.cumsum([len(value) for value in values])
        writers[split, f"{name}.offsets"].append(offsets)
        writers[split, name].append(np.concatenate(values))


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
