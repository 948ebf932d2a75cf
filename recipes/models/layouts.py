"""Which layouts a model can have: the one place that says no, for the plan and for training."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from conf.batch import Layout
from conf.errors import Problem
from conf.schema import ParallelConfig
from recipes.models import sequence_parallel, tensor_parallel
from recipes.models.costs import layer_costs
from recipes.models.plans import NoPlanError
from recipes.models.stages import balanced_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def split(model: PreTrainedModel, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage, as asked for or of equal cost.

    Raises NoPlanError for a family without a plan and for a split that does not fit its layers.
    """
    costs, before, after = layer_costs(model)
    if parallel.pipeline_split is None:
        return balanced_split(costs, before, after, _stages(parallel))
    given = list(parallel.pipeline_split)
    if sum(given) != len(costs):
        raise NoPlanError(f"the split has {sum(given)} layers, the model {len(costs)}")
    return given


@cache
def verdicts() -> dict[str, dict[str, str]]:
    """Family → {axis: "" where its gradients were found right, else what was found} (tests/distributed/families.py)."""
    return json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))


ENCODERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("bert", "camembert", "convnext", "distilbert", "electra", "modernbert", "roberta", "vit", "xlm-roberta"),
        ("tensor", "pipeline", "tensor and pipeline"),
    ),
    "bit": ("pipeline",),
    **dict.fromkeys(("albert", "deberta", "deberta-v2", "mpnet"), ("tensor",)),
}
"""Encoders and the axes along which their classifiers' gradients were found right (tests/distributed/test_encoders.py).

A decoder's classifier runs where its language model does."""


def problems(model: PreTrainedModel, parallel: ParallelConfig) -> list[Problem]:
    """What keeps `model` (whole, on the meta device) from being divided as asked, or from being trusted to be right."""
    return structural(model, parallel) or _unproven(model, parallel)


def _unproven(model: PreTrainedModel, parallel: ParallelConfig) -> list[Problem]:
    """A plan can be there and wrong: only families whose gradients were compared with one process's are let through."""
    family = model.config.get_text_config().model_type
    axes = [axis for axis in ("tensor", "pipeline", "sequence") if getattr(parallel, axis) > 1]
    asked = ["tensor and pipeline", *axes] if {"tensor", "pipeline"} <= set(axes) else axes
    known = verdicts().get(family)
    if model.get_output_embeddings() is None and family in ENCODERS:
        known = dict.fromkeys(ENCODERS[family], "")
    for axis in asked:
        why = known.get(axis, "not compared") if known else "this family was not compared"
        if why:
            rule = f"{family}: gradients are not known to be right ({why}); docs/models.md lists the families that are"
            key = axis.split(" ")[0]
            return [Problem(f"parallel.{key}", str(getattr(parallel, key)), rule, f"parallel.{key}=1")]
    return []


def structural(model: PreTrainedModel, parallel: ParallelConfig) -> list[Problem]:
    """What keeps `model` from being divided as asked; each with a degree that works."""
    found = []
    if parallel.tensor > 1 and (why := _no(tensor_parallel.check, model, parallel.tensor)):
        found.append(_problem("tensor", parallel, why, lambda n: _no(tensor_parallel.check, model, n)))
    if parallel.sequence > 1:

        def sequence(size: int) -> str | None:
            if model.get_output_embeddings() is None:
                return f"{type(model).__name__} looks at whole sequences: only language models can be given parts"
            return _no(sequence_parallel.check, model, parallel.tensor, size)

        if why := sequence(parallel.sequence):
            found.append(_problem("sequence", parallel, why, sequence))
    if parallel.pipeline > 1 and (why := _no(split, model, parallel)):
        if why.startswith("the split"):
            costs = layer_costs(model)
            nearest = f"parallel.pipeline_split={balanced_split(*costs, _stages(parallel))}".replace(" ", "")
            found.append(Problem("parallel.pipeline_split", str(parallel.pipeline_split), why, nearest))
        else:
            found.append(
                _problem("pipeline", parallel, why, lambda n: _no(split, model, replace(parallel, pipeline=n)))
            )
    return found


def _stages(parallel: ParallelConfig) -> int:
    return Layout.smallest(parallel).stages


def _no(check, *arguments) -> str | None:
    """Why `check` refuses, or None."""
    try:
        check(*arguments)
    except NoPlanError as error:
        return str(error)
    return None


def _problem(axis: str, parallel: ParallelConfig, why: str, no) -> Problem:
    degree = getattr(parallel, axis)
    # A divisor of what was asked: the ranks can then still be divided.
    fitting = next((n for n in range(degree - 1, 1, -1) if degree % n == 0 and no(n) is None), 1)
    return Problem(f"parallel.{axis}", str(degree), why, f"parallel.{axis}={fitting}")
