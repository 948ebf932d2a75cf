"""Reading the command line's overrides: every mistake in them is collected, and what is sound is kept for Hydra."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from conf.changes import Change, asked, changes_of, name_of
from conf.errors import Problem, did_you_mean
from conf.schema import Config, SourceConfig

CONF_DIR = Path(__file__).resolve().parent
FREE_FORM = ("deepspeed", "model.config", "data.chat_options")
"""Keys whose sub-keys are not ours: the engine's, those of transformers' model configs and of chat templates."""


def groups() -> dict[str, list[str]]:
    """Every config group and its choices, from the YAML files."""
    files = sorted(CONF_DIR.glob("*/*.yaml"))
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(file.parent.name, []).append(file.stem)
    return found


def schema_keys(schema: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema and its type annotation, sections included."""
    hints = typing.get_type_hints(schema)
    found: dict[str, Any] = {}
    for one in dataclasses.fields(schema):
        key, hint = prefix + one.name, hints[one.name]
        found[key] = hint
        if dataclasses.is_dataclass(hint):
            found.update(schema_keys(hint, key + "."))
    return found


def free_form(key: str) -> bool:
    """Whether `key` lies inside a section with keys that are not ours."""
    return any(key.startswith(f"{section}.") for section in FREE_FORM)


def nearest_choice(value: str, choices: Iterable[str]) -> str:
    """The choice nearest to `value`; may be empty.

    One that ends in it (`2` → `stage2`), else the most similar one, else one that begins and ends alike
    (`float16` → `fp16`).
    """
    lowered = value.lower()
    ending = [choice for choice in choices if lowered and choice.endswith(lowered)]
    alike = [choice for choice in choices if lowered and (choice[0], choice[-2:]) == (lowered[0], lowered[-2:])]
    return next(iter(ending), "") or did_you_mean(lowered, choices) or next(iter(alike), "")


@dataclass
class Overrides:
    """The sound part of the overrides, ready for Hydra, and what was wrong with the rest."""

    choices: dict[str, str] = field(default_factory=dict)
    """Group → choice (`recipe` included)."""
    changes: list[Change] = field(default_factory=list)
    """What keys are set to, in the order of the command line; mappings key by key."""
    problems: list[Problem] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)
    """Keys that a problem already covers: the rules must not complain about their consequences."""

    def given(self) -> dict[str, Any]:
        """Dotted key → the value that is asked for."""
        return asked(self.changes)

    def for_hydra(self) -> list[str]:
        """Arguments of Hydra's compose API for the choices alone; the changes are laid over what comes of them."""
        return [f"{'+' if group == 'recipe' else ''}{group}={choice}" for group, choice in self.choices.items()]

    def spelled_out(self) -> list[str]:
        """The same with the changes, in Hydra's spelling; `++` adds keys where Hydra would only change those there."""
        return self.for_hydra() + [
            f"~{one.key}" if one.takes_out else f"{'++' if free_form(one.key) else ''}{one.key}={_written(one.value)}"
            for one in self.changes
        ]


def read_overrides(arguments: Iterable[str]) -> Overrides:
    """Check each argument on its own: syntax, group and choice, key, type, given once.

    A misspelt key or choice is replaced by the nearest legal one, so that the rest is checked in the context that was
    meant; the misspelling stays a problem.
    """
    result = Overrides()
    reader = _Reader(result)
    for argument in arguments:
        reader.read(argument)
    return result


class _Reader:
    """State of one pass over the overrides."""

    def __init__(self, result: Overrides):
        self.result = result
        self.groups = groups()
        self.keys = schema_keys()
        self.parser = OverridesParser.create()
        self.schema = OmegaConf.structured(Config)

    def problem(self, key: str, value: str, rule: str, nearest: str = "") -> None:
        self.result.problems.append(Problem(key, value, rule, nearest))
        self.result.suspects.add(key)

    def read(self, argument: str) -> None:
        if argument.startswith("-"):
            self.problem(argument, "", "not an option; a request is made of group=choice and key=value")
            return
        key, _, text = argument.lstrip("+~").partition("=")
        try:
            override = self.parser.parse_override(argument)
        except HydraException:
            if (value := _json(text)) is None:
                self._unreadable(argument, key, text)
            elif key in self.keys or free_form(key):
                self._set(key, value, text)
            else:
                self._unknown(key, value, text)
            return
        key = override.key_or_group
        if override.package is not None or key.split("/")[0] == "hydra" or key.startswith("hydra."):
            self.problem(key, text, "Hydra's own settings and packages are fixed here; conf/config.yaml has them")
        elif override.is_delete():
            self._remove(key, text)
        elif override.is_sweep_override():
            self._several(key, text)
        elif key in self.keys and isinstance(override.value(), dict):
            self._set(key, override.value(), text)
        elif key in self.groups:
            self._choose(argument, key, override, text)
        elif key in self.keys or free_form(key):
            self._set(key, override.value(), text)
        else:
            self._unknown(key, override.value(), text)

    def _unreadable(self, argument: str, key: str, text: str) -> None:
        if "=" not in argument:
            recipe = nearest_choice(argument, self.groups.get("recipe", []))
            self.problem(
                argument,
                "",
                "not an override; a request is made of group=choice and key=value",
                f"+recipe={recipe}" if recipe else "",
            )
            return
        if text.lstrip().startswith("{"):
            self.problem(key, text, "a mapping is written {key: value, …}, or in JSON; this one cannot be read")
            return
        quoted = text.strip("'\"").replace("\\", "\\\\").replace("'", "\\'")
        self.problem(key, text, "this value needs quotes inside the shell's own", f"\"{key}='{quoted}'\"")

    def _remove(self, key: str, text: str) -> None:
        if not free_form(key) and key not in FREE_FORM:
            nearest = ""
            if key in self.keys and not dataclasses.is_dataclass(self.keys[key]):
                takes_null = type(None) in typing.get_args(self.keys[key])
                nearest = f"{key}=null" if takes_null else f"{key}={_yaml(OmegaConf.select(self.schema, key))}"
            self.problem(f"~{key}", text, "only keys under deepspeed and model.config can be taken out", nearest)
        elif text:
            self.problem(f"~{key}", text, "a key is taken out whatever its value is", f"~{key}")
        elif key in FREE_FORM:
            self.result.changes += [Change(tuple(key.split(".")), takes_out=True), Change(tuple(key.split(".")), {})]
        else:
            self.result.changes.append(Change(tuple(key.split(".")), takes_out=True))

    def _several(self, key: str, text: str) -> None:
        rule = "one value per key: a run has one configuration, a sweep is several runs"
        if _is_list(self.keys.get(key)):
            self.problem(key, text, "a list is written in brackets", f"{key}=[{text}]")
        elif key == "track":
            self.problem(key, text, rule, f"track.to=[{text}]")
        elif self.keys.get(key) in (str, str | None):
            self.problem(key, text, rule, f"\"{key}='{text}'\"")
        else:
            self.problem(key, text, rule, f"{key}={text.split(',')[0]}")

    def _choose(self, argument: str, group: str, override: Override, text: str) -> None:
        value, choices = override.value(), self.groups[group]
        if group in self.result.choices:
            self._twice(group, text)
            return
        if group == "recipe" and not argument.startswith("+"):
            self.problem("recipe", text, "a recipe is added to the defaults, with a plus", f"+recipe={text}")
        choice = text if text in choices else ""
        if not choice:
            choice = nearest_choice(str(value), choices) if isinstance(value, (str, int, float)) else ""
            plus = "+" if group == "recipe" else ""
            self.problem(
                f"{plus}{group}", text, f"one of {', '.join(choices)}", f"{plus}{group}={choice}" if choice else ""
            )
            self.result.suspects.add(f"{group}.*")
        if choice:
            self.result.choices[group] = choice

    def _set(self, key: str, value: Any, text: str) -> None:
        """Keep what sets `key`; a mapping key by key (`conf/changes.py` has the rule)."""
        section = dataclasses.is_dataclass(self.keys.get(key))
        if value == {} and (section or key in FREE_FORM):
            nearest = f"~{key} takes all of its keys out" if key in FREE_FORM else ""
            self.problem(key, text, "a mapping sets the keys that it names, and this one names none", nearest)
        elif isinstance(value, dict) and (section or key in FREE_FORM or free_form(key)):
            for name, one in value.items():
                self._set_below(key, name_of(name), one)
            if not value:
                self.result.changes.append(Change(tuple(key.split(".")), {}))
        elif isinstance(value, str) and "${" in value and (section or key in FREE_FORM):
            self.problem(key, text, "must be a mapping, {key: value, …}, not a reference to one")
        elif free_form(key) or self._typed(key, value, text):
            # A key given twice takes its last value, as in Hydra: scripts append overrides to defaults of their own.
            self.result.changes += changes_of(tuple(key.split(".")), value)

    def _set_below(self, section: str, name: str, value: Any) -> None:
        key, text = f"{section}.{name}", _yaml(value)
        if "." in name:
            rule = "a key of a mapping has no dots"
            self.problem(section, f"{{{name}: {text}}}", rule, f"{key}={text}, or one mapping in the other")
        elif key in self.keys or free_form(key):
            self._set(key, value, text)
        else:
            self._unknown(key, value, text)

    def _typed(self, key: str, value: Any, text: str) -> bool:
        """Whether a key of the schema can have this value; a problem where it cannot."""
        try:
            OmegaConf.update(self.schema, key, value, merge=True)
        except ConfigKeyError as error:
            wrong, known = str(error.key), [one.name for one in dataclasses.fields(SourceConfig)]
            near = did_you_mean(wrong, known)
            self.problem(key, text, f"no such key in it: {wrong}; it has {', '.join(known)}", near)
            return False
        except OmegaConfBaseException:
            self.problem(key, text, f"must be {_in_words(self.keys[key])}", self._nearest_value(key, value))
            return False
        return True

    def _nearest_value(self, key: str, value: Any) -> str:
        """A legal assignment near a value of the wrong type; may be empty."""
        hint = self.keys[key]
        kinds = set(typing.get_args(hint)) or {hint}
        if _is_list(hint) and not isinstance(value, (list, dict)):
            return f"{key}=[{_yaml(value)}]"
        if int in kinds and isinstance(value, float) and abs(value) < 2**53:
            return f"{key}={round(value)}"
        if bool in kinds:
            return f"{key}={did_you_mean(str(value).lower(), ('true', 'false')) or 'true'}"
        if value is None or isinstance(value, bool) or not kinds & {int, float}:
            return ""
        digits = "".join(c for c in str(value) if c.isdigit() or c in ".-")
        return f"{key}={digits}" if digits.isdigit() else ""

    def _twice(self, key: str, text: str) -> None:
        before = self.result.choices.get(key, "")
        plus = "+" if key == "recipe" else ""
        self.problem(f"{plus}{key}", text, f"given twice, first as {before}; give it once", f"{plus}{key}={text}")

    def _unknown(self, key: str, value: Any, text: str) -> None:
        leaf = key.rsplit(".", 1)[-1]
        same_leaf = next((known for known in self.keys if known.rsplit(".", 1)[-1] == leaf), "")
        similar = did_you_mean(key, [*self.keys, *self.groups])
        near = (similar or same_leaf) if "." in key else (same_leaf or similar)
        self.problem(key, text, "no such key", f"{near}={text}" if near else "")
        if not near or near in self.result.suspects:
            return
        self.result.suspects.add(near)
        if near in self.groups:
            if text in self.groups[near]:
                self.result.choices.setdefault(near, text)
            self.result.suspects.add(f"{near}.*")
        elif near not in self.result.given() and not dataclasses.is_dataclass(self.keys[near]):
            self._set(near, value, text)


def _is_list(hint: Any) -> bool:
    return any(typing.get_origin(part) is list for part in (hint, *typing.get_args(hint)))


def _in_words(hint: Any) -> str:
    """A type as a person would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(part) for part in arguments)
    if origin is list:
        inner = "{key: value, …}" if dataclasses.is_dataclass(arguments[0]) else "value"
        return f"a list, [{inner}, …]"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping, {key: value, …}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[hint]


def _json(text: str) -> Any:
    """A mapping or list in JSON, whose quoted keys Hydra does not read; None where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, (dict, list)) else None


def _yaml(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return name_of(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name_of(name)}: {_yaml(one)}' for name, one in value.items())}}}"
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, list) else str(value)


def _written(value: Any) -> str:
    """The same so that Hydra reads this value and no other."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{name_of(name)}:{_written(one)}' for name, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if not isinstance(value, str):
        return _yaml(value)
    quoted = value.replace("\\'", "\\\\'").replace("'", "\\'")
    return f"'{quoted}'"
