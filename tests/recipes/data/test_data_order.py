"""The order of samples is a pure function, a permutation, and exact in its weights."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.order import MixedDataset, SampleOrder, check_size, permute, shares
from recipes.data.packing import SequenceSet, Tokens, pack


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 97, 1000, 4096, 10_007, 65_537, 1_000_000])
def test_permutation_is_bijective(size):
    image = permute(np.arange(size), size, 1, "x", 0)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100))
def test_permutation_is_pure_and_bijective(size, seed, epoch):
    image = permute(np.arange(size), size, seed, epoch)
    assert sorted(image.tolist()) == list(range(size))
    some = np.random.default_rng(seed).integers(0, size, 5)
    assert permute(some, size, seed, epoch).tolist() == image[some].tolist()


def test_permutation_mixes():
    size = 10_000
    image = permute(np.arange(size), size, 0, 0)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05
    assert np.mean(image == permute(np.arange(size), size, 0, 1)) < 0.002
    assert np.mean(image == permute(np.arange(size), size, 1, 0)) < 0.002
    first = Counter(int(permute(np.array([0]), 10, seed)[0]) for seed in range(2000))
    assert min(first.values()) > 140 and max(first.values()) < 260  # 200 each, 13 the standard deviation


PINNED = [(0, 0, 7), (0, 0, 3), (0, 0, 0), (0, 1, 1), (1, 1, 2), (66, 0, 9)]


def test_order_is_pinned():
    """Runs resumed with another version must read the samples they would have read: these numbers never change."""
    order = SampleOrder(7, [10, 5], [1.0, 1.0])
    assert [order.locate(i) for i in (0, 1, 2, 14, 15, 1000)] == PINNED


def test_one_source_reads_each_row_once_per_epoch():
    order = SampleOrder(3, [137], [0.5])
    for epoch in range(3):
        located = [order.locate(epoch * 137 + i) for i in range(137)]
        assert {epoch_ for epoch_, _, _ in located} == {epoch}
        assert sorted(row for _, _, row in located) == list(range(137))


def test_independent_of_ranks_and_of_what_was_asked_before():
    indices = np.arange(3000)
    whole = np.column_stack(SampleOrder(5, [100, 300], [1, 2]).locate_all(indices))
    for world in (1, 2, 3, 8):
        for rank in range(world):
            order = SampleOrder(5, [100, 300], [1, 2])
            mine = [order.locate(int(i)) for i in indices[rank::world]]
            assert mine == [tuple(row) for row in whole[rank::world].tolist()]
    order = SampleOrder(5, [100, 300], [1, 2])
    assert [order.locate(i) for i in (2999, 0, 2048)] == [tuple(whole[i].tolist()) for i in (2999, 0, 2048)]
    assert pickle.loads(pickle.dumps(order)).locate(11) == tuple(whole[11].tolist())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 10)), min_size=1, max_size=5), st.integers(0, 9))
def test_mixture_has_exact_weights_and_favours_no_row(sources, seed):
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    order = SampleOrder(seed, sizes, weights)
    epochs = 4
    _, drawn, rows = order.locate_all(np.arange(epochs * len(order)))
    assert len(order) == sum(sizes)
    exact = [len(order) * weight / sum(weights) for weight in weights]
    for k, size in enumerate(sizes):
        per_epoch = np.add.reduceat(drawn == k, np.arange(0, epochs * len(order), len(order)))
        assert set(per_epoch.tolist()) == {order.counts[k]}
        assert order.counts[k] >= 1
        if min(exact) >= 1:
            assert abs(order.counts[k] - exact[k]) < 1
        times = np.bincount(rows[drawn == k], minlength=size)
        assert times.max() - times.min() <= 1  # over the first passes, no row twice before all once


def test_shares():
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(10, [3, 0, 1]) == [8, 0, 2]  # 7.5 and 2.5: the first of equal remainders is rounded up
    assert shares(100, [1, 1e-9]) == [99, 1]
    assert sum(shares(1001, [0.1, 0.2, 0.7])) == 1001
    for total, weights in ((1, [1, 1]), (5, [0, 0]), (5, [1, -1])):
        with pytest.raises(ValueError, match="cannot be split"):
            shares(total, weights)


def test_mixed_dataset_reads_the_located_row():
    parts = []
    for size, first in ((6, 10), (4, 100)):
        tokens = Tokens(np.arange(first, first + 2 * size, dtype=np.uint16), None, np.arange(0, 2 * size + 1, 2))
        parts.append(SequenceSet([(tokens, pack(tokens, 8, "none", True))], 8, "none", 0))
    dataset = MixedDataset(parts, SampleOrder(0, [6, 4], [1, 3]))
    assert len(dataset) == 10
    for index in range(25):
        _, source, row = dataset.order.locate(index)
        assert dataset.row(index)["input_ids"][0] == (10, 100)[source] + 2 * row
        assert (dataset.tokens(index), dataset.supervised(index)) == (2, 1)


def test_less_than_one_global_batch():
    assert check_size(64, 64) == []
    (problem,) = check_size(10, 64)
    assert str(problem).startswith("batch.global_size=64:") and "batch.global_size=10" in problem.nearest
