"""How every command starts and ends: the request is read and checked before torch is imported, the exit code agreed."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.batch import Layout
from conf.compose import compose, hydra_passthrough, recipe_listing
from conf.environment import Environment, detect
from conf.errors import Problem, RequestError
from conf.schema import Config
from launch.runtime import standard_streams
from launch.runtime.processes import Ranks, must_exit, ranks_from_environment
from recipes import recipe_class
from recipes.durable import told

SPEAK_AFTER_S = 5.0


@dataclass(frozen=True)
class Request:
    """A checked request: everything that configuration and data files show at a glance is in order."""

    cfg: Config
    layout: Layout
    environment: Environment
    ranks: Ranks
    own: dict[str, str]
    """The command's own `key=value` arguments (those named in `own` of `read_request`)."""

    @property
    def device(self) -> str:
        return self.environment.device if self.cfg.device == "auto" else self.cfg.device


def split_arguments(argv: list[str], own: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """(Hydra overrides, the command's own keys). Drops the `--local_rank=N` that the deepspeed launcher puts first."""
    overrides, values = [], dict(own)
    for argument in argv:
        key, equals, value = argument.partition("=")
        if key in ("--local_rank", "--local-rank"):
            continue
        if equals and key in own:
            values[key] = value
        else:
            overrides.append(argument)
    return overrides, values


def read_request(argv: list[str], command: str, own: dict[str, str] | None = None) -> Request:
    """Compose and check a request without importing torch.

    own: the command's own keys with their defaults (`{"world_size": "1"}`). Raises RequestError with every problem at
    once, or SystemExit when a Hydra flag (--help, --cfg, completion) answered already.
    """
    overrides, values = split_arguments(argv, own or {})
    if (code := hydra_passthrough(overrides)) is not None:
        raise SystemExit(code)
    ranks = ranks_from_environment()
    if not any(argument.lstrip("+").startswith("recipe=") for argument in overrides):
        if ranks.first:
            print(f"error: no recipe named; {command} takes one of\n{recipe_listing()}", file=sys.stderr)
        raise SystemExit(2)
    world = ranks.world
    if "world_size" in values:
        text = values["world_size"]
        if not (text.isascii() and text.isdigit()) or int(text) < 1:
            raise RequestError(Problem("world_size", text, "must be a positive number of ranks", "world_size=8"))
        world = int(text)
    environment = detect()
    if "world_size" in values and "device=cuda" in overrides and environment.device != "cuda":
        environment = environment.elsewhere(world)  # planning, from a laptop, for machines that have GPUs
    cfg = compose(overrides, world, environment)
    recipe = recipe_class(cfg.task)(cfg)
    if problems := recipe.check() + recipe.check_evaluation():
        raise RequestError(problems)
    return Request(cfg, Layout.of(world, cfg.parallel), environment, ranks, values)


def told_apart(argv: list[str], keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """(folders, pairs of key and value) of a command's arguments: a folder's name may hold `=`."""
    pairs = [word for word in argv if "=" in word and (word.partition("=")[0] in keys or not _is_folder(word))]
    return [word for word in argv if word not in pairs], pairs


def _is_folder(word: str) -> bool:
    return Path(word).expanduser().is_dir()


def _standing_somewhere(argv: list[str]) -> list[str]:
    try:
        os.getcwd()
    except OSError:
        rule = "the folder this command was started in does not exist any more"
        raise RequestError(Problem("working directory", "", rule, "cd into another one")) from None
    return argv


def _readable(argv: list[str]) -> list[str]:
    """The arguments, if they are text, and their `~` leads somewhere. Raises RequestError."""
    problems = []
    if os.path.expanduser("~") == "~":  # no HOME, and a user that the machine has no entry of
        os.environ["HOME"] = "/nonexistent"  # as Debian calls it; what cannot be written there says so by its key
    for word in argv:
        key, _, value = word.partition("=")
        shown = value.encode("utf-8", "backslashreplace").decode()
        if any("\ud800" <= character <= "\udfff" for character in word):
            rule = "is not UTF-8, which names of files are here"
            problems.append(Problem(key.encode("utf-8", "backslashreplace").decode(), shown, rule, "another name"))
        elif (path := value.strip("'\"")).startswith("~") and os.path.expanduser(path) == path:
            user = path.partition("/")[0][1:]
            problems.append(Problem(key, value, f"there is no user '{user}'", f"{key}=\"'/home/…'\""))
    if problems:
        raise RequestError(problems)
    return argv


def run_command(main: Callable[[list[str]], int], answers: bool = True) -> None:
    """Run a command's `main(argv)` and exit: 0 done, 2 the request is wrong, 1 anything else.

    answers: what it prints is what it is for, and it has failed where that could not be written.
    """
    standard_streams.in_utf8()
    standard_streams.secure()
    try:
        ranks = ranks_from_environment()
    except RequestError as error:
        print(error.render(), file=sys.stderr)
        raise SystemExit(2) from None
    try:
        code = main(_standing_somewhere(_readable(sys.argv[1:])))
    except RequestError as error:
        if not ranks.first:
            # Rank 0 says the same and the launcher ends this one meanwhile. If not, only this rank was refused: say it.
            time.sleep(SPEAK_AFTER_S)
        print(error.render() if ranks.first else f"rank {ranks.rank}: {error.render()}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        if ranks.first:
            print("interrupted", file=sys.stderr)
        code = 1
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # of a disk, while it was written to: no mistake of ours
            print(f"error: {told(error)}", file=sys.stderr)
        elif not must_exit():
            raise
        else:
            traceback.print_exc()
        code = 1
    sys.stdout.flush()
    if answers and code == 0 and (failure := standard_streams.missing(sys.stdout)) is not None:
        print(f"error: standard output {standard_streams.RULE}: {failure.strerror}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    if must_exit():
        os._exit(code)
    # The interpreter's last collection looks through all that torch and transformers have loaded, for two seconds.
    gc.freeze()
    raise SystemExit(code)
