"""What a family's own forward pass adds to the loss, and what of it counts here: the loss is ours, not the family's.

`own_losses.json` has what a scan of the installed transformers found (tests/recipes/models/own_losses.py); each of its
keys is honoured or, where a configuration has it count, refused before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from conf.errors import Problem
from conf.rules_values import shown
from conf.schema import Config
from recipes.models.router_loss import COEFFICIENTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SWITCH = "output_router_logits"


class ReadKey(TypedDict):
    """An attribute of a configuration that the loss of some heads depends on."""

    heads: list[str]
    """Classes whose own loss depends on it."""
    switch: str | None
    """The attribute that has it count, where it does not always."""


class Family(TypedDict, total=False):
    """A row of the data."""

    read: dict[str, ReadKey]
    named: list[str]
    """Attributes called as if they were of a loss; where `read` does not have them, no loss depends on them."""
    router: dict[str, str]
    """Axis → why the routers' loss does not have one process's gradients there, or "" (`AXES`)."""


AXES = ("alone", "pipeline", "tensor", "tensor and pipeline", "sequence")
OFF: dict[str, Any] = {"disable_ngram_loss": True}
"""Value with which a key adds nothing, where that is not 0 or false."""
PREDICTS_MORE = ("mtp", "nextn")
"""In the names of keys about the prediction of several tokens at once."""


@cache
def families() -> dict[str, Family]:
    """`model_type` → its row; families without a key of a loss have none."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def problems(network: PreTrainedModel, cfg: Config) -> Iterator[Problem]:
    """What of the losses that a configuration asks for would not count."""
    config = network.config.get_text_config()
    row, head = families().get(config.model_type), type(network).__name__
    if row is None:
        return
    read = {key: found for key, found in row.get("read", {}).items() if head in found["heads"]}
    switched = [key for key, found in read.items() if found["switch"] == SWITCH]
    if getattr(config, SWITCH, False) and switched:
        yield from _routers(network, cfg, row, switched)
    for key, found in read.items():
        if found["switch"] is None and (value := _value(config, key)) not in (OFF.get(key, 0), None):
            rule = f"{head} has it in its loss, which is not minimised here: cross-entropy is"
            yield _problem(cfg, key, value, rule, shown(OFF.get(key, 0)))
    for key, value in cfg.model.config.items():
        if key in row.get("named", ()) and value != getattr(type(config)(), key, None):
            yield from _without_effect(cfg, key, value, read, head, SWITCH in row["named"])


def _without_effect(
    cfg: Config, key: str, value: Any, read: dict[str, ReadKey], head: str, has_switch: bool
) -> Iterator[Problem]:
    """A key that the request gives, and that changes nothing."""
    if key in read:
        if read[key]["switch"] == SWITCH and SWITCH not in cfg.model.config:
            rule, nearest = f"it only counts with {SWITCH}", f"model.config.{SWITCH}=true"
            yield Problem(f"model.config.{key}", shown(value), rule, nearest if has_switch else "leave it out")
    elif not (key == SWITCH and any(found["switch"] == SWITCH for found in read.values())):
        rule = f"the loss of {head} does not depend on it"
        if any(part in key for part in PREDICTS_MORE):
            rule = "transformers neither builds nor trains what would predict several tokens at once"
        yield Problem(f"model.config.{key}", shown(value), rule, "leave it out")


def _routers(network: PreTrainedModel, cfg: Config, row: Family, keys: list[str]) -> Iterator[Problem]:
    """What keeps the routers' loss from being the family's own."""
    config = network.config.get_text_config()
    name, known = config.model_type, row.get("router", {})
    if not (names := [key for key in keys if key in COEFFICIENTS]) or known.get("alone", "not compared"):
        why = f" ({known['alone']})" if known.get("alone") else ""
        rule = f"the routers' loss of {name} ({', '.join(keys)}) is not known to come out as in transformers{why}"
        yield _problem(cfg, SWITCH, True, rule, "false")
    elif not _value(config, names[0]):
        return
    elif cfg.task != "causal_lm":
        rule = f"{cfg.task} has no routers' loss ({', '.join(keys)}); causal_lm has"
        yield _problem(cfg, SWITCH, True, rule, "false")
    else:
        asked = [axis for axis in AXES[1:] if all(getattr(cfg.parallel, part) > 1 for part in axis.split(" and "))]
        for axis in asked:
            if why := known.get(axis, "not compared"):
                key = axis.split(" ")[0]
                rule = f"{name} has other gradients there with {SWITCH} ({why})"
                yield Problem(f"parallel.{key}", str(getattr(cfg.parallel, key)), rule, f"parallel.{key}=1")
        if cfg.train.compile:
            rule = f"nobody can listen to the routers inside compiled layers ({SWITCH})"
            yield Problem("train.compile", "true", rule, "train.compile=false")


def _problem(cfg: Config, key: str, value: Any, rule: str, off: str) -> Problem:
    """One about an attribute of the model's configuration, wherever that comes from."""
    if cfg.model.path is None:
        return Problem(f"model.config.{key}", shown(value), rule, f"model.config.{key}={off}")
    return Problem(
        "model.path", str(cfg.model.path), f"{key}={shown(value)}: {rule}", f"{key}: {off} in its config.json"
    )


def _value(config: Any, key: str) -> Any:
    """An attribute, of a nested configuration where the key has dots."""
    for part in key.split("."):
        config = getattr(config, part, None)
    return config
