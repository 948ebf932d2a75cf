"""The engine's own kernels: compiled when they are first needed, by one process at a time."""

from __future__ import annotations

import os
from pathlib import Path

from conf.schema import Config

OFFLOADED = {
    "adamw": "CPUAdamBuilder", "adam": "CPUAdamBuilder", "muon": "CPUAdamBuilder", "lion": "CPULionBuilder",
    "adagrad": "CPUAdagradBuilder",
}  # fmt: skip
"""Optimizer → what builds the kernel of its offloaded step."""
ON_GPUS = {"lion": "FusedLionBuilder", "lamb": "FusedLambBuilder"}
"""Optimizer → what builds the kernel of its step on a GPU; the others are torch's."""


def build(name: str) -> None:
    """Compile a kernel, or find it compiled. name: of the engine's class that builds it.

    torch's own lock is a file that an interrupted build leaves behind, and then every later run waits for it without a
    word. Ours ends with its process; whoever holds it may take torch's away.
    """
    from deepspeed.accelerator import get_accelerator
    from filelock import FileLock
    from torch.utils import cpp_extension

    builder = get_accelerator().create_op_builder(name)
    if builder is None or not builder.is_compatible(verbose=False):
        return  # the engine says why, where it needs it
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "deepspeed_recipes.lock"):
        for stale in root.glob(f"**/{builder.name}/lock"):
            stale.unlink(missing_ok=True)
        builder.load(verbose=False)


def build_for(cfg: Config, device: str) -> None:
    """The kernels that a run needs: of a step that is offloaded, or that torch does not have, and of ZeRO++."""
    offloads = cfg.zero.offload_optimizer != "none"
    wanted = [(OFFLOADED if offloads else ON_GPUS if device == "cuda" else {}).get(cfg.optimizer.name.lower())]
    if device == "cuda" and (cfg.zero.quantized_weights or cfg.zero.quantized_gradients):
        wanted.append("QuantizerBuilder")
    for name in filter(None, wanted):
        build(name)
