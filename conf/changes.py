"""How what is asked for is laid over what is there. This is the only place that has the rule:

- what comes later wins: groups, then the recipe, then the command line from left to right (choices of groups first);
- a mapping stands for its keys: it sets those that it names, at any depth, and leaves their siblings alone, so that
  `model.config={a: 1, b: 2}` is `model.config.a=1 model.config.b=2`; an empty one sets nothing where a mapping is;
- anything else (a number, a text, a list, null) is set as a whole, also in the place of a mapping;
- `~key` takes a key out, with all that is below it; what stands behind it on the command line can set it anew.

YAML files are merged by Hydra, to the same effect (`tests/conf/test_conf_changes.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from conf.errors import Problem, RequestError, did_you_mean


@dataclass(frozen=True)
class Change:
    """One key set to a value that is no mapping (or an empty one), or taken out."""

    path: tuple[str, ...]
    value: Any = None
    takes_out: bool = False
    if_there: bool = False
    """Takes out what may not be there, without a word."""

    @property
    def key(self) -> str:
        return ".".join(self.path)


def changes_of(path: tuple[str, ...], value: Any) -> Iterator[Change]:
    """A value, key by key. Keys of mappings become text: `{1: x}` is what `.1=x` is."""
    if isinstance(value, dict) and value:
        for name, one in value.items():
            yield from changes_of((*path, name_of(name)), one)
    else:
        yield Change(path, value)


def name_of(key: Any) -> str:
    """A key of a mapping as JSON has it."""
    return {None: "null", True: "true", False: "false"}[key] if key is None or isinstance(key, bool) else str(key)


def apply(tree: dict[str, Any], changes: Iterable[Change]) -> None:
    """Lay changes over a tree of plain mappings, in place.

    Raises RequestError for a key that is to be taken out and is not there, and for one below an interpolation.
    """
    for change in changes:
        if change.takes_out:
            _take_out(tree, change)
            continue
        node = tree
        for depth, name in enumerate(change.path[:-1], start=1):
            below = node.get(name)
            if isinstance(below, str) and "${" in below:
                rule = f"{'.'.join(change.path[:depth])} is {below}, taken from elsewhere as a whole"
                raise RequestError(Problem(change.key, str(change.value), rule, "set it there"))
            if not isinstance(below, dict):
                below = node[name] = {}
            node = below
        leaf = change.path[-1]
        if change.value != {} or not isinstance(node.get(leaf), dict):
            node[leaf] = copy.deepcopy(change.value)


def _take_out(tree: dict[str, Any], change: Change) -> None:
    node: Any = tree
    for name in change.path[:-1]:
        node = node.get(name) if isinstance(node, dict) else None
    leaf = change.path[-1]
    if isinstance(node, dict) and leaf in node:
        del node[leaf]
    elif not change.if_there:
        near = did_you_mean(leaf, node) if isinstance(node, dict) else ""
        nearest = "~" + ".".join((*change.path[:-1], near)) if near else ""
        raise RequestError(Problem(f"~{change.key}", "", "there is no such key to take out", nearest))


def asked(changes: Iterable[Change]) -> dict[str, Any]:
    """Dotted key → the value that a sequence of changes leaves it with; not those that it takes out again."""
    found: dict[tuple[str, ...], Any] = {}
    for change in changes:
        found = {path: value for path, value in found.items() if path[: len(change.path)] != change.path}
        if not change.takes_out:
            found[change.path] = change.value
    return {".".join(path): value for path, value in found.items()}
