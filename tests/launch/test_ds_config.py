"""The engine's configuration: pure, explicit, and accepted by the installed engine for every legal choice."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.batch import Layout
from conf.rules_optimizer import OPTIMIZERS, WITH_CPU_KERNEL, accumulation_dtypes
from conf.schema import BatchConfig, Config, OptimizerConfig, PrecisionConfig, ZeroConfig
from launch.runtime.ds_config import ds_config, merged

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("fp32", "bf16", "fp16", "bf16_autocast")
VALUES: dict[str, Any] = {"betas": [0.9, 0.95], "eps": 1e-8, "momentum": 0.9, "fused": True}


def config(stage: int = 1, precision: str = "fp32", name: str = "adamw", offload: str = "none", **zero: Any) -> Config:
    """A request as the rules leave it: fields that an optimizer does not take are null."""
    fields = {field: VALUES[field] for field in OPTIMIZERS[name] if field != "fused" or offload == "none"}
    return Config(
        batch=BatchConfig(global_size=12, micro_size=2, accumulation=3),
        optimizer=OptimizerConfig(name=name, **fields),
        precision=PrecisionConfig(name=precision, accumulation_dtype=accumulation_dtypes(stage, precision)[0]),
        zero=ZeroConfig(stage=stage, offload_optimizer=offload, **zero),
    )


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


EVERY = [
    *((stage, precision, "adamw", "none") for stage in range(4) for precision in PRECISIONS),
    *((stage, "bf16", name, "none") for stage, name in itertools.product(range(4), OPTIMIZERS)),
    *((stage, "bf16", name, "cpu") for stage, name in itertools.product((1, 2, 3), WITH_CPU_KERNEL)),
    (3, "bf16", "adamw", "nvme"),
]


@pytest.mark.parametrize("stage,precision,name,offload", EVERY)
def test_the_engine_accepts_every_choice(
    stage: int, precision: str, name: str, offload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
    from torch import optim

    nvme = {"offload_param": "nvme", "nvme_path": str(tmp_path)} if offload == "nvme" else {}
    made = ds_config(config(stage, precision, name, offload, **nvme), Layout(world=1, data=1), "cpu")
    read = DeepSpeedConfig(made)
    assert read.train_batch_size == 6
    assert read.zero_optimization_stage == stage
    assert not read.timers_config.enabled, "it waits for the device twice in each micro-batch"
    assert (read.float16_config.enabled, read.bfloat16_config.enabled) == (precision == "fp16", precision == "bf16")
    assert read.torch_autocast_enabled == (precision == "bf16_autocast")
    assert read.optimizer_name in DEEPSPEED_OPTIMIZERS or hasattr(optim, read.optimizer_name)
    assert all(leaf is None or type(leaf) in (bool, int, float, str) for leaf in leaves(made))
    assert "auto" not in leaves(made)
    device = read.zero_config.offload_optimizer.device if stage else "none"
    assert device == offload


def test_all_keys_exist_in_the_engine() -> None:
    """The engine ignores unknown keys in silence; pydantic's field names and aliases know better."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def unknown(block: dict[str, Any], model: Any) -> set[str]:
        names = {name for key, field in model.model_fields.items() for name in (key, field.alias)}
        return set(block) - names

    for stage in range(4):
        extra = {"offload_param": "nvme", "nvme_path": "/x"} if stage == 3 else {}
        made = ds_config(config(stage, offload="nvme" if stage == 3 else "none", **extra), Layout(1, 1), "cuda")
        zero = made["zero_optimization"]
        assert not unknown(zero, DeepSpeedZeroConfig)
        assert not unknown(zero.get("offload_optimizer", {}), DeepSpeedZeroOffloadOptimizerConfig)
        assert not unknown(zero.get("offload_param", {}), DeepSpeedZeroOffloadParamConfig)
        assert not unknown(made["fp16"], DeepSpeedFP16Config)
        assert not unknown(made["bf16"], DeepSpeedBF16Config)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_legal_accumulation_dtypes_are_those_of_the_engine(stage: int, precision: str) -> None:
    """0.19.8 raises NotImplementedError at stage 0 for any dtype but the parameters' own."""
    import deepspeed
    import torch

    engine = object.__new__(deepspeed.runtime.engine.DeepSpeedEngine)
    torch.nn.Module.__init__(engine)
    engine.global_rank, engine.pipeline_parallelism = 1, False
    for asked in ("fp32", precision):
        cfg = config(stage, precision)
        cfg.precision.accumulation_dtype = asked
        engine._config = deepspeed.runtime.config.DeepSpeedConfig(ds_config(cfg, Layout(1, 1), "cpu"))
        legal = asked in accumulation_dtypes(stage, precision)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("deepspeed.runtime.engine.is_zero_supported_optimizer", lambda _: True)
            if legal:
                engine._do_optimizer_sanity_check(optimizer)
            else:
                with pytest.raises(NotImplementedError, match="unsupported mix"):
                    engine._do_optimizer_sanity_check(optimizer)


def test_clipping_off_is_written_down() -> None:
    cfg = config()
    cfg.optimizer.gradient_clipping = 0
    assert ds_config(cfg, Layout(1, 1), "cpu")["gradient_clipping"] == 0.0


def test_the_global_batch_counts_data_ranks() -> None:
    made = ds_config(config(), Layout(world=2, data=2), "cpu")
    assert made["train_batch_size"] == 12
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 3


def test_adam_is_not_adamw() -> None:
    """The engine makes AdamW of `adam` unless it is told otherwise."""
    assert ds_config(config(name="adam"), Layout(1, 1), "cpu")["optimizer"]["params"]["adam_w_mode"] is False
    assert ds_config(config(name="adamw"), Layout(1, 1), "cpu")["optimizer"]["params"]["adam_w_mode"] is True


def test_torch_adam_unless_offloaded() -> None:
    here = ds_config(config(2), Layout(1, 1), "cpu")
    away = ds_config(config(2, offload="cpu"), Layout(1, 1), "cpu")
    assert here["optimizer"]["params"]["torch_adam"] is True and here["optimizer"]["params"]["fused"] is True
    assert away["optimizer"]["params"]["torch_adam"] is False and "fused" not in away["optimizer"]["params"]
    assert (here["zero_force_ds_cpu_optimizer"], away["zero_force_ds_cpu_optimizer"]) == (False, True)


def test_pages_are_pinned_for_cuda_only() -> None:
    cfg = config(3, offload="cpu", offload_param="cpu")
    for device, pinned in (("cpu", False), ("cuda", True)):
        zero = ds_config(cfg, Layout(1, 1), device)["zero_optimization"]
        assert zero["offload_optimizer"]["pin_memory"] is zero["offload_param"]["pin_memory"] is pinned


def test_muon_reduces_without_scatter_at_stage_3_only() -> None:
    scatter = {
        stage: ds_config(config(stage, name="muon"), Layout(1, 1), "cpu")["zero_optimization"]["reduce_scatter"]
        for stage in (1, 2, 3)
    }
    assert scatter == {1: True, 2: True, 3: False}


def test_gradients_are_reduced_in_the_dtype_they_accumulate_in() -> None:
    made = ds_config(config(2, "bf16"), Layout(1, 1), "cuda")
    assert made["communication_data_type"] == made["data_types"]["grad_accum_dtype"] == "fp32"


def test_raw_engine_keys_win_and_nothing_is_shared() -> None:
    cfg = config(2)
    cfg.deepspeed = {"zero_optimization": {"round_robin_gradients": True}, "communication_data_type": "bf16"}
    made = ds_config(cfg, Layout(1, 1), "cpu")
    assert made["zero_optimization"]["round_robin_gradients"] is True
    assert made["zero_optimization"]["stage"] == 2
    assert made["communication_data_type"] == "bf16"
    made["zero_optimization"]["round_robin_gradients"] = False
    made["optimizer"]["params"]["betas"].append(0.0)
    assert cfg.deepspeed["zero_optimization"]["round_robin_gradients"] is True
    assert ds_config(cfg, Layout(1, 1), "cpu")["optimizer"]["params"]["betas"] == [0.9, 0.95]


def test_merging_replaces_what_is_not_a_mapping_on_both_sides() -> None:
    assert merged({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": {"e": 3}}) == {
        "a": {"b": 1, "c": [2]},
        "d": {"e": 3},
    }


def test_the_home_folder_is_resolved() -> None:
    cfg = config(3, offload="nvme", nvme_path="~/swap")
    path = ds_config(cfg, Layout(1, 1), "cpu")["zero_optimization"]["offload_optimizer"]["nvme_path"]
    assert path == str(Path.home() / "swap")


def test_needs_no_torch() -> None:
    code = "import sys, launch.runtime.ds_config; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
