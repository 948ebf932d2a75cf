"""Every layout gives the gradients of one process: a subset of the matrix in which each pair of values occurs.

`make test-matrix` runs all of it.
"""

from __future__ import annotations

import functools
import json

import pytest
import torch
from layouts import AXES, MODELS, Case, configuration, covering, errors, legal, matrix, pairs, train
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from conf.batch import Layout
from conf.environment import Environment
from conf.rules import check
from recipes.models.configuration import scratch_config
from recipes.models.layouts import problems

RELATIVE = 1e-5
"""Sums in another order leave 1e-6 in fp32 (the worst gradient of one parameter over five steps: 5e-6)."""
SUBSET = covering(matrix())


@functools.cache
def results(world: int) -> dict[Case, list]:
    """All cases of one world size, on the same ranks."""
    cases = [case for case in SUBSET if case.world == world]
    ranks = run_ranks(world, train, cases, timeout_s=900)
    return {case: [rank[number] for rank in ranks] for number, case in enumerate(cases)}


@pytest.mark.slow
@pytest.mark.parametrize("case", SUBSET, ids=str)
def test_gradients_and_losses_of_a_layout(case: Case) -> None:
    for what, error in errors(case, results(case.world)[case]).items():
        assert error < RELATIVE, f"{what}: {error:.1e}"


DEEP = json.dumps({"vocab_size": 61, **MODELS["qwen3"], "num_hidden_layers": 9})
FOLDED = [
    Case("llama", 0, tensor=2, pipeline=2, checkpointing=1, packed=False, accumulation=4, schedule="dualpipev"),
    Case("smollm2", 1, data=2, pipeline=2, checkpointing=1, accumulation=4, schedule="dualpipev"),
    Case("gpt2", 1, pipeline=2, sequence=2, accumulation=4, schedule="dualpipev"),
    Case("mixtral", 0, data=2, pipeline=2, accumulation=4, schedule="dualpipev"),
    Case(DEEP, 1, pipeline=4, accumulation=8, schedule="dualpipev"),
]
"""DualPipeV with all that it can be combined with; nine tied layers over eight stages."""


@functools.cache
def folded_results() -> list[list]:
    return run_ranks(4, train, FOLDED, timeout_s=900)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FOLDED)), ids=[str(case) for case in FOLDED])
def test_a_folded_pipeline(number: int) -> None:
    """The same bound; evaluation has other numbers of micro-batches than training."""
    for what, error in errors(FOLDED[number], [rank[number] for rank in folded_results()]).items():
        assert error < RELATIVE, f"{what}: {error:.1e}"


def test_the_subset_has_every_pair() -> None:
    wanted = {(a, x, b, y) for case in matrix() for a, x, b, y in pairs(case)}
    assert wanted <= set().union(*map(pairs, SUBSET))
    assert {axis for axis, *_ in wanted} | {axis for _, _, axis, _ in wanted} == set(AXES)


@pytest.mark.parametrize("model", MODELS)
def test_the_matrix_is_what_the_rules_let_pass(model: str, environment: Environment) -> None:
    """No combination is left out of the matrix that a user could run, and none is in it that is refused."""
    options = dict(MODELS[model])
    config = scratch_config(options.pop("type"), {"vocab_size": 61, **options})
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    for tensor in (1, 2):
        for pipeline in (1, 2, 4):
            for sequence in (1, 2):
                for stage in (0, 1, 2, 3):
                    case = Case(model, stage, 1, tensor, pipeline, sequence)
                    if case.world > 8:
                        continue
                    cfg, layout = configuration(case)
                    found = check_parallel(cfg, layout, environment) + problems(network, cfg.parallel)
                    assert bool(found) != legal(case), (case, found)


def check_parallel(cfg, layout: Layout, environment: Environment) -> list:
    """The problems that are about the layout; the tiny configuration has others (data, run directory)."""
    found = check(cfg, layout, environment)
    return [problem for problem in found if problem.key.startswith(("parallel", "zero.stage", "data.seq_length"))]


@pytest.fixture(scope="module")
def environment() -> Environment:
    from conf.environment import detect

    return detect().on("cpu")
