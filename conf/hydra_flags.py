"""Hydra's own flags (`--help`, `--cfg`, `--info`, shell completion) for the commands of launch/."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from conf.errors import Problem, RequestError
from conf.overrides import CONF_DIR, read_overrides

SHOWS = ("--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc", "--cfg", "-c")
"""Flags that show something and end."""
SWEEPS = ("--multirun", "-m")
FIXED = ("--run", "-r", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun")


def passthrough(argv: list[str], resolved: Callable[[list[str], int], str]) -> int | None:
    """Answer a Hydra flag in `argv` and return the exit code; None when there is none.

    resolved: (overrides, world size) → the checked configuration as YAML, for `--cfg job`. Under a launcher only rank 0
    prints. Raises RequestError for flags of Hydra that have no place here, and for a wrong request with `--cfg job`.
    """
    flags = [argument.partition("=")[0] for argument in argv if argument.startswith("-")]
    _refuse(flags)
    if not any(flag in SHOWS for flag in flags):
        return None
    if os.environ.get("RANK", "0") != "0":
        return 0
    parser = get_args_parser()
    parser.error = _unreadable  # type: ignore[method-assign, assignment]
    asked = parser.parse_args(argv)
    if asked.cfg == "job" and not (asked.help or asked.hydra_help):
        print(_part(resolved(asked.overrides, int(os.environ.get("WORLD_SIZE", "1"))), asked.package), end="")
        return 0
    return _hydra_main(_for_hydra(argv, asked))


def _refuse(flags: list[str]) -> None:
    problems = [
        Problem(
            flag,
            "",
            "one run per command; a sweep is a loop of the shell",
            "for s in 1 2; do … name=run$s seed=$s; done",
        )
        for flag in flags
        if flag in SWEEPS
    ]
    problems += [
        Problem(flag, "", "the configuration is that of conf/ and a plain command runs it; this flag has no place here")
        for flag in flags
        if flag in FIXED
    ]
    if problems:
        raise RequestError(problems)


def _unreadable(message: str) -> None:
    raise RequestError(Problem("the command line", "", message, "--help"))


def _part(text: str, package: str | None) -> str:
    """The YAML of the whole configuration, or of the part that `--package` names."""
    if package is None:
        return text
    part = OmegaConf.select(OmegaConf.create(text), package)
    if part is None:
        raise RequestError(Problem("--package", package, "no such part of the configuration"))
    return OmegaConf.to_yaml(part) if OmegaConf.is_config(part) else f"{part}\n"


def _for_hydra(argv: list[str], asked: argparse.Namespace) -> list[str]:
    """The command line with the overrides in Hydra's own spelling; completion reads them as they are."""
    if asked.shell_completion:
        return argv
    kept = [argument for argument in argv if argument not in asked.overrides]
    return kept + ([] if asked.help or asked.hydra_help else read_overrides(asked.overrides).spelled_out())


def _hydra_main(argv: list[str]) -> int:
    """Run `hydra.main` on conf/ with nothing behind it: the flags in `argv` keep it from ever getting there."""

    def nothing(config: DictConfig) -> None:
        raise AssertionError("a Hydra flag that runs the program got through")

    before = sys.argv
    sys.argv = [before[0], *argv]
    try:
        hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(nothing)()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        sys.argv = before
    return 0
