"""Show what a run will be without starting it: `python launch/plan.py +recipe=NAME world_size=8 [format=json] …`.

Layout, batch, memory of each rank, bytes sent, bubble, and the engine's configuration.
`search=true` lists all layouts of that many ranks, fastest predicted first (`rate=` FLOP/s and `bandwidth=` bytes/s of
a rank), and why the others are illegal.
`show=tokens` prints a few training rows as the model sees them instead, with what is learned of them marked: in colour
on a terminal, in brackets ⟦ ⟧ elsewhere. The rows are read and kept as training would.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

# Started as a script, launch/ is on sys.path; the rooms are found from the repository root, from any working directory.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from conf.batch import Layout
from conf.errors import Problem, RequestError, did_you_mean
from conf.schema import Config
from launch.planner.model_shape import ModelShape
from launch.planner.schedule import Instruction
from launch.planner.search import ASSUMED, ShapeOf, search
from launch.runtime.console import plain_console
from launch.runtime.ds_config import ds_config
from launch.runtime.request import Request, read_request, run_command
from recipes import recipe_class

COMMAND = "launch/plan.py"
FORMATS = ("table", "json")
SHOWS = ("plan", "tokens")
OWN = {"world_size": "1", "format": "table", "search": "false", "rate": "", "bandwidth": "", "show": "plan"}


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\nGroups and keys are those of `python launch/train.py --help`.")
        return 0
    # Nothing is written: a run directory that holds a run is no obstacle.
    named = {word.partition("=")[0].lstrip("+") for word in argv}
    request = read_request([*argv, *([] if named & {"resume", "overwrite"} else ["overwrite=true"])], COMMAND, OWN)
    wanted = request.own["format"]
    for key, choices in (("format", FORMATS), ("search", ("false", "true")), ("show", SHOWS)):
        if request.own[key] not in choices:
            near = did_you_mean(request.own[key], choices) or choices[0]
            raise RequestError(Problem(key, request.own[key], f"one of {', '.join(choices)}", f"{key}={near}"))

    for key in ("rate", "bandwidth"):
        if request.own[key] and request.own["search"] == "false":
            rule = "is what layouts are compared by, and there is one"
            raise RequestError(Problem(key, request.own[key], rule, f"search=true {key}={request.own[key]}"))

    if request.own["show"] == "tokens":
        for key in ("search", "format"):
            if request.own[key] != OWN[key]:
                raise RequestError(Problem(key, request.own[key], "show=tokens shows rows, no plan", "show=plan"))
        return show_tokens(request)

    # Only now torch, for the model on the meta device; its advice about the model's configuration is not for here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from launch.planner.plan import make_plan
    from recipes.models.configuration import check_network
    from recipes.models.shape import model_shape

    cfg, layout, device = request.cfg, request.layout, request.device
    recipe = recipe_class(cfg.task)(cfg)

    def shape_of(run: Config) -> ModelShape:
        return model_shape(
            run.model, run.data, run.precision.name, run.parallel, recipe.hf_class(), recipe.row_shape,
            partial(check_network, cfg=run),
        )  # fmt: skip

    if request.own["search"] == "true":
        return show_layouts(request, wanted, shape_of)
    shape = shape_of(cfg)
    plan = make_plan(cfg, layout, shape, ds_config(cfg, layout, device), device, programs)
    if wanted == "json":
        print(json.dumps(plan, indent=2, ensure_ascii=False))
    else:
        from launch.planner.render import render

        render(plan, plain_console())
    return 0


def programs(layout: Layout, micro_batches: int) -> Sequence[Sequence[Instruction]]:
    """What the engine has each rank of a folded pipeline do; only then is it loaded."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says what it found, in the middle of the plan
    from launch.runtime.pipeline import programs

    return programs(layout, micro_batches)


def show_tokens(request: Request) -> int:
    """Print the first training rows, their tokens marked. Reads the data as training does."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from recipes.preview import SHOWN, rendered

    recipe = recipe_class(request.cfg.task)(request.cfg)
    recipe.prepare()
    rows = recipe.previews(SHOWN)
    if not rows:
        rule = f"the rows of this {request.cfg.task} have no tokens"
        raise RequestError(Problem("show", "tokens", rule, "show=plan"))
    if said := recipe.said():
        print(said + "\n")
    print(rendered(rows, colour=sys.stdout.isatty()))
    return 0


def show_layouts(request: Request, wanted: str, shape_of: ShapeOf) -> int:
    """Print all layouts of the request's world size."""
    from launch.planner.render import render_search

    cfg = request.cfg
    speeds = []
    for key, assumed in zip(("rate", "bandwidth"), ASSUMED[request.device], strict=True):
        try:
            speeds.append(float(request.own[key] or assumed))
            if not (0 < speeds[-1] < math.inf):
                raise ValueError
        except ValueError:
            rule = "a number per second, above 0"
            raise RequestError(Problem(key, request.own[key], rule, f"{key}={assumed:g}")) from None
    found = search(
        cfg, request.layout.world, request.environment.on(request.device), shape_of, programs, request.device, *speeds
    )
    if wanted == "json":
        print(json.dumps([asdict(candidate) for candidate in found], indent=2, ensure_ascii=False))
    else:
        render_search(found, speeds, plain_console())
    return 0


if __name__ == "__main__":
    run_command(main)
