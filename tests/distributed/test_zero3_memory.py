"""Under ZeRO-3 no rank ever holds the whole model, neither from scratch nor from pretrained weights."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import TinyCausalLM, plain_model, tiny_config

from conf.batch import Layout

WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "vocab_size": 2048,
}
WORLD = 4
pytestmark = pytest.mark.slow


def _recipe(folder: Path | None) -> TinyCausalLM:
    cfg = tiny_config(2, 1, WORLD, **WIDE)
    cfg.zero.stage = 3
    recipe = TinyCausalLM(cfg)
    recipe.prepare()
    recipe._folder = folder
    return recipe


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell the resident set")


def build_peak(rank: int, world: int, folder: Path | None) -> tuple[float, dict]:
    """(peak of memory while building, as a share of the whole model; the values of a few parameters)."""
    import deepspeed

    from launch.runtime.build import build
    from launch.runtime.ds_config import ds_config
    from launch.runtime.topology import topology

    recipe = _recipe(folder)
    layout = Layout.of(world, recipe.cfg.parallel)
    before = peak = _anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    engine_config, cpu = ds_config(recipe.cfg, layout, "cpu"), torch.device("cpu")
    model = build(recipe, recipe.cfg, engine_config, cpu, topology(layout, rank))[0].model
    done.set()
    watcher.join()
    whole = sum(p.ds_numel for p in model.parameters()) * 4
    some = {}
    for name, parameter in model.named_parameters():
        if "embed" in name or "layers.7." in name:
            with deepspeed.zero.GatheredParameters([parameter]):
                some[name] = parameter.detach().numpy().copy()
    return (peak - before) / whole, some


@pytest.mark.parametrize("pretrained", [False, True])
def test_no_rank_holds_the_whole_model(pretrained: bool, tmp_path: Path) -> None:
    recipe = _recipe(None)
    whole = plain_model(recipe)
    if pretrained:
        whole.save_pretrained(tmp_path / "m")
    values = dict(whole.named_parameters())
    for share, some in run_ranks(WORLD, build_peak, tmp_path / "m" if pretrained else None):
        # A quarter to keep, one block or tensor at hand, and what loading itself needs.
        assert share < 0.6, f"a rank held {share:.0%} of the model"
        assert len(some) > 5
        for name, value in some.items():
            assert (value == values[name].detach().numpy()).all(), name
