"""The engine interface of the loop: one optimizer step, one evaluation, whatever the layout behind it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import deepspeed
import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel

from conf.batch import Layout
from conf.schema import Config
from launch.runtime.allocator import memory_goes_back, memory_stays
from launch.runtime.schedule import lr_factor
from launch.runtime.zero3 import shard_while_loading, sharder
from recipes.base import Recipe
from recipes.models.build import checkpoint_layers, compile_layers, from_pretrained, from_scratch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16_autocast": torch.float32}
"""Parameter dtype of each `precision`."""

NumpyBatch = Mapping[str, np.ndarray]


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite. The update it would have caused did not happen."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over the global batch.

    loss: mean over all supervised targets of the global batch. grad_norm: L2 norm of the whole gradient before
    clipping, or None where the engine does not measure it. lr: learning rate of this step. tokens: real (unpadded)
    tokens of the global batch. applied: False where dynamic fp16 loss scaling skipped the update.
    """

    loss: float
    grad_norm: float | None
    lr: float
    tokens: int
    supervised: int
    applied: bool


def build_model(recipe: Recipe, cfg: Config, ds_config: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """The recipe's model: whole on each rank, or under ZeRO-3 sharded block by block while it is built."""
    stage3 = cfg.zero.stage == 3
    dtype, attention = DTYPES[cfg.precision.name], cfg.model.attention
    folder = recipe.weights()
    with memory_goes_back() if stage3 else nullcontext():
        if folder is not None:
            keep_alive = shard_while_loading(ds_config) if stage3 else None
            model = from_pretrained(recipe.hf_class(), folder, dtype=dtype, attention=attention)
            del keep_alive
        else:
            place = sharder(ds_config) if stage3 else None
            model = from_scratch(
                recipe.hf_class(), recipe.model_config(),
                seed=cfg.seed, dtype=dtype, device=device, attention=attention, place=place,
            )  # fmt: skip
    checkpoint_layers(model, cfg.train.activation_checkpointing)
    if cfg.train.compile:
        compile_layers(model)
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for biases, norms and other vectors (as GPT-3 and Llama were trained)."""

    def rank(parameter: nn.Parameter) -> int:
        # Under ZeRO-3 the local tensor is an empty vector; the engine keeps the true shape in ds_shape.
        return len(getattr(parameter, "ds_shape", parameter.shape))

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if rank(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if rank(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Engine:
    """A DeepSpeed engine with a token-weighted loss.

    The engine averages over data ranks and micro-batches; a mean of means is wrong as soon as these supervise unequal
    numbers of tokens. So losses are sums here, scaled by (data ranks / supervised targets of the global batch) before
    backward: what the engine averages is then exactly the gradient of the global mean, for every accumulation and
    number of ranks.
    """

    def __init__(
        self, recipe: Recipe, cfg: Config, layout: Layout, ds_config: dict[str, Any], device: torch.device, steps: int
    ):
        self.recipe, self.layout, self.device = recipe, layout, device
        self.accumulation = cfg.batch.accumulation
        self._stage = cfg.zero.stage
        # deepspeed 0.19.8: from stage 1 on the norm it reports for Muon is that of the orthogonalised update.
        self._norm_is_of_update = cfg.optimizer.name.lower() == "muon" and cfg.zero.stage > 0
        self._dynamic_scale = cfg.precision.name == "fp16" and cfg.precision.loss_scale == 0
        model = build_model(recipe, cfg, ds_config, device)
        schedule = cfg.scheduler

        def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(schedule, step, steps))

        self.ds, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, cfg.optimizer.weight_decay),
            config=ds_config,
            lr_scheduler=scheduler,
            dist_init_required=False,
        )
        self.ds.eval()
        recipe.adopt(self.ds.module)
        self.ds.train()
        if device.type == "cpu":
            memory_stays()

    @property
    def module(self) -> PreTrainedModel:
        """The Hugging Face model; its parameters may be shards (ZeRO-3)."""
        return cast("PreTrainedModel", self.ds.module)

    def _tensors(self, batch: NumpyBatch) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value).to(self.device, non_blocking=True) for key, value in batch.items()}

    def _sum(self, *values: float | torch.Tensor) -> list[float]:
        """Sum of each value over the data ranks, in fp64 (losses of millions of tokens, exact counts)."""
        total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        if self.layout.data > 1:
            dist.all_reduce(total)
        return total.tolist()

    def train_step(
        self, micro_batches: Sequence[NumpyBatch], inspect: Callable[[Engine], None] | None = None
    ) -> StepResult:
        """Forward and backward over this rank's `accumulation` micro-batches, then one update.

        `inspect` is called when the gradient is complete and before it is clipped or used.
        Raises NonFiniteError before the weights change.
        """
        counts = np.sum([self.recipe.count(batch) for batch in micro_batches], axis=0)
        supervised, tokens = self._sum(*counts.tolist())
        if not supervised:
            raise NonFiniteError("no target in the whole global batch is supervised: its mean loss does not exist")
        scale = self.layout.data / supervised
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        lr = self.ds.get_lr()[0]
        for index, batch in enumerate(micro_batches):
            partial = self.recipe.loss(self.ds, self._tensors(batch))
            loss += partial.detach()
            self.ds.backward(partial * scale, scale_wrt_gas=False)
            if index < len(micro_batches) - 1:
                self.ds.step()  # counts the micro-batch; the update waits for the last one
        (total,) = self._sum(loss)
        if not np.isfinite(total):
            raise NonFiniteError(f"loss is {total}" + ("" if torch.isfinite(loss) else " (on this rank)"))
        if inspect is not None:
            inspect(self)
        norm = self._norm_without_zero() if self._stage == 0 and self._is_plain else None
        self.ds.step()
        if norm is None:
            norm = float(self.ds.get_global_grad_norm())
        applied = not getattr(self.ds.optimizer, "overflow", False)
        if not applied and not self._dynamic_scale:
            raise NonFiniteError(f"gradient norm is {norm}")
        grad_norm = None if self._norm_is_of_update else norm
        return StepResult(total / supervised, grad_norm, lr, int(tokens), int(supervised), applied)

    @property
    def _is_plain(self) -> bool:
        """Stage 0 in fp32: the torch optimizer itself, with no wrapper that measures or checks the gradient."""
        return isinstance(self.ds.optimizer, torch.optim.Optimizer) and not hasattr(self.ds.optimizer, "overflow")

    def _norm_without_zero(self) -> float:
        # deepspeed 0.19.8: at stage 0 in fp32 nobody checks for inf or nan, and the norm is not kept.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not np.isfinite(norm):
            raise NonFiniteError(f"gradient norm is {norm}")
        return norm

    def eval_step(self, batch: NumpyBatch) -> tuple[torch.Tensor, int]:
        """(summed loss, supervised targets) of a micro-batch on this rank. All ranks must call it equally often."""
        with torch.no_grad():
            loss = self.recipe.loss(self.ds, self._tensors(batch))
        return loss, self.recipe.count(batch)[0]

    def evaluate(self, micro_batches: Iterator[NumpyBatch]) -> dict[str, float]:
        """Metrics over all ranks' micro-batches, each weighted by what it supervises."""
        self.ds.eval()
        loss, supervised = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in micro_batches:
            partial, count = self.eval_step(batch)
            loss += partial
            supervised += count
        self.ds.train()
        total, rows = self._sum(loss, supervised)
        return self.recipe.metrics(total / max(1.0, rows), int(rows))

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole gradient in fp32) of each parameter; a collective call, valid inside `inspect`."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield (
                    name,
                    safe_get_full_grad(parameter).float().reshape(getattr(parameter, "ds_shape", parameter.shape)),
                )

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole parameter) one by one; a collective call, nothing is kept gathered."""
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                yield name, parameter.detach()

    def peak_memory_bytes(self) -> int:
        """Most device memory this rank has held (CUDA: allocator peak; CPU: resident set)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
