"""Every rule between keys. A rule is a function (config, layout, environment) → problems; all of them always run.

Add one to the RULES of the file it belongs to: it is then part of every command and of the tests that walk RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from conf import (
    rules_data,
    rules_engine,
    rules_model,
    rules_optimizer,
    rules_parallel,
    rules_run,
    rules_values,
    rules_zero,
)
from conf.batch import Layout
from conf.environment import Environment
from conf.errors import Problem
from conf.schema import Config

Rule = Callable[[Config, Layout, Environment], Iterator[Problem]]

RULES: tuple[Rule, ...] = (
    *rules_values.RULES,
    *rules_run.RULES,
    *rules_optimizer.RULES,
    *rules_zero.RULES,
    *rules_parallel.RULES,
    *rules_data.RULES,
    *rules_model.RULES,
    *rules_engine.RULES,
)


def check(config: Config, layout: Layout, environment: Environment) -> list[Problem]:
    """The violations of every rule, in the order of the rules. `environment` is that of the run's own device."""
    return [problem for rule in RULES for problem in rule(config, layout, environment)]
