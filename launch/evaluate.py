"""A saved model's metrics on held-out rows: `python launch/evaluate.py MODEL +recipe=NAME key=value … [out=FILE]`.

MODEL is a run directory, its `model/`, another folder or a hub name; `out=` takes the predictions as JSON lines. The
held-out rows are those of `data.eval_path` (or `data.eval_split`), else the share `data.held_out` of its training:

    python launch/evaluate.py runs/sst2 +recipe=sst2 data.path=train.tsv data.eval_path=dev.tsv

Groups and keys are those of `python launch/train.py --help`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

# Started as a script, launch/ is on sys.path; the rooms are found from the repository root, from any working directory.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from conf.errors import Problem, RequestError
from conf.schema import DataConfig
from launch.runtime.console import Terminal
from launch.runtime.request import read_request, run_command, told_apart
from launch.runtime.standard_streams import RULE, missing, unbreakable
from recipes.durable import replace_text

COMMAND = "launch/evaluate.py"
ROWS = ("kind", "path", "name", "subset", "split", "revision", "target_path")
"""Keys of `data` that say which rows there are."""
PATHS = ("path", "target_path")
USAGE = f"{COMMAND} MODEL +recipe=NAME key=value … [out=predictions.jsonl]"


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(f"usage: {USAGE}\n\n{__doc__}")
        return 0
    words = [word for word in argv if not word.startswith(("-", "+"))]
    models, _ = told_apart(words, ())
    if len(models) != 1:
        raise RequestError(Problem("MODEL", " ".join(models), "one model is evaluated", USAGE))
    for key in ("model", "model.path"):
        if value := [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]:
            raise RequestError(Problem(key, value[0], "MODEL is what is evaluated", USAGE))
    path = Path(models[0]).expanduser()
    model = str(path / "model") if (path / "model" / "config.json").is_file() else models[0]
    given = [word for word in argv if word not in models]
    # The run directory is neither read nor written: one that holds a run is no obstacle.
    quoted = model.replace("\\", "\\\\").replace("'", "\\'")  # a path may hold what Hydra's grammar knows
    whole = [*given, "model=pretrained", f"model.path='{quoted}'", "overwrite=true"]
    request = read_request(whole, COMMAND, {"out": ""})
    out = Path(request.own["out"]) if request.own["out"] else None
    if out is not None and (out.exists() or not out.absolute().parent.is_dir()):
        rule = "exists already and is never overwritten" if out.exists() else "its folder does not exist"
        raise RequestError(Problem("out", str(out), rule, "out=ANOTHER_FILE"))

    from launch.runtime import processes

    cfg, layout, ranks = request.cfg, request.layout, request.ranks
    # The engine and its libraries print as they like, from their import on; what is printed here is one line.
    sys.stdout.flush()
    answer = unbreakable(os.dup(1), sys.stdout)
    os.dup2(2, 1)
    processes.set_environment(ranks, request.device)
    import torch

    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import held_out_batches
    from launch.runtime.out_of_memory import DeviceMemoryError, Phase, explaining
    from launch.runtime.run_dir import json_lines
    from launch.runtime.session import prepare
    from launch.runtime.staged import make_engine
    from recipes.base import Recipe

    logs = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    terminal = Terminal(ranks.first)
    try:
        recipe = prepare(request, terminal, finished=True)
        if said := recipe.said():
            terminal.say(said)
        if out is not None and type(recipe).predictions is Recipe.predictions:
            raise RequestError(Problem("out", str(out), f"{cfg.task} has metrics and no predictions", "no out="))
        if seen := _seen(path, cfg.data, recipe.report.get("rows")):
            raise RequestError(seen)
        terminal.capture(Path(logs.name) / f"rank_{ranks.rank}.log")
        device, phase = processes.join(ranks, request.device, cfg.train.threads), Phase()
        alone = True
        try:
            with explaining(phase, request, recipe, device):
                phase.doing, engine_config = "building the model", ds_config(cfg, layout, request.device)
                engine = phase.engine = make_engine(recipe, cfg, layout, engine_config, device, 1)
                phase.doing = "the evaluation"
                evaluation = engine.evaluate(held_out_batches(layout.place(ranks.rank).data, recipe, cfg, layout))
                torch.distributed.barrier()
            alone = False
        finally:
            processes.leave(broken=alone)
    except RequestError as error:
        raise RequestError(map(_of_model, error.problems)) from None
    except DeviceMemoryError as error:
        terminal.error.write(f"{error}\n")
        terminal.error.flush()
        os._exit(1)  # as in training: others may be in a collective call
    finally:
        terminal.release()
        logs.cleanup()
    if ranks.first:
        print(json.dumps(evaluation.metrics), file=answer, flush=True)
        if out is not None:
            replace_text(out, json_lines(evaluation.predictions))
        if (failure := missing(answer)) is not None:
            print(f"error: standard output {RULE}: {failure.strerror}", file=sys.stderr)
            return 1
    return 0


def _seen(model: Path, data: DataConfig, rows: Mapping[str, Sequence[str]] | None) -> Problem | None:
    """Held-out rows that the run of `model` (its folder, or its `model/`) trained on; None for models of elsewhere.

    rows: what identifies the rows by their content, as of `recipes.data.cache.identified` and in the run's summary.
    Raises RequestError where the run's files do not tell.
    """
    from recipes.data.sources import overlaps
    from recipes.supervised import APART

    run = model if (model / "config.yaml").is_file() else model.parent
    if not ((run / "config.yaml").is_file() and (run / "model").is_dir()):
        return None
    trained, now = _trained(run / "config.yaml"), rows or {}
    known = _known(run / "summary.json") or _found(trained)

    def same(files: str) -> int:
        """How many of the files that are judged, or of whose rows some are, the run was trained on."""
        return len(set(now.get(files, ())) & set(known.get("files", ())))

    if apart := [name for name in APART if getattr(data, name)]:
        if not overlaps(data.kind, same("held_out"), len(now.get("held_out", ()))):
            return None
        rule = f"{run} was trained on what is in {'this file' if same('held_out') == 1 else 'these files'}"
        nearest = f"data.{apart[0]}=…, with rows of its own"
        return Problem(f"data.{apart[0]}", str(getattr(data, apart[0])), rule, nearest)
    alike = bool(now.get("sources")) and set(now["sources"]) <= set(known.get("sources", ()))
    there = not any(_place(trained, name) != _place(vars(data), name) for name in (*ROWS, "mixture"))
    if not (alike or there or overlaps(data.kind, same("files"), len(now.get("files", ())))):
        return None
    was_apart = [f"data.{name}={value}" for name in APART if (value := trained.get(name))]
    share = float(trained.get("held_out", 0))
    if was_apart:
        rule, nearest = f"{run} was trained on all of these rows, and judged on others", " ".join(was_apart)
    elif data.held_out > share:  # a smaller share is a part of a larger one
        rule, nearest = (
            f"{run} held out {share:g}, and was trained on the rest of these rows",
            f"data.held_out={share:g}",
        )
    elif alike or not now.get("sources") or not known.get("sources"):
        return None
    elif there:
        rule = f"{data.path} has changed since {run} was trained on it, and with it which rows are held out"
        nearest = "data.eval_path=FILE, with rows of its own"
    else:
        rule = f"{run} was trained on what is in these files, in other ones, so that others of their rows were held out"
        nearest = f"data.path={trained.get('path')}, or data.eval_path=FILE with rows of its own"
    return Problem("data.held_out", f"{data.held_out:g}", rule, nearest)


def _trained(file: Path) -> dict[str, Any]:
    """The `data` of a run's config.yaml."""
    import yaml

    from recipes.supervised import APART

    whole = _mapping(file, yaml.safe_load, "YAML")
    data = whole.get("data")
    if not isinstance(data, dict):
        raise _damaged(file, "data", data, "a mapping")
    share = data.get("held_out", 0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise _damaged(file, "data.held_out", share, "a number from 0 to 1")
    for name in (*ROWS, *APART):
        if not isinstance(data.get(name), str | None):
            raise _damaged(file, f"data.{name}", data[name], "a text, or null")
    return data


def _known(file: Path) -> dict[str, list[str]]:
    """What a run's summary.json says that identifies its rows; nothing of a run that has none yet."""
    if not file.is_file():
        return {}
    rows = _mapping(file, json.loads, "JSON").get("rows")
    if rows is None or isinstance(rows, str):  # of an earlier version
        return {}
    lists = list(rows.values()) if isinstance(rows, dict) else [rows]
    if not all(isinstance(each, list) and all(isinstance(one, str) for one in each) for each in lists):
        raise _damaged(file, "rows", rows, "lists of texts")
    return rows


def _found(trained: Mapping[str, Any]) -> dict[str, list[str]]:
    """The same of the files that a run was trained on, where they still are."""
    from recipes.data.sources import FileSource

    kind, path = trained.get("kind"), trained.get("path")
    if not (isinstance(kind, str) and isinstance(path, str)):
        return {}
    try:
        return {"files": FileSource(DataConfig(kind=kind, path=path), "data", 0, None).digests(False)}
    except (RequestError, OSError):
        return {}


def _mapping(file: Path, parse: Callable[[str], Any], form: str) -> dict[str, Any]:
    """What is in a file of a run."""
    import yaml

    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or f"it is no {form}: {(str(error).splitlines() or [''])[0]}"
        raise _damaged(file, "", "", reason) from None
    if not isinstance(found, dict):
        raise _damaged(file, "", "", f"it must be a mapping in {form}, it is {json.dumps(found, default=str)[:40]}")
    return found


def _damaged(file: Path, key: str, value: Any, wrong: str) -> RequestError:
    """The run's files do not tell what it was trained on. wrong: what a value must be, or what is wrong with a file."""
    said = f"{key} is {json.dumps(value, default=str)[:40]}, it must be {wrong}" if key else wrong
    rule = f"damaged, so that it does not tell which rows the model was trained on: {said}"
    nearest = "the file as the run wrote it, or a copy of the run's model/ elsewhere, which is judged without asking"
    return RequestError(Problem(str(file), "", rule, nearest))


def _place(data: Mapping[str, Any], name: str) -> Any:
    """A value of `data`; of a path, where it is."""
    value = data.get(name)
    if name == "mixture":
        return [asdict(one) if is_dataclass(one) else one for one in value or ()]  # type: ignore[arg-type]
    return str(Path(value).expanduser().resolve()) if name in PATHS and value else value


def _of_model(problem: Problem) -> Problem:
    """A problem with model.path is one with MODEL."""
    if problem.key != "model.path":
        return problem
    return replace(problem, key="MODEL", nearest=problem.nearest.replace("model.path=", ""))


if __name__ == "__main__":
    run_command(main)
