"""`deepspeed.*` against the engine's own schema, and that schema against the installed engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conf_cases import CPU, problems_of, quick, unchecked

from conf.batch import Layout
from conf.compose import compose
from conf.engine_keys import NO_EFFECT, OURS
from conf.errors import Problem
from conf.overrides import schema_keys
from conf.rules_engine import RULES, _paths, engine_schema
from conf.schema import Config


@pytest.fixture(scope="module")
def composed():
    return unchecked(quick())


@pytest.fixture
def quickstart(composed):
    return copy.deepcopy(composed)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("deepspeed.zero_optimisation.stage=3", "deepspeed.zero_optimization.…"),
        ("deepspeed.gradient_cliping=1", "optimizer.gradient_clipping=1"),
        ("deepspeed.steps_per_prnt=5", "deepspeed.steps_per_print=5"),
        ("deepspeed.reduce_bucket_size=5", "zero.reduce_bucket_size=5"),
        ("deepspeed.zero_optimization.sub_group_siz=5", "deepspeed.zero_optimization.sub_group_size=5"),
        ("deepspeed.pipeline.stage=2", "parallel.pipeline=1"),
        ("deepspeed.checkpoint.tag_validatoin=Warn", "deepspeed.checkpoint.tag_validation=Warn"),
        ("deepspeed.activation_checkpointing.partitoin_activations=true", "train.activation_checkpointing=1"),
        ("deepspeed.timers.throughput.enable=true", "deepspeed.timers.throughput.enabled=true"),
        ("deepspeed.flops_profiler.enbled=true", "deepspeed.flops_profiler.enabled=true"),
    ],
)
def test_typos_at_every_depth(override, nearest):
    (problem,) = problems_of(quick(override))
    assert problem.key.removeprefix("deepspeed.") in override
    assert problem.rule == "no such key in the engine"
    assert problem.nearest.startswith(nearest)


@pytest.mark.parametrize("key", sorted(engine_schema()["removed"]))
def test_removed_keys_give_the_engine_s_reason(key, quickstart):
    (problem,) = _check(quickstart, key, True)
    assert problem.key == f"deepspeed.{key}"
    assert "removed from DeepSpeed 0.19.8" in problem.rule
    assert "removed" in problem.rule.partition(": ")[2]


@pytest.mark.parametrize(
    "override",
    [
        "deepspeed.wall_clock_breakdown=3",
        "deepspeed.steps_per_print=often",
        "deepspeed.steps_per_print=2.5",
        "deepspeed.steps_per_print=0",
        "deepspeed.zero_optimization=3",
        "deepspeed.zero_optimization.sub_group_size=-1",
        "deepspeed.communication_data_type=fp8",
        "deepspeed.communication_data_type=auto",
        "deepspeed.zero_optimization.sub_group_size=auto",
        "deepspeed.checkpoint.tag_validation=Never",
        "deepspeed.comms_logger.prof_ops=all_reduce",
    ],
)
def test_wrong_values(override):
    (problem,) = problems_of(quick(override))
    assert problem.key == override.partition("=")[0]
    assert problem.nearest


@pytest.mark.parametrize(
    "override",
    [
        "deepspeed.wall_clock_breakdown=true",
        "deepspeed.steps_per_print=10",
        "deepspeed.zero_optimization.sub_group_size=5e8",
        "deepspeed.communication_data_type=bf16",
        "deepspeed.checkpoint.tag_validation=Warn",
        "deepspeed.comms_logger.prof_ops=[all_reduce]",
        "deepspeed.flops_profiler.enabled=true",
        "deepspeed={timers: {throughput: {enabled: false}}}",
    ],
)
def test_legal_keys_reach_the_engine(override):
    assert compose(quick(override), 2, CPU).deepspeed


@pytest.mark.parametrize("key", sorted(OURS))
def test_what_we_set_is_refused_and_our_key_named(key, quickstart):
    """The key of ours exists, and is offered."""
    ours = OURS[key].split("=")[0].split(" ")[0]
    assert ours in schema_keys() or ours in ("optimizer", "scheduler", "precision", "zero", "parallel", "track")
    found = _check(quickstart, key, _legal(_node(key)))
    assert any(problem.key == f"deepspeed.{key}" for problem in found), found


@pytest.mark.parametrize("key", sorted(NO_EFFECT))
def test_what_does_nothing_is_refused(key, quickstart):
    found = _check(quickstart, key, _legal(_node(key)))
    assert any(problem.key == f"deepspeed.{key}" for problem in found), found


def _check(config: Config, key: str, value: Any) -> list[Problem]:
    """The problems of the engine's rules with one engine key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    config.deepspeed = value
    return [problem for rule in RULES for problem in rule(config, Layout(world=2, data=2), CPU)]


def _node(key: str) -> dict:
    node = {"keys": engine_schema()["keys"]}
    for part in key.split("."):
        node = node["keys"][part]
    return node


def _legal(node: dict) -> Any:
    """Some value of the key's type."""
    if node.get("choices"):
        return node["choices"][0]
    samples = {"boolean": True, "integer": 1, "number": 1.0, "string": "x", "object": {}, "array": []}
    return next(samples[kind] for kind in node["types"] if kind in samples)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["precision=bf16_autocast", "deepspeed.bf16.enabled=true"], "bf16 and torch_autocast"),
        (["precision=bf16", "deepspeed.torch_autocast.enabled=true"], "bf16 and torch_autocast"),
        (["precision=bf16", "deepspeed.fp16.enabled=true"], "bf16 and fp16"),
        (["deepspeed.bf16.enabled=true", "deepspeed.torch_autocast.enabled=true"], "bf16 and torch_autocast"),
    ],
)
def test_one_arithmetic(overrides, says):
    assert any(f"{says} exclude each other" in problem.rule for problem in problems_of(quick(*overrides)))


def test_the_schema_is_that_of_the_installed_engine():
    """Regenerate with `python -m launch.runtime.engine_schema` after moving to another deepspeed, and read the diff."""
    pytest.importorskip("deepspeed")
    from launch.runtime.engine_schema import FILE, as_text
    from launch.runtime.engine_schema import engine_schema as generate

    generated = generate()
    assert generated["deepspeed"] == "0.19.8"
    assert FILE.read_text() == as_text(generated)


def test_every_key_the_engine_reads_by_name_is_known():
    """The constants of runtime/config.py that name top-level keys, found in its source rather than written down."""
    deepspeed = pytest.importorskip("deepspeed")
    import re
    from pathlib import Path

    import deepspeed.runtime.config as config

    source = Path(config.__file__).read_text()
    constants = set(re.findall(r"get_scalar_param\(param_dict,\s*([A-Z_]+)", source))
    names = {getattr(config, constant) for constant in constants}
    names |= set(re.findall(r"param_dict\.get\(\s*['\"](\w+)['\"]", source))
    assert len(names) > 20, deepspeed.__version__
    assert names - set(engine_schema()["keys"]) == set()


def test_ours_and_no_effect_name_real_keys():
    known = set(_paths(engine_schema()["keys"], ""))
    assert set(OURS) | set(NO_EFFECT) <= known
    assert not set(OURS) & set(NO_EFFECT)
