"""Rules on ZeRO, offload and ZeRO++ (DeepSpeed 0.19.8: runtime/zero)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from conf.batch import Layout
from conf.environment import Environment
from conf.errors import Problem
from conf.rules_optimizer import OPTIMIZERS, WITH_CPU_KERNEL
from conf.rules_values import changed, shown
from conf.schema import Config

STAGES_OF = {
    "overlap_comm": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "prefetch_bucket_size": (3,),
    "param_persistence_threshold": (3,),
    "hpz_partition_size": (3,),
    "quantized_weights": (3,),
    "quantized_gradients": (3,),
}
"""Fields that only these stages read."""
PLUS = ("hpz_partition_size", "quantized_weights", "quantized_gradients")


def stage_fields(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A field of another stage would have no effect."""
    for field, stages in STAGES_OF.items():
        if changed(cfg.zero, field) and cfg.zero.stage not in stages:
            which = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
            rule = f"is read by ZeRO {which} only, this is stage {cfg.zero.stage}"
            nearest = "zero=stage3_plus" if field in PLUS else f"zero=stage{stages[-1]}"
            yield Problem(f"zero.{field}", shown(getattr(cfg.zero, field)), rule, nearest)


def offload_stage(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Offload needs a stage that shards what is offloaded."""
    zero = cfg.zero
    if zero.offload_optimizer == "cpu" and zero.stage < 1:
        rule = "optimizer offload needs ZeRO stage 1, 2 or 3"
        yield Problem("zero.offload_optimizer", "cpu", rule, "zero=stage2_offload")
    if zero.offload_optimizer == "nvme" and zero.stage != 3:
        yield Problem("zero.offload_optimizer", "nvme", "NVMe offload needs ZeRO stage 3", "zero=stage3_nvme")
    if zero.offload_param != "none" and zero.stage != 3:
        nearest = "zero=stage3_nvme" if zero.offload_param == "nvme" else "zero=stage3_offload"
        rule = "parameter offload needs ZeRO stage 3 (the engine ignores it in silence below)"
        yield Problem("zero.offload_param", zero.offload_param, rule, nearest)


def offload_optimizer(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """The offloaded step runs on the CPU: only optimizers with such a kernel, and a toolchain to compile it."""
    if cfg.zero.offload_optimizer not in ("cpu", "nvme"):
        return
    name = cfg.optimizer.name.lower()
    if name in OPTIMIZERS and name not in WITH_CPU_KERNEL:
        rule = f"an offloaded step needs an optimizer with a CPU kernel: {', '.join(WITH_CPU_KERNEL)}"
        yield Problem("optimizer.name", name, rule, "optimizer=adamw, or zero.offload_optimizer=none")
    kernel = f"cpu_{name}" if name in ("adagrad", "lion") else "cpu_adam"
    missing = env.missing_toolchain()
    if missing and kernel not in env.prebuilt:
        rule = f"the engine compiles its kernel for the offloaded step, and here is no {', no '.join(missing)}"
        nearest = f"install it, or zero=stage{cfg.zero.stage}"
        yield Problem("zero.offload_optimizer", cfg.zero.offload_optimizer, rule, nearest)


def nvme(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """NVMe offload has a writable folder and libaio; without NVMe offload there is no path."""
    zero = cfg.zero
    if "nvme" not in (zero.offload_optimizer, zero.offload_param):
        if zero.nvme_path is not None:
            yield Problem("zero.nvme_path", zero.nvme_path, "nothing is offloaded to NVMe", "zero=stage3_nvme")
        return
    if zero.nvme_path is None:
        rule = "NVMe offload needs a folder on a fast local disk"
        yield Problem("zero.nvme_path", "null", rule, "zero.nvme_path=FOLDER")
    else:
        path = Path(zero.nvme_path).expanduser()
        if not path.is_dir():
            parent = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
            yield Problem("zero.nvme_path", zero.nvme_path, "there is no such folder", f"zero.nvme_path={parent}")
        elif not os.access(path, os.W_OK | os.X_OK):
            yield Problem("zero.nvme_path", zero.nvme_path, "this folder cannot be written", "zero.nvme_path=FOLDER")
    if not env.libaio and "async_io" not in env.prebuilt:
        which = "offload_optimizer" if zero.offload_optimizer == "nvme" else "offload_param"
        rule = "NVMe offload needs libaio with its header (Debian, Ubuntu: apt install libaio-dev)"
        yield Problem(f"zero.{which}", "nvme", rule, "install it, or zero=stage3_offload")


def zero_plus(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """ZeRO++ is CUDA kernels; its secondary shards divide the world."""
    used = [field for field in PLUS if changed(cfg.zero, field)]
    if used and env.device != "cuda":
        value = shown(getattr(cfg.zero, used[0]))
        yield Problem(f"zero.{used[0]}", value, "ZeRO++ runs on CUDA only", f"zero=stage{cfg.zero.stage}")
    quantised = [field for field in used if field.startswith("quantized")]
    missing = env.missing_cuda_toolchain() if env.device == "cuda" and "quantizer" not in env.prebuilt else []
    if quantised and missing:
        rule = f"the engine compiles its kernels that quantise, and here is no {', no '.join(missing)}"
        yield Problem(f"zero.{quantised[0]}", "true", rule, f"install it, or zero=stage{cfg.zero.stage}")
    if cfg.zero.quantized_gradients and layout.world > env.device_count and layout.world % env.device_count:
        rule = (
            f"ZeRO++ exchanges gradients within machines of {env.device_count} GPUs, of which each must have all ranks"
        )
        nearest = f"{layout.world // env.device_count * env.device_count} ranks, or zero.quantized_gradients=false"
        yield Problem("zero.quantized_gradients", "true", rule, nearest)
    size = cfg.zero.hpz_partition_size
    if size > 1 and layout.world % size:
        fitting = max(d for d in range(1, size) if layout.world % d == 0)
        rule = f"secondary shards must divide the {layout.world} ranks"
        yield Problem("zero.hpz_partition_size", str(size), rule, f"zero.hpz_partition_size={fitting}")


RULES = (
    stage_fields,
    offload_stage,
    offload_optimizer,
    nvme,
    zero_plus,
)
