"""Checkpoints through the real commands: what is carried on, what is refused, what is passed over."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, SMALL, TRAIN, environment, launcher, rows, run
from omegaconf import OmegaConf
from safetensors.numpy import load_file

from conf.errors import RequestError
from conf.schema import Config
from launch.runtime import resume
from launch.runtime.state import SavedState
from launch.runtime.tensor_file import digest_of
from recipes.checksums import SEAL, seal

CHECKPOINTS = ROOT / "launch" / "checkpoints.py"
RUN = "runs/quickstart"
pytestmark = pytest.mark.slow
SAVING = (*SMALL, "train.steps=8", "checkpoint.every=2", "checkpoint.keep=3", "eval.every=3")
SAME = ("loss", "lr", "grad_norm", "tokens", "samples")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def unbroken(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of eight steps on two ranks, and checkpoints of steps 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run([*launcher("deepspeed", 2), TRAIN, *SAVING], folder, environment(cache))
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(entry.name for entry in (folder / RUN / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000006", "step_00000008"]
    return folder


@pytest.fixture
def broken(unbroken: Path, tmp_path: Path) -> Path:
    """The same, as if it had been killed behind step 6: later rows are there, the checkpoint of step 8 is not."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / RUN / "checkpoints/step_00000008")
    shutil.rmtree(tmp_path / RUN / "model")
    (tmp_path / RUN / "summary.json").unlink()
    with (tmp_path / RUN / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    return tmp_path


def same_rows(left: Path, right: Path) -> None:
    for mine, theirs in zip(rows(left / RUN), rows(right / RUN), strict=True):
        assert [row["step"] for row in mine] == [row["step"] for row in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert [one.get(key) for key in SAME] == [other.get(key) for key in SAME]


def same_model(left: Path, right: Path) -> None:
    mine, theirs = (load_file(folder / RUN / "model/model.safetensors") for folder in (left, right))
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_a_killed_run_ends_as_the_unbroken_one(broken: Path, unbroken: Path, cache: Path) -> None:
    done = run([*launcher("torchrun", 2), TRAIN, *SAVING, "resume=auto"], broken, environment(cache))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumes after step 6" in done.stdout
    same_rows(broken, unbroken)
    same_model(broken, unbroken)


def test_on_one_rank_in_another_stage(broken: Path, unbroken: Path, cache: Path) -> None:
    """From two ranks with ZeRO-1 to one with ZeRO-2 and accumulation: the order of the data continues."""
    more = ["zero=stage2", "resume=auto"]
    done = run([sys.executable, TRAIN, *SAVING, *more], broken, environment(cache))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "zero.stage: 1 -> 2" in done.stdout
    (mine, _), (theirs, _) = rows(broken / RUN), rows(unbroken / RUN)
    assert [row["loss"] for row in mine[:6]] == [row["loss"] for row in theirs[:6]]
    np.testing.assert_allclose([row["loss"] for row in mine[6:]], [row["loss"] for row in theirs[6:]], rtol=1e-5)
    assert [row["tokens"] for row in mine] == [row["tokens"] for row in theirs]


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "missing", "manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(damage: str, broken: Path) -> None:
    newest = broken / RUN / "checkpoints/step_00000006"
    older = newest.with_name("step_00000004")
    file = newest / ("manifest.json" if damage == "manifest" else "rank_00001.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    file.write_bytes(content[: {"short": -1, "empty": 0, "manifest": 100}.get(damage, len(content))])
    if damage == "missing":
        file.unlink()
    said: list[str] = []
    found = resume.find(Config(resume="auto"), broken / RUN, said.append)
    assert found is not None and found.folder == older and str(file) in said[0]
    with pytest.raises(RequestError) as refused:
        resume.find(Config(resume=str(newest)), broken / RUN, said.append)
    assert str(file) in refused.value.render()
    assert damage == "manifest" or f"resume={older}" in refused.value.render()


def test_a_damaged_checkpoint_through_the_commands(broken: Path, unbroken: Path, cache: Path) -> None:
    file = broken / RUN / "checkpoints/step_00000006/rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    listed = run([sys.executable, CHECKPOINTS, broken / RUN, "verify=true"], broken, environment(cache))
    assert listed.returncode == 1 and str(file) in listed.stdout
    done = run([*launcher("torchrun", 2), TRAIN, *SAVING, "resume=auto"], broken, environment(cache))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed over" in done.stdout and "resumes after step 4" in done.stdout
    same_model(broken, unbroken)


def test_what_makes_another_run_is_refused_and_the_rest_is_told(broken: Path) -> None:
    found = resume.find(Config(resume="auto"), broken / RUN, lambda text: None)
    assert found is not None
    saved, rows_of = found.manifest["config"], found.manifest["data"]
    for section, name, value in (("model", "type", "gpt2"), ("data", "max_files", 3), ("batch", "global_size", 16)):
        other = copy.deepcopy(found)
        other.manifest["config"] = json.loads(json.dumps(saved))
        other.manifest["config"][section][name] = value
        with pytest.raises(RequestError) as refused:
            resume.check(other, config_of(saved), rows_of)
        assert f"{section}.{name}" in refused.value.render()
    with pytest.raises(RequestError, match="rows"):
        resume.check(found, config_of(saved), "other rows")
    faster = config_of(saved)
    faster.optimizer.lr *= 2
    assert [line.partition(":")[0] for line in resume.check(found, faster, rows_of)] == ["optimizer.lr"]


def config_of(saved: dict) -> Config:
    """The configuration in a manifest, as an object."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))


def test_another_run_is_refused(broken: Path, cache: Path) -> None:
    refused = run([sys.executable, TRAIN, *SAVING, "resume=auto", "seed=7"], broken, environment(cache))
    assert refused.returncode == 2 and "error: seed=7" in refused.stderr, refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr


def test_auto_does_not_start_anew_where_all_checkpoints_are_damaged(broken: Path) -> None:
    for folder in (broken / RUN / "checkpoints").iterdir():
        (folder / "rank_00000.safetensors").unlink()
    with pytest.raises(RequestError, match="every checkpoint of this run is damaged"):
        resume.find(Config(resume="auto"), broken / RUN, lambda text: None)


def test_a_future_that_was_given_up_is_not_resumed(broken: Path, unbroken: Path, cache: Path) -> None:
    """Behind a resume from step 4 with another rate, the checkpoint of the old step 6 is gone."""
    more = [f"resume={broken / RUN / 'checkpoints/step_00000004'}", "optimizer.lr=1e-5", "checkpoint.every=5"]
    done = run([sys.executable, TRAIN, *SAVING, *more], broken, environment(cache))
    assert done.returncode == 0, done.stderr
    names = sorted(entry.name for entry in (broken / RUN / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000005", "step_00000008"]


def test_auto_without_a_checkpoint_says_that_it_starts(cache: Path, tmp_path: Path) -> None:
    done = run([sys.executable, TRAIN, *SMALL, "resume=auto"], tmp_path, environment(cache))
    assert done.returncode == 0, done.stderr
    assert "resume=auto: no whole checkpoint" in done.stdout and "starts at step 0" in done.stdout


def test_a_pickle_is_never_opened(broken: Path) -> None:
    """A file with code in it, with a manifest that calls it whole, is refused; the code does not run."""
    trap = broken / "sprung"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    folder = broken / RUN / "checkpoints/step_00000006"
    file, manifest = folder / "rank_00000.safetensors", json.loads((folder / "manifest.json").read_text())
    file.write_bytes(pickle.dumps(Trap()))
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": digest_of(file)}
    manifest.pop(SEAL)
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    found = resume.find(Config(resume=str(folder)), broken / RUN, lambda text: None)
    assert found is not None
    with pytest.raises(RequestError) as refused:
        SavedState(found.files, manifest["tensors"], 1)
    assert str(file) in refused.value.render() and not trap.exists()


def test_the_command_lists_and_deletes(broken: Path, cache: Path) -> None:
    (broken / RUN / "checkpoints/.step_00000007.tmp").mkdir()
    command = [sys.executable, CHECKPOINTS, broken / RUN]
    listed = run(command, broken, environment(cache))
    assert listed.returncode == 0 and listed.stdout.splitlines()[0].startswith("step_00000006")
    assert "2 data × 1 tensor × 1 pipeline × 1 sequence, ZeRO-1" in listed.stdout and "not finished" in listed.stdout
    pruned = run([*command, "keep=1"], broken, environment(cache))
    assert pruned.returncode == 0 and "step_00000004" in pruned.stdout
    assert [entry.name for entry in (broken / RUN / "checkpoints").iterdir()] == ["step_00000006"]
    for wrong in (["keep=0"], ["verify=maybe"], ["keeep=1"], [str(broken)]):
        refused = run([*command, *wrong], broken, environment(cache))
        assert refused.returncode == 2 and "error:" in refused.stderr


def test_the_model_of_a_checkpoint(unbroken: Path, cache: Path, tmp_path: Path) -> None:
    """That of the last step is the one that training exported; earlier ones are there, others are not."""
    command = [sys.executable, CHECKPOINTS, unbroken / RUN]
    done = run([*command, f"export={tmp_path / 'model'}"], unbroken, environment(cache))
    assert done.returncode == 0 and "model after step 8" in done.stdout, done.stdout + done.stderr
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_text() == (unbroken / RUN / "model" / name).read_text()
    mine, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "model", unbroken / RUN / "model")
    )
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
    refused = run([*command, f"export={tmp_path / 'other'}", "step=5"], unbroken, environment(cache))
    assert refused.returncode == 2 and "step=8" in refused.stderr and not (tmp_path / "other").exists()
