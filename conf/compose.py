"""The one way from the command line's overrides to a checked, typed configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.batch import Layout, resolve_batch
from conf.changes import Change, apply
from conf.environment import Environment, detect
from conf.errors import Problem, RequestError, did_you_mean
from conf.hydra_flags import passthrough
from conf.overrides import CONF_DIR, Overrides, read_overrides
from conf.rules import check
from conf.schema import Config, DataConfig

__all__ = ["compose", "hydra_passthrough", "list_recipes", "recipe_listing", "to_yaml"]

ConfigStore.instance().store(name="config_schema", node=Config)

OF_ROWS = (
    "seq_length", "image_size", "vocab_size", "held_out", "packing", "bucketing", "overlong", "empty", "stride",
    "max_dropped", "max_unreadable", "cache_dir",
)  # fmt: skip
"""Keys of `data` that say what is done with rows, whatever source they come from."""


def compose(overrides: Iterable[str], world_size: int, environment: Environment | None = None) -> Config:
    """The configuration of a run over `world_size` ranks: composed, resolved, checked.

    overrides: `+recipe=NAME`, `group=choice` and `key=value` in any order; keys under `deepspeed` and `model.config`
        need no `+`.
    environment: what this machine has; None looks.

    The batch triangle, `eval.micro_size` and `optimizer.fused` come back filled in. Raises RequestError with every
    problem of the request. Imports no torch, takes well under a second.
    """
    read = read_overrides(overrides)
    problems = list(read.problems)
    if "recipe" not in read.choices:
        if not any(problem.key in ("+recipe", "recipe") for problem in problems):
            problems.insert(0, Problem("+recipe=NAME", "", f"name a recipe:\n{recipe_listing()}"))
        raise RequestError(problems)
    if world_size < 1:
        raise RequestError([*problems, Problem("world_size", str(world_size), "at least one rank", "world_size=1")])
    _give_way(read)
    config, failures = _compose(read)
    problems += failures
    if config is not None:
        environment = (environment or detect()).on(config.device)
        found = [*_batch_problems(config, world_size), *check(config, _layout(config, world_size), environment)]
        problems += [p for p in found if not _covered(p, read.suspects)]
    if problems or config is None:
        raise RequestError(_distinct(problems))
    _fill_in(config, world_size)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; composing from it again gives the same run."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def hydra_passthrough(argv: list[str]) -> int | None:
    """Answer one of Hydra's flags (--help, --cfg job, --info, --shell-completion, …); None when `argv` has none.

    Returns the exit code. Raises RequestError for flags that have no place here, or a wrong request with `--cfg job`.
    """
    return passthrough(argv, lambda overrides, world_size: to_yaml(compose(overrides, world_size)))


def list_recipes() -> list[tuple[str, str]]:
    """Every recipe and its one-line description, from the `# description:` line of its file."""
    return [
        (file.stem, _description(file.read_text(encoding="utf-8")))
        for file in sorted((CONF_DIR / "recipe").glob("*.yaml"))
    ]


def recipe_listing() -> str:
    """The recipes as indented lines of a message."""
    width = max((len(name) for name, _ in list_recipes()), default=0)
    return "\n".join(f"      +recipe={name:<{width}}  {description}" for name, description in list_recipes())


def _description(text: str) -> str:
    found = re.search(r"^# description:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else ""


OWN = {"model": "type", "data": "kind", "optimizer": "name", "scheduler": "name", "precision": "name", "zero": "stage"}
"""Group → the key of it that says what the choice is."""


def _give_way(read: Overrides) -> None:
    """Take back what the recipe set for its own choice, where the user chose another one.

    `train.steps` replaces a recipe's epochs and the other way round; another optimizer than the recipe's comes with its
    own learning rate; held-out data of one's own replaces a share of the rows. `data=` brings a source with columns and
    labels of its own; a pretrained model brings its configuration and vocabulary, another family its own sizes. A
    choice is what it is, also where the recipe's own keys make another one of the recipe's choice.

    All of it stands before the user's own changes, which so win over it, whatever form they are written in.
    """
    given = {key: value for key, value in read.given().items() if value is not None}
    brought: dict[str, Any] = {}
    chosen = {group: choice_file(group, name) for group, name in read.choices.items()}
    recipe = chosen["recipe"]
    data, model = recipe.get("data") or {}, recipe.get("model") or {}
    defaults = {**defaults_of(choice_file("", "config")), **defaults_of(recipe)}
    for mine, theirs in (("steps", "epochs"), ("epochs", "steps")):
        if f"train.{mine}" in given and theirs in (recipe.get("train") or {}):
            brought[f"train.{theirs}"] = None
    if "held_out" in data and {"data.eval_path", "data.eval_split"} & given.keys():
        brought["data.held_out"] = DataConfig.held_out
    for group, key in OWN.items():
        if group in chosen and key in (recipe.get(group) or {}) and key in chosen[group]:
            brought[f"{group}.{key}"] = chosen[group][key]
    if "optimizer" in chosen and read.choices["optimizer"] != defaults["optimizer"]:
        brought["optimizer.lr"] = chosen["optimizer"]["lr"]
    if "data" in chosen:
        plain = {**asdict(DataConfig()), **chosen["data"]}
        brought |= {f"data.{key}": plain[key] for key in data if key not in OF_ROWS}
    foreign: set[str] = set()
    preset = chosen.get("model") or choice_file("model", defaults["model"])
    own, sizes = model.get("config") or {}, preset.get("config") or {}
    family = preset.get("type") if "model" in chosen else model.get("type", preset.get("type"))
    if "model" in chosen and model.get("type") not in (None, family):
        foreign |= own.keys()
    elif family != preset.get("type"):  # the recipe's own body names another family than the preset it began with
        foreign |= sizes.keys() - own.keys()
    if read.choices.get("model") == "pretrained":
        foreign |= own.keys()
        if "vocab_size" in data:
            brought["data.vocab_size"] = None
    elif given.get("model.type", family) != family:
        foreign |= sizes.keys() | own.keys()
    taken = [Change(("model", "config", name), takes_out=True, if_there=True) for name in sorted(foreign)]
    own_keys = {one.key for one in taken}
    mine_again = [replace(one, if_there=one.if_there or one.key in own_keys) for one in read.changes]
    set_back = [Change(tuple(key.split(".")), value) for key, value in brought.items()]
    read.changes = [*set_back, *taken, *mine_again]


def defaults_of(file: dict[str, Any]) -> dict[str, Any]:
    """Group → choice, of the defaults list of a file."""
    entries = [entry for entry in file.get("defaults", []) if isinstance(entry, dict)]
    return {key.removeprefix("override /"): value for entry in entries for key, value in entry.items()}


def choice_file(group: str, name: str) -> dict[str, Any]:
    """What the file of a choice says."""
    file = CONF_DIR / group / f"{name}.yaml"
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):  # Hydra 1.3 would not see `# @package` behind it
            where, rule = f"conf/{file.relative_to(CONF_DIR)}:1", "begins with a byte order mark"
            nearest = r"UTF-8 without one: sed -i '1s/^\xEF\xBB\xBF//' FILE"
            raise RequestError(Problem(where, "", rule, nearest))
        content = yaml.safe_load(text) or {}
    except (yaml.MarkedYAMLError, UnicodeDecodeError) as error:
        raise RequestError(_not_yaml(file, error)) from None
    if not isinstance(content, dict):
        rule = f"must be a mapping, key: value, not a {type(content).__name__}"
        raise RequestError(Problem(f"conf/{file.relative_to(CONF_DIR)}", "", rule))
    return content


def _not_yaml(file: Path, error: yaml.MarkedYAMLError | UnicodeDecodeError) -> Problem:
    if isinstance(error, UnicodeDecodeError):
        line = error.object.count(b"\n", 0, error.start) + 1
        where = f"conf/{file.relative_to(CONF_DIR)}:{line}"
        rule = f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start} of the file"
        return Problem(where, "", rule, "iconv -f ENCODING -t UTF-8")
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    return Problem(f"conf/{file.relative_to(CONF_DIR)}:{line}", "", f"is no YAML: {error.problem}")


def _compose(read: Overrides) -> tuple[Config | None, list[Problem]]:
    """Hydra's composition of the sound overrides, or the reason why there is none."""
    try:
        with initialize_config_dir(str(CONF_DIR), job_name="deepspeed_recipes", version_base="1.3"):
            tree = OmegaConf.to_container(hydra_compose("config", overrides=read.for_hydra()))
        assert isinstance(tree, dict)
        apply(tree, read.changes)  # type: ignore[arg-type]
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree)), []  # type: ignore[return-value]
    except RequestError as error:
        return None, error.problems
    except (HydraException, OmegaConfBaseException) as error:
        if problem := _in_a_file(str(error)):
            return None, [problem]
        key = getattr(error, "full_key", None) or "the overrides"
        return None, [Problem(str(key), "", str(error).splitlines()[0])]
    except (yaml.MarkedYAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        if mark is not None and Path(mark.name).is_file():  # a key twice, which only OmegaConf's loader refuses
            return None, [_not_yaml(Path(mark.name), error)]
        for file in sorted(CONF_DIR.rglob("*.yaml")):  # others do not know their file
            choice_file(str(file.parent.relative_to(CONF_DIR)), file.stem)
        raise


def _in_a_file(message: str) -> Problem | None:
    """A key of one of the files in `conf/` that is not as the schema has it, from what Hydra says of it."""
    file, key = re.search(r"In '([^']+)'", message), re.search(r"full_key: (\S+)", message)
    if file is None or key is None:
        return None
    if "not in" not in message:
        reason = message.splitlines()[1] if "\n" in message else message
        return Problem(f"conf/{file.group(1)}.yaml: {key.group(1)}", "", reason)
    section, _, name = key.group(1).rpartition(".")
    known = asdict(Config()) if not section else asdict(Config()).get(section, {})
    near = did_you_mean(name, known) if isinstance(known, dict) else ""
    nearest = f"{section}.{near}".lstrip(".") if near else "a key of docs/configuration.md"
    return Problem(f"conf/{file.group(1)}.yaml: {key.group(1)}", "", "there is no such key", nearest)


def _layout(config: Config, world_size: int) -> Layout:
    """The layout, or plain data parallelism when the degrees are wrong (that is reported by the batch check)."""
    try:
        return Layout.of(world_size, config.parallel)
    except RequestError:
        return Layout(world=world_size, data=world_size)


def _batch_problems(config: Config, world_size: int) -> list[Problem]:
    try:
        resolve_batch(config.batch, Layout.of(world_size, config.parallel))
    except RequestError as error:
        return error.problems
    return []


def _fill_in(config: Config, world_size: int) -> None:
    """What follows from the rest of the configuration, so that nobody computes it twice."""
    config.batch = resolve_batch(config.batch, Layout.of(world_size, config.parallel))
    if config.eval.micro_size is None:
        config.eval.micro_size = config.batch.micro_size
    if config.optimizer.fused is None and config.optimizer.name in ("adam", "adamw"):
        config.optimizer.fused = config.zero.offload_optimizer == "none"


def _covered(problem: Problem, suspects: set[str]) -> bool:
    """Whether a rule complains about a key that an earlier problem is already about."""
    keys = {part.partition("=")[0] for part in problem.key.split()}
    sections = {suspect[:-1] for suspect in suspects if suspect.endswith(".*")}
    return bool(keys & suspects) or any(key.startswith(section) for key in keys for section in sections)


def _distinct(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
