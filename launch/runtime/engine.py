"""The engine interface of the loop: one optimizer step, one evaluation, whatever the layout behind it."""

from __future__ import annotations

import itertools
import math
import resource
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.utils import groups, safe_get_full_grad
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel

from conf.batch import Layout, sizes
from conf.errors import RequestError
from conf.schema import Config
from launch.runtime import kernels
from launch.runtime.allocator import memory_stays
from launch.runtime.build import build
from launch.runtime.fragments import optimizer_of
from launch.runtime.schedule import lr_factor
from launch.runtime.topology import topology
from recipes.base import PICKED, Prediction, Recipe
from recipes.models.loss import IGNORE
from recipes.models.router_loss import RouterLoss, listening
from recipes.models.sequence_parallel import SequenceParallel
from recipes.models.tensor_parallel import join

NumpyBatch = Mapping[str, np.ndarray]


Outputs = dict[str, np.ndarray]


class BadStepError(RuntimeError):
    """A loss or gradient is not one to learn from. The update it would have caused did not happen."""


class NonFiniteError(BadStepError):
    """It is not a finite number."""


Verdict = Callable[[float | None, float | None], str | None]
"""(loss, or None; norm of the gradient, or None) → what is wrong with them. The same on all ranks."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over the global batch.

    loss: mean over all supervised targets of the global batch. grad_norm: L2 norm of the whole gradient before
    clipping, or None where the engine does not measure it. lr: learning rate of this step. tokens: real (unpadded)
    tokens of the global batch. applied: False where dynamic fp16 loss scaling skipped the update. bubble: idle share of
    the pipeline's stages, their mean, as measured; None without a pipeline.
    """

    loss: float
    grad_norm: float | None
    lr: float
    tokens: int
    supervised: int
    applied: bool
    bubble: float | None = None
    padding: float = 0.0
    """Share of the token places of all micro-batches that hold padding."""
    router_aux_loss: float | None = None
    """The routers' load-balancing loss, without its coefficient; None where it does not count."""


@dataclass(frozen=True)
class Evaluation:
    """metrics: the same on all ranks. predictions: on rank 0, of every held-out row, in the order of the rows."""

    metrics: dict[str, float]
    predictions: list[Prediction]


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
    """A DeepSpeed engine with a token-weighted loss, in any layout.

    The engine averages over data ranks and micro-batches; a mean of means is wrong as soon as these supervise unequal
    numbers of tokens. So losses are sums here, scaled by (replicas / supervised targets of the global batch) before
    backward: what the engine averages is then exactly the gradient of the global mean, for every accumulation and
    layout.
    """

    def __init__(
        self, recipe: Recipe, cfg: Config, layout: Layout, ds_config: dict[str, Any], device: torch.device, steps: int
    ):
        self.recipe, self.layout, self.device = recipe, layout, device
        self.accumulation = sizes(cfg.batch)[2]
        self._stage = cfg.zero.stage
        # deepspeed 0.19.8: from stage 1 on the norm it reports for Muon is that of the orthogonalised update.
        self._norm_is_of_update = cfg.optimizer.name.lower() == "muon" and cfg.zero.stage > 0
        self._dynamic_scale = cfg.precision.name == "fp16" and cfg.precision.loss_scale == 0
        self.topology = topology(layout, dist.get_rank())
        kernels.build_for(cfg, device.type)
        self._built = build(recipe, cfg, ds_config, device, self.topology)
        self._sequence: SequenceParallel | None = None
        module = self._wrap()
        schedule = cfg.scheduler

        def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(schedule, step, steps))

        # deepspeed 0.19.8 keeps the last engine's: a second run in this process (a notebook) would take it for its own.
        groups.mpu = None
        self.ds, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module, cfg.optimizer.weight_decay),
            config=ds_config,
            lr_scheduler=scheduler,
            mpu=self.topology.grid,
            dist_init_required=False,
        )
        self._listen(RouterLoss(self.module, self.topology.sequence) if recipe.balances_routers() else None)
        self.before_change: Callable[[], None] = lambda: None
        """Called before each update; who reads the state from another thread has it wait."""
        self.doing = ""
        """Which part of a step or an evaluation this rank is in, for whoever has to say where it ended."""
        self._bad: BadStepError | None = None
        self._norm: float | None = None
        self._loss_scale = 1.0
        self._guard_updates()
        self.ds.eval()
        self._adopt()
        self.ds.train()
        if self.topology.sequence is not None:  # after the recipe has looked at the model alone
            self._sequence = SequenceParallel(self.module, self.topology.sequence)
        # Dropout: other masks for other rows, tokens and layers, and the same on all tensor ranks, which share them.
        place = self.topology.place
        entropy = [cfg.seed, place.pipeline, place.data, place.sequence]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        if device.type == "cpu":
            memory_stays()

    def _listen(self, router: RouterLoss | None) -> None:
        """Let the routers' loss count, if there is one."""
        self.router = router

    def _wrap(self) -> nn.Module:
        """What DeepSpeed is given."""
        return self._built[0].model

    def _adopt(self) -> None:
        """Let the recipe look at the model; what it refuses on one rank is refused on all."""
        problem = None
        try:
            self.recipe.adopt(self.module)
        except RequestError as error:
            problem = error
        if self.layout.pipeline > 1:
            answers: list[RequestError | None] = [None] * self.layout.world
            dist.all_gather_object(answers, problem)
            problem = next((answer for answer in answers if answer is not None), None)
        if problem is not None:
            raise problem

    @property
    def module(self) -> PreTrainedModel:
        """The Hugging Face model; its parameters may be shards, its layers those of this rank's stages."""
        return self._built[0].model

    def _tensors(self, batch: NumpyBatch) -> dict[str, torch.Tensor]:
        """A micro-batch on the device; of a sequence that several ranks share, this rank's part.

        With it, where a loss picks the supervised places, which ones: asking the device for them would mean to wait for
        all that it has still to do, in the middle of each forward pass.
        """
        if short := -self.recipe.width(batch) % self.layout.sequence:
            batch = self.recipe.widen(dict(batch), self.recipe.width(batch) + short)
        tensors = {key: self._on_device(value) for key, value in batch.items()}
        if self._sequence is not None:
            tensors = self._sequence.split(tensors)
        if self.recipe.PICKS:
            labels = batch["labels"]
            if self.topology.sequence is not None:
                labels = labels[:, self.topology.sequence.part(labels.shape[1])]
            tensors[PICKED] = self._on_device(np.flatnonzero(labels != IGNORE))
        return tensors

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        """From pinned pages: a copy out of others waits until the GPU has done all that was launched before it.

        torch's allocator of pinned pages gives none away again before the copy out of it is over.
        """
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _sum(self, *values: float | torch.Tensor) -> list[float]:
        """Sum of each value over all ranks, in fp64 (losses of millions of tokens, exact counts)."""
        if self.layout.world == 1 and not any(isinstance(value, torch.Tensor) for value in values):
            return [float(value) for value in values]
        total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        if self.layout.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def _max(self, value: float) -> float:
        """The largest of all ranks' values, in fp64."""
        if self.layout.world == 1:
            return value
        most = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.item()

    def _sum_losses(self, *losses: torch.Tensor) -> list[float]:
        """Losses of the whole batch: ranks that have the same tokens count once."""
        return self._sum(*(loss if self.topology.counts else torch.zeros_like(loss) for loss in losses))

    def _sum_counts(self, *counts: int) -> list[float]:
        """Counts of the whole batch, from what each rank read: whole sequences."""
        return self._sum(*(count * self._counts_rows for count in counts))

    def train_step(
        self,
        micro_batches: Sequence[NumpyBatch],
        inspect: Callable[[Engine], None] | None = None,
        verdict: Verdict = lambda loss, norm: None,
    ) -> StepResult:
        """Forward and backward over this rank's `accumulation` micro-batches, then one update.

        `inspect` is called when the gradient is complete and before it is clipped or used.
        Raises BadStepError where loss or gradient are not finite, or `verdict` finds something in them: the step is
        over then, weights and optimizer are as before it, and the next one can be taken.
        """
        counts = np.sum([(*self.recipe.count(batch), self.recipe.places(batch)) for batch in micro_batches], axis=0)
        supervised, tokens, places = self._sum_counts(*counts.tolist())
        if not supervised:
            raise NonFiniteError("no target in the whole global batch is supervised: its mean loss does not exist")
        lr = self.ds.get_lr()[0]
        norm: float | None = None
        total = balance = 0.0
        self._bad, self._norm, self._verdict = None, None, verdict
        self._loss_scale = self._unapplied_scale()  # the step may change it, after it has measured the norm

        def before_update(loss: torch.Tensor, router_loss: torch.Tensor) -> None:
            nonlocal norm, total, balance
            total, balance = self._sum_losses(loss, router_loss)
            if not np.isfinite(total):
                where = "" if torch.isfinite(loss) else " (on this rank)"
                self._bad = NonFiniteError(f"loss is {total}{where}")
            elif not np.isfinite(balance):
                self._bad = NonFiniteError(f"the routers' loss is {balance}")
            elif problem := verdict(total / supervised, None):
                self._bad = BadStepError(problem)
            if inspect is not None:
                inspect(self)
            if self._stage == 0 and self._is_plain:
                norm = self._norm_without_zero()
                self._judge_norm(norm)
            self.before_change()

        position = self.ds.lr_scheduler.last_epoch
        self._run(micro_batches, self.layout.replicas / supervised, before_update)
        self.doing = ""
        if norm is None:  # else it was asked for before the update, which the device may still be at
            norm = self._norm if self._norm is not None else float(self.ds.get_global_grad_norm()) / self._loss_scale
        applied = not getattr(self.ds.optimizer, "overflow", False)
        if not applied and not self._dynamic_scale:
            self._bad = self._bad or NonFiniteError(f"gradient norm is {norm}")
        if self._bad is not None:
            if self.ds.lr_scheduler.last_epoch == position:  # the engine passes over it where it saw the overflow
                self.ds.lr_scheduler.step()
            raise self._bad
        # deepspeed 0.19.8 calls the norm of a step that loss scaling skips infinite.
        grad_norm = None if self._norm_is_of_update or not applied else norm
        return StepResult(
            total / supervised,
            grad_norm,
            lr,
            int(tokens),
            int(supervised),
            applied,
            self._bubble(),
            1 - tokens / places,
            None if self.router is None else balance / supervised,
        )

    _verdict: Verdict

    def _judge_norm(self, norm: float) -> None:
        if self._bad is None and not np.isfinite(norm):
            self._bad = NonFiniteError(f"gradient norm is {norm}")
        elif self._bad is None and (problem := self._verdict(None, norm)):
            self._bad = BadStepError(problem)

    def _guard_updates(self) -> None:
        """torch's optimizer leaves the weights alone in a bad step; what the engine does around it goes on as ever.

        So gradients are cleared, and micro-batches counted, at every ZeRO stage in the engine's own way.
        """
        inner = optimizer_of(self.ds.optimizer)
        update = inner.step

        def step(*args: Any, **kwargs: Any) -> Any:
            norm = getattr(self.ds.optimizer, "_global_grad_norm", None)
            if norm is not None and self._norm is None and not self._is_plain and not self._norm_is_of_update:
                self._norm = float(norm) / self._loss_scale  # once: this is called for each group of parameters
                self._judge_norm(self._norm)
            return update(*args, **kwargs) if self._bad is None else None

        inner.step = step  # type: ignore[method-assign]

    def _unapplied_scale(self) -> float:
        """The loss scale where the engine divides gradients by it and forgets to multiply the loss; else 1.

        deepspeed 0.19.8, fp16 at stage 0 (FP16_UnfusedOptimizer): `engine.backward` scales the loss for ZeRO alone, so
        that updates would be those of gradients 65536 times too small. And the norm is that of the scaled gradient.
        """
        config = getattr(self.ds.optimizer, "loss_scale_config", None)
        return float(config.cur_scale) if config is not None and config.use_grad_scaling else 1.0

    def _bubble(self) -> float | None:
        return None

    def _run(
        self,
        micro_batches: Sequence[NumpyBatch],
        scale: float,
        before_update: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        """All micro-batches and the update; `before_update` gets this rank's summed losses in between: that of the
        targets and that of the routers (`RouterLoss.loss`)."""
        scale *= self._loss_scale
        losses = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            tensors = self._tensors(batch)
            self.doing = "the forward pass"
            with listening(self.router) as logits:
                partial = self.recipe.loss(self.ds, tensors)
            balance = self._router_loss(logits, tensors)
            losses += torch.stack([partial.detach(), balance.detach()])
            if self.router is not None:
                partial = partial + balance * self.router.coefficient
            self.doing = "the backward pass"
            self.ds.backward(partial * scale, scale_wrt_gas=False)
            if index < len(micro_batches) - 1:
                self.ds.step()  # counts the micro-batch; the update waits for the last one
        before_update(losses[0], losses[1])
        self.doing = "the update"
        self.ds.step()

    def _router_loss(self, logits: list[torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.router is None:
            return torch.zeros((), device=self.device)
        real, supervised = self.recipe.rows(batch)
        return self.router.loss(self.router.sums(logits, real), supervised)

    @property
    def _is_plain(self) -> bool:
        """Stage 0 in fp32: the torch optimizer itself, with no wrapper that measures or checks the gradient."""
        return isinstance(self.ds.optimizer, torch.optim.Optimizer) and not hasattr(self.ds.optimizer, "overflow")

    def _norm_without_zero(self) -> float:
        # deepspeed 0.19.8: at stage 0 in fp32 nobody checks for inf or nan, and the norm is not kept.
        mine = [p.grad for p in self.module.parameters() if p.grad is not None and self._counts_in_norm(p)]
        norm = float(torch.nn.utils.get_total_norm(mine)) if mine else 0.0
        if self.layout.tensor * self.layout.pipeline > 1:
            norm = float(np.sqrt(self._sum(norm**2)[0] / self.layout.replicas))
        return norm

    def _counts_in_norm(self, parameter: nn.Parameter) -> bool:
        """Each element once: whole parameters on one tensor rank, a tied copy not at all."""
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        return hasattr(parameter, "tensor_cut") or self.topology.place.tensor == 0

    def evaluate(self, micro_batches: Iterator[NumpyBatch]) -> Evaluation:
        """Metrics over all ranks' micro-batches, and on rank 0 the predictions. All ranks have equally many."""
        self.ds.eval()
        self.doing = "a forward pass without gradients"
        losses, supervised = torch.zeros(2, dtype=torch.float64, device=self.device), 0
        mine: list[Prediction] = []
        for batches in self._evaluated(micro_batches):
            partial, outputs = self._eval_outputs(batches)
            losses += partial
            supervised += sum(self.recipe.count(batch)[0] for batch in batches)
            if self._counts_rows:
                for batch, found in zip(batches, outputs, strict=True):
                    mine += self.recipe.predictions(batch, found)
        self.ds.train()
        self.doing = ""
        (total, balance), rows = self._sum_losses(losses[0], losses[1]), self._sum_counts(supervised)[0]
        predictions = sorted(self._gathered(mine), key=lambda prediction: prediction["id"])
        if dist.get_rank() == 0:
            predictions = self.recipe.merged(predictions)
        answers: list[Any] = [None]
        if dist.get_rank() == 0:
            metrics = self.recipe.metrics(total / max(1.0, rows), int(rows), predictions)
            answers = [metrics | ({} if self.router is None else {"router_aux_loss": balance / max(1.0, rows)})]
        if self.layout.world > 1:
            dist.broadcast_object_list(answers, src=0, device=self.device)
        return Evaluation(answers[0], predictions)

    @property
    def _counts_rows(self) -> bool:
        """Whether this rank speaks for the rows it read: one rank of each data place does."""
        return self.topology.counts and self.topology.place.sequence == 0

    def _gathered(self, mine: list[Prediction]) -> list[Prediction]:
        """All ranks' predictions, on rank 0."""
        if self.layout.world == 1:
            return mine
        everything: list[Any] | None = [None] * self.layout.world if dist.get_rank() == 0 else None
        dist.gather_object(mine, everything, dst=0)
        return list(itertools.chain.from_iterable(everything or []))

    def _evaluated(self, micro_batches: Iterator[NumpyBatch]) -> Iterator[list[NumpyBatch]]:
        """Micro-batches in the groups that are evaluated at once."""
        for batch in micro_batches:
            yield [batch]

    def _eval_outputs(self, batches: list[NumpyBatch]) -> tuple[torch.Tensor, list[Outputs]]:
        """(summed losses as in `_run`, what the recipe keeps of the outputs) of micro-batches on this rank."""
        losses, kept = torch.zeros(2, dtype=torch.float64, device=self.device), []
        with torch.no_grad():
            for batch in batches:
                tensors = self._tensors(batch)
                with listening(self.router) as logits:
                    loss, outputs = self.recipe.evaluate(self.ds, tensors)
                losses += torch.stack([loss, self._router_loss(logits, tensors)])
                kept.append(outputs)
        return losses, kept

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole gradient in fp32) of each parameter of this rank's stage.

        A collective call, valid inside `inspect`.
        """
        scale = float(getattr(self.ds.optimizer, "loss_scale", 1.0))
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter).float() / scale
                yield name, self._whole(parameter, gradient.reshape(getattr(parameter, "ds_shape", parameter.shape)))

    def tensors(self) -> dict[str, int]:
        """Hugging Face names of the whole model's parameters and saved buffers → bytes; a collective call."""
        return self._own_tensors()

    def stream(self) -> Generator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of all `tensors()`, in their order, one by one; a collective call.

        The tensor is good on rank 0. Nothing is kept gathered.
        """
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                yield name, self._whole(parameter, parameter.detach())
        yield from persistent_buffers(self.module)

    def _own_tensors(self) -> dict[str, int]:
        """The same of this rank's stage."""
        sizes = {}
        for name, parameter in self.module.named_parameters():
            cut = getattr(parameter, "tensor_cut", None)
            numel = math.prod(cut.whole) if cut else getattr(parameter, "ds_numel", parameter.numel())
            sizes[name] = numel * parameter.element_size()
        return sizes | {name: buffer.nbytes for name, buffer in persistent_buffers(self.module)}

    def _whole(self, parameter: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """The whole tensor from the tensor ranks' shares of it."""
        return join(parameter, share, self.topology.tensor)

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Which of these is true on any rank; a collective call."""
        if self.layout.world == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes.tolist())

    def peak_memory_bytes(self) -> int:
        """Most memory that any rank has held (CUDA: allocator peak; CPU: resident set); a collective call."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == "darwin" else 1024
        return int(self._max(peak))


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, buffer) of the buffers that belong into a saved model."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
