"""The order of samples: a pure function of (seed, epoch, index).

Nothing is shuffled in memory and nothing depends on ranks, workers or layouts: they only decide who reads which global
index. That is what makes a resumed run, at any world size, continue with exactly the samples it would have read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from conf.errors import Problem
from recipes.data.packing import Row, SequenceSet

ROUNDS = 8
BLOCK = 1024
"""Indices located at once: as vectors they cost about a hundredth of what they cost one by one."""


def permute(index: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Where a seeded permutation of range(size) sends each index: bijective, O(1) memory, vectorised.

    index: (n,) int64 in [0, size). Returns (n,) int64. A Feistel network permutes the next power of four; values
    outside [0, size) are sent through it again until they fall inside (cycle walking, Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains"), on average less than four times.
    """
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    values = np.array(index, np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], np.uint64(half), keys)
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass over 2 × half bits: each round mixes one half with a keyed hash (SplitMix64's) of the other."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        mixed = right + key  # wraps modulo 2**64, as meant
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << half) | right


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` split in proportion to `weights`, exact in sum (largest remainder), at least 1 for a positive weight.

    Raises ValueError when `total` is smaller than the number of positive weights or no weight is positive.
    """
    positive = [k for k, weight in enumerate(weights) if weight > 0]
    if not positive or len(positive) > total or min(weights) < 0:
        raise ValueError(f"{total} samples cannot be split by the weights {list(weights)}")
    largest = max(weights)  # first divided by it: a sum of huge weights would overflow
    whole = sum(weight / largest for weight in weights)
    exact = [total * (weight / largest) / whole for weight in weights]
    counts = [int(share) for share in exact]
    for k in sorted(positive, key=lambda k: (counts[k] - exact[k], k))[: total - sum(counts)]:
        counts[k] += 1
    for k in positive:
        if counts[k] == 0:
            counts[k] = 1
            counts[int(np.argmax(counts))] -= 1
    return counts


class SampleOrder:
    """Which row of which source each global sample index reads.

    An epoch of the mixture has sum(sizes) samples, divided among the sources by weight. Each source keeps its own count
    of samples and its own permutation per pass over it, both running on across the mixture's epochs, so that no row of
    a source is read twice before all of it was read once. With one source, each epoch reads each row exactly once.
    """

    def __init__(self, seed: int, sizes: Sequence[int], weights: Sequence[float]):
        """sizes: rows of each source; weights: shares in samples. Raises ValueError for shares of empty sources."""
        if len(sizes) != len(weights) or any(not size and weight for size, weight in zip(sizes, weights, strict=True)):
            raise ValueError(f"sizes {list(sizes)} do not go with weights {list(weights)}")
        self.seed, self.sizes = seed, list(sizes)
        self.counts = shares(sum(sizes), weights)
        self.bounds = np.cumsum([0, *self.counts])
        self._block = -1  # the block of indices that was located last
        self._located: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        """Samples of one epoch."""
        return int(self.bounds[-1])

    def locate(self, index: int) -> tuple[int, int, int]:
        """(epoch, source, row) of a global sample index, which counts on from epoch to epoch."""
        block, place = divmod(index, BLOCK)
        if block != self._block:
            columns = self.locate_all(np.arange(block * BLOCK, (block + 1) * BLOCK))
            self._located = list(zip(*(column.tolist() for column in columns), strict=True))
            self._block = block
        return self._located[place]

    def locate_all(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`locate` of (n,) indices at once: three arrays (n,) int64."""
        indices = np.asarray(indices, np.int64)
        epochs, places = np.divmod(indices, len(self))
        sources, rows = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            drawn = permute(places[here], len(self), self.seed, "mixture", int(epoch))
            sources[here] = np.searchsorted(self.bounds, drawn, side="right") - 1
            rows[here] = drawn - self.bounds[sources[here]]
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            size = self.sizes[source]
            passes, places = np.divmod(epochs[here] * self.counts[source] + rows[here], size)
            for number in np.unique(passes):
                now = passes == number
                rows[here[now]] = permute(places[now], size, self.seed, "source", int(source), int(number))
        return epochs, sources, rows


class MixedDataset:
    """The rows of several sources in the order of `order`."""

    def __init__(self, sources: Sequence[SequenceSet], order: SampleOrder):
        self.sources, self.order = list(sources), order

    def __len__(self) -> int:
        """Samples of one epoch; a global index may go beyond it, into the next epochs."""
        return len(self.order)

    def row(self, index: int) -> Row:
        """The sequence at a global sample index, as `SequenceSet.row` gives it."""
        _, source, row = self.order.locate(index)
        return self.sources[source].row(row)

    def supervised(self, index: int) -> int:
        """Labels that count of the sequence at a global sample index."""
        _, source, row = self.order.locate(index)
        return self.sources[source].supervised(row)

    def tokens(self, index: int) -> int:
        """Real tokens of the sequence at a global sample index."""
        _, source, row = self.order.locate(index)
        return self.sources[source].tokens(row)


def check_size(order_size: int, global_size: int) -> list[Problem]:
    """The problem of a data set that does not even fill one global batch. Both in sequences."""
    if order_size >= global_size:
        return []
    rule = f"one global batch is more than the whole training split, which packs into {order_size} sequences"
    nearest = f"batch.global_size={order_size}, a smaller data.seq_length, or more data"
    return [Problem("batch.global_size", str(global_size), rule, nearest)]
