"""The classes of a trained model, and those of rows: the same ones, in the model's order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from conf.errors import Problem, RequestError


def class_names(folder: Path) -> list[str] | None:
    """The names of a model's classes in its order; LABEL_0, … where it has none. None without a configuration."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    known = json.loads(file.read_text()).get("id2label") or {}
    try:
        return [str(known[number]) for number in sorted(known, key=int)] or None
    except (ValueError, TypeError):
        rule = 'its id2label is no table of numbers and names, as {"0": "negative", "1": "positive"}'
        raise RequestError(Problem("model.path", str(file), rule)) from None


def in_order(names: Sequence[str], classes: Iterable[str]) -> list[str] | None:
    """`names` as `classes` are written, which may differ in upper and lower case; None where these are others."""
    classes = set(classes)
    if classes <= set(names):
        return list(names)
    written = {name.casefold(): name for name in classes}
    known = {name.casefold() for name in names}
    if len(written) < len(classes) or len(known) < len(names) or not written.keys() <= known:
        return None
    return [written.get(name.casefold(), name) for name in names]


def order_of_classes(given: list[str] | None, names: list[str] | None, classes: Iterable[str]) -> list[str]:
    """The classes of a model that is evaluated, in its order.

    given: `data.labels`. names: as of `class_names`. classes: those of the rows. Raises RequestError (data.labels)
    where nothing tells which output is which class: a wrong order would be a wrong score without a word.
    """
    classes = list(classes)
    size = len(names or ())
    nameless = names is None or all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    if given:
        if not nameless and names is not None and (order := in_order(names, given)) and order != given:
            rule = f"the model's classes are in another order: {', '.join(names)}"
            raise RequestError(Problem("data.labels", _shown(given), rule, f"data.labels={_shown(order)}"))
        if not nameless and names is not None:
            _refuse_moved(given, names)
        return given
    if names and not nameless and (order := in_order(names, classes)):
        return order
    numbers = all(name.isascii() and name.isdecimal() and int(name) < size for name in classes)
    if names and nameless and numbers:
        return [str(number) for number in range(size)]  # rows that give the number of the output
    has = "does not name its classes" if nameless else f"has the classes {', '.join(names or ())}"
    rule = f"the model {has}, the rows have {', '.join(sorted(classes)[:12])}: which is which?"
    nearest = "data.labels=[…], the rows' names in the model's order"
    if names and numbers:  # data sets number classes in an order of their own: MNLI's 0 is not that of every model
        nearest = f"data.labels={_shown(names)} where the rows' numbers are the model's"
    raise RequestError(Problem("data.labels", "null", rule, nearest))


def _refuse_moved(given: list[str], names: list[str]) -> None:
    """Raises RequestError where a name that the model knows too stands for another of its outputs."""
    places = {name.casefold(): number for number, name in enumerate(names)}
    moved = [name for number, name in enumerate(given) if places.get(name.casefold(), number) != number]
    if moved:
        rule = f"'{moved[0]}' is output {places[moved[0].casefold()]} of the model ({', '.join(names)})"
        order = dict.fromkeys(range(max(len(names), len(given))), "…")
        order |= {places[name.casefold()]: name for name in given if name.casefold() in places}
        raise RequestError(Problem("data.labels", _shown(given), rule, f"data.labels={_shown(list(order.values()))}"))


def _shown(names: Sequence[str]) -> str:
    return f"[{','.join(names)}]"
