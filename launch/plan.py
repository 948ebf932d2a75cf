"""Show what a run will be without starting it: `python launch/plan.py +recipe=NAME world_size=8 [format=json] …`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Started as a script, launch/ is on sys.path; the rooms are found from the repository root, from any working directory.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from conf.errors import Problem, RequestError, did_you_mean
from launch.runtime.ds_config import ds_config
from launch.runtime.request import read_request, run_command

COMMAND = "launch/plan.py"
FORMATS = ("table", "json")


def main(argv: list[str]) -> int:
    request = read_request(argv, COMMAND, {"world_size": "1", "format": "table"})
    wanted = request.own["format"]
    if wanted not in FORMATS:
        near = did_you_mean(wanted, FORMATS) or FORMATS[0]
        raise RequestError(Problem("format", wanted, f"one of {', '.join(FORMATS)}", f"format={near}"))

    # Only now torch, for the model on the meta device; its advice about the model's configuration is not for here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from launch.planner.plan import make_plan
    from recipes.models.shape import model_shape

    cfg, layout, device = request.cfg, request.layout, request.device
    shape = model_shape(cfg.model, cfg.data, cfg.precision.name)
    plan = make_plan(cfg, layout, shape, ds_config(cfg, layout, device), device)
    if wanted == "json":
        print(json.dumps(plan, indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        from launch.planner.render import render

        render(plan, Console(highlight=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    run_command(main)
