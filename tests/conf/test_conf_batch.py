"""The layout and the batch triangle."""

from __future__ import annotations

import itertools

import pytest

from conf.batch import Layout, batch_line, nearest_triples, resolve_batch
from conf.errors import RequestError
from conf.schema import BatchConfig, ParallelConfig

TWO = Layout(world=2, data=2)


@pytest.mark.parametrize("given", ["global micro", "global accumulation", "micro accumulation", "all"])
def test_any_two_give_the_third(given):
    whole = {"global_size": 64, "micro_size": 4, "accumulation": 8}
    kept = {key: value for key, value in whole.items() if given == "all" or key.split("_")[0] in given}
    assert resolve_batch(BatchConfig(**kept), TWO) == BatchConfig(**whole)


def test_line():
    batch = BatchConfig(64, 4, 8)
    assert batch_line(batch, TWO) == "64 sequences = 4 micro × 8 accumulation × 2 data ranks"
    one = Layout(world=1, data=1)
    assert batch_line(BatchConfig(8, 4, 2), one) == "8 sequences = 4 micro × 2 accumulation × 1 data rank"


@pytest.mark.parametrize(
    "batch",
    [
        BatchConfig(64, 4, 4),
        BatchConfig(10, 4, None),
        BatchConfig(10, None, 4),
        BatchConfig(7, 7, None),
        BatchConfig(1, 1, None),
        BatchConfig(4096, 7, 9),
    ],
)
def test_what_does_not_multiply_is_refused_with_three_legal_triples(batch):
    with pytest.raises(RequestError) as caught:
        resolve_batch(batch, TWO)
    (problem,) = caught.value.problems
    offers = problem.nearest.split("\n      or:  ")
    assert len(set(offers)) == 3
    for offer in offers:
        numbers = dict(part.split("=") for part in offer.split())
        legal = BatchConfig(**{key.removeprefix("batch."): int(value) for key, value in numbers.items()})
        assert resolve_batch(legal, TWO) == legal


def test_nearest_keeps_what_it_can():
    """64 = 4 × 4 × 2 is off by one factor: the three repairs that change one number each."""
    near = nearest_triples({"global_size": 64, "micro_size": 4, "accumulation": 4}, (64, 4, 4), 2)
    assert set(near) == {(32, 4, 4), (64, 8, 4), (64, 4, 8)}


def test_nearest_is_always_legal():
    for size, micro, steps, data in itertools.product((1, 7, 30, 1000), (1, 3, 64), (1, 5), (1, 2, 6, 8)):
        near = nearest_triples({"global_size": size, "micro_size": micro}, (size, micro, steps), data)
        assert len(near) == 3
        assert all(g == m * a * data and min(m, a) >= 1 for g, m, a in near)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, "batch"),
        ({"global_size": 64}, "batch.micro_size"),
        ({"micro_size": 4}, "batch.accumulation"),
        ({"accumulation": 4}, "batch.micro_size"),
    ],
)
def test_too_few_says_what_to_add(given, key):
    with pytest.raises(RequestError) as caught:
        resolve_batch(BatchConfig(**given), TWO)
    (problem,) = caught.value.problems
    assert problem.key == key
    added = dict(part.removeprefix("batch.").split("=") for part in problem.nearest.split())
    legal = resolve_batch(BatchConfig(**given, **{name: int(value) for name, value in added.items()}), TWO)
    assert all(getattr(legal, name) == value for name, value in given.items())


@pytest.mark.parametrize("value", [0, -4])
def test_sizes_are_positive(value):
    with pytest.raises(RequestError) as caught:
        resolve_batch(BatchConfig(value, value, None), TWO)
    assert [problem.key for problem in caught.value.problems] == ["batch.global_size", "batch.micro_size"]


def test_layout():
    layout = Layout.of(16, ParallelConfig(tensor=2, pipeline=4, sequence=1))
    assert (layout.world, layout.data, layout.tensor, layout.pipeline, layout.sequence) == (16, 2, 2, 4, 1)
    assert layout.factors() == "2 data × 2 tensor × 4 pipeline × 1 sequence"


@pytest.mark.parametrize(("world", "degrees"), [(6, (4, 1, 1)), (2, (2, 2, 1)), (8, (3, 2, 1)), (8, (1, 1, 16))])
def test_a_world_that_does_not_divide_prints_every_factor(world, degrees):
    with pytest.raises(RequestError) as caught:
        Layout.of(world, ParallelConfig(*degrees))
    (problem,) = caught.value.problems
    for number, axis in zip(degrees, ("tensor", "pipeline", "sequence"), strict=True):
        assert f"{number} {axis}" in problem.rule
    assert str(world) in problem.rule
    axis, _, fitting = problem.nearest.split(",")[0].removeprefix("parallel.").partition("=")
    others = {"tensor": degrees[0], "pipeline": degrees[1], "sequence": degrees[2], axis: int(fitting)}
    if others["tensor"] * others["pipeline"] * others["sequence"] <= world:
        Layout.of(world, ParallelConfig(**others))


def test_degrees_are_positive():
    with pytest.raises(RequestError) as caught:
        Layout.of(2, ParallelConfig(tensor=0, pipeline=-1))
    assert [problem.key for problem in caught.value.problems] == ["parallel.tensor", "parallel.pipeline"]


def test_a_layout_multiplies_out():
    with pytest.raises(ValueError, match="2 data × 2 tensor"):
        Layout(world=2, data=2, tensor=2)
