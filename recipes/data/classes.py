"""The classes of a trained model, and those of rows: the same ones, in the model's order."""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.errors import Problem, RequestError
from recipes.data.values import assigned

NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)?(\.[0-9]*)?")
"""`007` is none but a name: in codes a leading zero has a meaning."""
AROUND = " \t\r\n\v\f\u00a0\u200b\u2060\ufeff"
BETWEEN = re.compile(r"[\s_.-]+")
RARE, ALIKE = 0.1, 0.85
"""A class this much rarer than one that is spelled this much like it is taken for a slip."""
MISSING = {"", "nan", "none", "null", "nil", "na", "n/a", "#n/a", "<na>", "(null)", "undefined", "nat", "missing"}
"""What tables and programs write where there is no value."""
QUOTES = "\"'`´“”„‘’«»"
LOOK_ALIKE = str.maketrans(
    "АВЕКМНОРСТУХІЈЅаеорсухіјѕкΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABEKMHOPCTYXIJSaeopcyxijskABEZHIKMNOPTYXo"
)  # fmt: skip
"""Letters of Cyrillic and Greek that nobody tells from Latin ones."""
COMPARED = 300
"""Classes that are compared with each other for slips, at most."""


def normalised(label: Any) -> str:
    """The name of a class: composed (NFC), without what stands around it, numbers by their value (`1.0` is `1`)."""
    name = unicodedata.normalize("NFC", str(label)).strip(AROUND).strip()
    if not (NUMBER.fullmatch(name) and any(sign.isdigit() for sign in name)):
        return name
    whole, _, part = name.lstrip("+-").partition(".")
    part = part.rstrip("0")
    value = f"{whole or 0}.{part}" if part else whole or "0"
    return f"-{value}" if name[0] == "-" and value != "0" else value


def folded(name: str) -> str:
    """What is alike in names of one class that is written in two ways: case, width, spaces, signs, zeros, quotes."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = text.strip(QUOTES) or text
    return (text if _is_number(text) else BETWEEN.sub("", text)).lstrip("0") or text


def near_duplicates(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """(rarer, other) classes that look like one written in two ways, or with a slip. counts: class → rows."""
    names = sorted(counts, key=lambda name: -counts[name])
    found, seen = [], dict[str, str]()
    for name in names:
        others = [seen.setdefault(key, name) for key in (folded(name), _skeleton(name))]
        found += [(name, other) for other in dict.fromkeys(others) if other != name]
    words = [name for name in names if len(name) >= 5 and name.replace(" ", "").isalpha()][:COMPARED]
    for place, name in enumerate(words):
        often = [other for other in words[:place] if counts[name] <= RARE * counts[other]]
        if (near := difflib.get_close_matches(name, often, 1, ALIKE)) and (name, near[0]) not in found:
            found.append((name, near[0]))
    return found


def _skeleton(name: str) -> str:
    """What names that look the same have in common, besides what `folded` takes out."""
    return f"looks like {folded(name.translate(LOOK_ALIKE))}"


def told_apart(name: str, other: str) -> str:
    """A name as it is written, with the numbers of its letters where nothing else tells it from the other one."""
    return ascii(name) if name.translate(LOOK_ALIKE) == other.translate(LOOK_ALIKE) else repr(name)


def doubtful(name: str) -> str:
    """Why what stands for the class of a row may be none; empty where it looks like one."""
    quoted = len(name) > 2 and name[0] == name[-1] and name[0] in "\"'"
    if (name[1:-1].strip() if quoted else name).casefold() in MISSING:
        return f"labels {name!r}, as where a value is missing; data.labels=[…] with it, if it is a class"
    if quoted:
        return f"labels in quotation marks, {name}, which are a part of the class; is there a space before them?"
    return ""


def _is_number(name: str) -> bool:
    return bool(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name))


def class_names(folder: Path) -> list[str] | None:
    """The names of a model's classes in its order; LABEL_0, … where it has none. None without a configuration."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    known = json.loads(file.read_text(encoding="utf-8")).get("id2label") or {}
    try:
        return [str(known[number]) for number in sorted(known, key=int)] or None
    except (ValueError, TypeError):
        rule = 'its id2label is no table of numbers and names, as {"0": "negative", "1": "positive"}'
        raise RequestError(Problem("model.path", str(file), rule)) from None


def in_order(names: Sequence[str], classes: Iterable[str]) -> list[str] | None:
    """`names` as `classes` are written, which may differ in case or as in `normalised`; None where these are others."""
    classes = set(classes)
    if classes <= set(names):
        return list(names)
    written = {_key(name): name for name in classes}
    known = {_key(name) for name in names}
    if len(written) < len(classes) or len(known) < len(names) or not written.keys() <= known:
        return None
    return [written.get(_key(name), name) for name in names]


def _key(name: str) -> str:
    return normalised(name).casefold()


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
            raise RequestError(Problem("data.labels", _shown(given), rule, assigned("data.labels", order)))
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
        nearest = f"{assigned('data.labels', names)} where the rows' numbers are the model's"
    raise RequestError(Problem("data.labels", "null", rule, nearest))


def _refuse_moved(given: list[str], names: list[str]) -> None:
    """Raises RequestError where a name that the model knows too stands for another of its outputs."""
    places = {_key(name): number for number, name in enumerate(names)}
    moved = [name for number, name in enumerate(given) if places.get(_key(name), number) != number]
    if moved:
        rule = f"'{moved[0]}' is output {places[_key(moved[0])]} of the model ({', '.join(names)})"
        order = dict.fromkeys(range(max(len(names), len(given))), "…")
        order |= {places[_key(name)]: name for name in given if _key(name) in places}
        raise RequestError(Problem("data.labels", _shown(given), rule, assigned("data.labels", order.values())))


def _shown(names: Sequence[str]) -> str:
    return f"[{','.join(names)}]"
