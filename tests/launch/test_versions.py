"""A run of an earlier version, and the same rows in another place, are resumed."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from conf.compose import compose
from conf.errors import RequestError
from conf.schema import Config
from launch.runtime import resume
from launch.runtime.checkpoint import FORMAT, Checkpoint

WORDS = ("+recipe=quickstart", "data=jsonl", "data.path=rows.jsonl")


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    return compose(WORDS, 1)


def saved(cfg: Config, data: str = "rows-1") -> Checkpoint:
    config = json.loads(json.dumps(asdict(cfg)))
    manifest: dict[str, Any] = {"format": FORMAT, "step": 3, "files": {}, "tensors": {}, "layout": {}}
    return Checkpoint(Path("step_00000003"), {**manifest, "config": config, "data": data})


def test_a_key_that_an_earlier_version_did_not_have(cfg: Config) -> None:
    """It did then what the key's default does now."""
    found = saved(cfg)
    for section, name in (
        ("data", "stride"),
        ("model", "dropout"),
        ("optimizer", "weight_decay"),
        ("eval", "patience"),
    ):
        del found.manifest["config"][section][name]
    del found.manifest["config"]["faults"]
    expected = [] if cfg.optimizer.weight_decay == Config().optimizer.weight_decay else ["optimizer.weight_decay"]
    assert [line.partition(":")[0] for line in resume.check(found, cfg, "rows-1")] == expected
    cfg.data.stride = 7
    with pytest.raises(RequestError, match=r"data\.stride=7: the run that is resumed had 64"):
        resume.check(found, cfg, "rows-1")


def test_a_key_that_this_version_does_not_have(cfg: Config) -> None:
    found = saved(cfg)
    found.manifest["config"]["data"]["magic"] = 3
    found.manifest["config"]["zero"]["eager"] = True
    told = resume.check(found, cfg, "rows-1")
    assert told == [
        "data.magic: 3 -> this version has no such key", "zero.eager: true -> this version has no such key"
    ]  # fmt: skip
    said: list[str] = []
    assert resume.config_of(found, said.append) == cfg
    assert said == ["data.magic: 3: this version has no such key", "zero.eager: true: this version has no such key"]


def test_free_keys_are_kept(cfg: Config) -> None:
    """What a model's class takes is not this version's to know."""
    cfg.model.config["anything"] = {"at": [1, 2]}
    found = saved(cfg)
    assert resume.check(found, cfg, "rows-1") == []
    assert resume.config_of(found, pytest.fail) == cfg
    del found.manifest["config"]["model"]["config"]["anything"]
    with pytest.raises(RequestError, match=r"model\.config\.anything"):
        resume.check(found, cfg, "rows-1")


def test_rows_that_were_moved(cfg: Config) -> None:
    """The content decides; the path is only told."""
    found, other = saved(cfg), copy.deepcopy(cfg)
    other.data.path, other.data.eval_path = "elsewhere.jsonl", "held_out.jsonl"
    told = resume.check(found, other, "rows-1")
    assert [line.partition(":")[0] for line in told] == ["data.path", "data.eval_path"]
    with pytest.raises(RequestError, match="the rows are not those"):
        resume.check(found, other, "rows-2")
    other.data.kind = "text"
    with pytest.raises(RequestError, match=r"data\.kind"):
        resume.check(found, other, "rows-1")


def test_a_mixture_that_was_moved(cfg: Config) -> None:
    source = {"kind": "jsonl", "path": "a.jsonl", "weight": 2.0}
    found = saved(cfg)
    found.manifest["config"]["data"]["mixture"] = [source, {"kind": "stdlib"}]
    words = [*WORDS[:1], "data=mixture", "data.mixture=[{kind: jsonl, path: b.jsonl, weight: 2}, {kind: stdlib}]"]
    Path("b.jsonl").write_text(Path("rows.jsonl").read_text())
    now = compose(words, 1)
    for name in ("kind", "path"):
        found.manifest["config"]["data"][name] = getattr(now.data, name)
    assert [line.partition(":")[0] for line in resume.check(found, now, "rows-1")] == ["data.mixture"]
    source["weight"] = 3.0
    with pytest.raises(RequestError, match=r"data\.mixture"):
        resume.check(found, now, "rows-1")


def test_a_checkpoint_that_does_not_say_its_rows(cfg: Config) -> None:
    told = resume.check(saved(cfg, "0123456789abcdef"), cfg, "rows-1")
    assert len(told) == 1 and "does not say which rows" in told[0]
