"""Every kind of recipe goes on as if it had not been stopped: rows of metrics, predictions, weights, optimizer."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_task_layouts import MODELS, PRETRAINED, Case, configuration, write_model, write_rows

from conf.schema import OptimizerConfig
from recipes import recipe_class

pytestmark = pytest.mark.slow
STEPS, STOP = 20, 10
CASES = [Case(rows, model, 1, data=2) for rows, models in MODELS.items() for model in models]
WITH_DROPOUT = ("bert", "modernbert", "bart", "t5", "marian", "llama", "vit", PRETRAINED)
TIMES = ("eval_s", "step_s", "tokens_per_s", "peak_memory_bytes")


def one_run(rank: int, case: Case, folder: Path, resumed: bool) -> dict[str, Any]:
    """Rows, predictions and state at the end of a whole run that saves in its middle, or of what follows from there."""
    from launch.runtime import loop
    from launch.runtime.checkpoint import newest
    from launch.runtime.ds_config import ds_config
    from launch.runtime.saving import Saving
    from launch.runtime.session import restored
    from launch.runtime.staged import make_engine
    from launch.runtime.state import own_tensors

    cfg, layout = configuration(case, folder)
    cfg.optimizer = OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.1)
    cfg.scheduler.name, cfg.scheduler.warmup_steps, cfg.eval.every = "cosine", 3, 5
    cfg.model.dropout = 0.1 if case.model in WITH_DROPOUT else None
    recipe = recipe_class(case.task)(cfg)
    recipe.prepare()
    engine = make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), torch.device("cpu"), STEPS)
    saving = Saving(folder / str(case), 2, 0, asdict(cfg), "rows")
    progress = loop.Progress()
    if resumed:
        checkpoint = newest(folder / str(case))
        assert checkpoint is not None
        progress = restored(engine, checkpoint, layout)
    rows: list[loop.Row] = []
    predictions: list[Any] = []

    def after_step(now: loop.Progress, last: bool) -> bool:
        if not resumed and now.step == STOP:
            saving.begin(engine, now.step, asdict(now))
        return True

    def keep(evaluation: Any) -> None:
        predictions[:] = evaluation.predictions

    loop.run(engine, recipe, cfg, layout, rank, STEPS, rows.append, keep, progress, after_step)
    assert saving.finish()
    state = {name: value.clone().numpy() for name, value in own_tensors(engine).items()}
    engine.ds.destroy()
    shown = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return {"rows": shown, "predictions": [str(row) for row in predictions], "state": state}


def whole_and_resumed(rank: int, world: int, cases: list[Case], folder: Path) -> list[list[dict[str, Any]]]:
    return [[one_run(rank, case, folder, resumed) for resumed in (False, True)] for case in cases]


def test_every_kind_of_recipe_goes_on_bit_for_bit() -> None:
    folder = Path(tempfile.mkdtemp())
    write_rows(folder)
    write_model(folder / "bert")
    for rank in run_ranks(2, whole_and_resumed, CASES, folder, timeout_s=600):
        for case, (whole, resumed) in zip(CASES, rank, strict=True):
            assert resumed["rows"] == [row for row in whole["rows"] if row["step"] > STOP], case
            assert resumed["predictions"] == whole["predictions"], case
            assert resumed["state"].keys() == whole["state"].keys()
            assert all((resumed["state"][name] == value).all() for name, value in whole["state"].items()), case
