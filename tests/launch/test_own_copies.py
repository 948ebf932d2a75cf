"""What a user has put into `checkpoints/` is neither pruned, nor taken for the run's own, nor overwritten with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from launch.checkpoints import main
from launch.runtime.checkpoint import FORMAT, all_of, newest, unfinished
from launch.runtime.run_dir import DiskError, RunDir
from launch.runtime.saving import Saving
from recipes import durable
from recipes.checksums import seal


def checkpoint(folder: Path, step: int) -> Path:
    """One that is whole, of no tensors."""
    entry = folder / f"step_{step:08d}"
    entry.mkdir(parents=True)
    manifest = {"format": FORMAT, "step": step, "files": {}, "tensors": {}, "layout": {}, "config": {}}
    (entry / "manifest.json").write_text(json.dumps(seal(manifest)))
    return entry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints of a run, and what people leave beside them."""
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        checkpoint(folder, step)
    for name in ("step_00000010-good", "step_00000010 (copy)", "step_10", "step_best", "best", "step_00000099"):
        shutil.copytree(folder / "step_00000010", folder / name)
    (folder / "step_00000077").symlink_to(folder / "step_00000010", target_is_directory=True)
    (folder / ".step_mine.tmp").mkdir()
    (folder / ".step_mine.old").mkdir()
    (folder / "step_notes.txt").write_text("the loss of the second one looks odd")
    return folder


def left(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def saving(folder: Path, keep: int) -> Saving:
    cfg: Config = compose(["+recipe=quickstart"], 1)
    return Saving(folder, keep, 0, {"eval": {"metric": cfg.eval.metric}}, "data")


def test_they_are_not_pruned(folder: Path) -> None:
    before = left(folder)
    saving(folder, 1)._prune(folder / "step_00000030")
    assert before - left(folder) == {"step_00000010", "step_00000020"}


def test_a_future_that_was_given_up_is(folder: Path) -> None:
    before = left(folder)
    saving(folder, 1)._prune(folder / "step_00000020")
    assert before - left(folder) == {"step_00000010", "step_00000030"}


def test_they_are_not_swept(folder: Path) -> None:
    (folder / ".step_00000040.tmp").mkdir()
    before = left(folder)
    saving(folder, 1).sweep()
    assert before - left(folder) == {".step_00000040.tmp"}


def test_they_are_not_resumed_unasked(folder: Path) -> None:
    assert [entry.name for entry, _ in all_of(folder)] == ["step_00000030", "step_00000020", "step_00000010"]
    found = newest(folder)
    assert found is not None and found.step == 30
    assert not unfinished(folder)


def test_overwrite_leaves_them(folder: Path) -> None:
    (folder / ".step_00000040.tmp").mkdir()
    before = left(folder)
    RunDir(folder.parent).clear()
    assert before - left(folder) == {"step_00000010", "step_00000020", "step_00000030", ".step_00000040.tmp"}
    for entry in folder.iterdir():
        entry.unlink() if entry.is_file() or entry.is_symlink() else shutil.rmtree(entry)
    checkpoint(folder, 10)
    RunDir(folder.parent).clear()
    assert not folder.exists()


def test_what_cannot_be_deleted_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By who was asked to delete it; and a run does not begin among the checkpoints of another one."""
    monkeypatch.setattr(durable.shutil, "rmtree", lambda *arguments, **options: None)
    layout = dict.fromkeys(("data", "tensor", "pipeline", "sequence"), 1)
    for entry in folder.glob("step_000000?0"):
        manifest = {"format": FORMAT, "step": int(entry.name[5:]), "files": {}, "tensors": {}, "config": {}}
        manifest |= {"layout": layout, "zero": 0, "written": "2026"}
        (entry / "manifest.json").write_text(json.dumps(seal(manifest)))
    assert main([str(folder.parent), "keep=2"]) == 1
    assert f"cannot be deleted: {folder / '.step_00000010.tmp'}" in capsys.readouterr().out
    with pytest.raises(DiskError, match="is of an earlier run, and cannot be deleted"):
        RunDir(folder.parent).clear()
