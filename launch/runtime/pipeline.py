"""Stages on DeepSpeed's pipeline engine: what travels between them, and where we look at the gradient.

Each rank can read every micro-batch (the order of data is a pure function), so only hidden states travel: tokens,
positions, masks and labels never do. Facts about the engine are those of DeepSpeed 0.19.8 (`runtime/pipe`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule
from deepspeed.runtime.pipe import schedule
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel

from conf.batch import Layout
from launch.planner.schedule import Instruction
from launch.runtime.topology import Topology
from recipes.base import Recipe
from recipes.models.router_loss import RouterLoss, listening
from recipes.models.stages import Stage, is_tied

Tensors = dict[str, torch.Tensor]


class StageModule(nn.Module):
    """The one layer that a pipeline stage consists of for the engine.

    On the last stage the output is the micro-batch's summed loss times `scale`, on the others it is hidden states.
    """

    def __init__(self, stage: Stage, recipe: Recipe):
        super().__init__()
        self.stage, self.model = stage, stage.model
        self._recipe = recipe
        self.outputs: list[dict[str, np.ndarray]] = []
        """What the recipe kept of each held-out micro-batch since `start`; on the last stage."""
        self.router: RouterLoss | None = None
        self.router_losses: list[torch.Tensor] = []
        """The routers' summed loss of each micro-batch since `start`, without its coefficient; on the last stage."""
        self._batches: Sequence[Tensors] = ()
        self._next = 0
        self._scale = 1.0

    def start(self, batches: Sequence[Tensors], scale: float) -> None:
        """The micro-batches that the next forward passes take in turn; every schedule goes through them in order."""
        self._batches, self._next, self._scale, self.outputs = batches, 0, scale, []
        self.router_losses = []

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        batch = self._batches[self._next]
        self._next += 1
        hidden, sums = None if self.stage.first else received, None
        if self.router is not None and hidden is not None:
            hidden, sums = self.router.detach(hidden)
        self.stage.receive(hidden)
        with self.stage.alone(), listening(self.router) as logits:
            if not self.stage.last:
                leaving = self.stage.forward(**self._recipe.inputs(batch))
            elif torch.is_grad_enabled():
                leaving = self._recipe.loss(self.model, batch)
            else:
                leaving, outputs = self._recipe.evaluate(self.model, batch)
                self.outputs.append(outputs)
        if self.router is not None:
            leaving = self._with_routers(self.router, leaving, logits, sums, batch)
        if self.stage.last:
            return leaving * self._scale
        # A convolution leaves its output in another order of memory, which gloo does not send.
        return leaving.contiguous()

    def _with_routers(
        self, router: RouterLoss, leaving: torch.Tensor, logits: list[torch.Tensor], sums: torch.Tensor | None,
        batch: Tensors,
    ) -> torch.Tensor:  # fmt: skip
        """What leaves the stage, with what its routers said behind it or, on the last one, their loss on top."""
        real, supervised = self._recipe.rows(batch)
        own = router.sums(logits, real)
        sums = own if sums is None else sums + own
        if not self.stage.last:
            return router.attach(leaving, sums)
        balance = router.loss(sums, supervised)
        self.router_losses.append(balance.detach())
        return leaving + balance * router.coefficient


class Stages(PipelineModule):
    """All stages as the engine wants them; only this rank's is built."""

    def __init__(self, own: Sequence[StageModule], topology: Topology):
        super().__init__(
            layers=[LayerSpec(_taken_from(iter(own)))] * topology.layout.stages,
            topology=topology.axes,
            partition_method="uniform",
            loss_fn=lambda loss, _: loss,
        )
        self._tie(own[0].model, topology)

    def start(self, batches: Sequence[Tensors], scale: float) -> None:
        """The micro-batches that the next forward passes of each stage take in turn."""
        for module in self._own():
            module.start(batches, scale)

    def outputs(self) -> list[dict[str, np.ndarray]]:
        """What the recipe kept of the held-out micro-batches since `start`."""
        return [outputs for module in self._own() for outputs in module.outputs]

    def router_losses(self) -> list[torch.Tensor]:
        """The routers' loss of each micro-batch since `start`, without its coefficient; empty where none counts."""
        return [loss for module in self._own() for loss in module.router_losses]

    def listen(self, router: RouterLoss | None) -> None:
        """Let the routers' loss count, from now on."""
        for module in self._own():
            module.router = router

    def _own(self) -> list[StageModule]:
        return [module for module in self.children() if isinstance(module, StageModule)]

    def _tie(self, model: PreTrainedModel, topology: Topology) -> None:
        """Groups of (first, last) stage for a tied embedding, and its copy marked so that the norm counts it once."""
        self._tied: list[tuple[nn.Parameter, Any]] = []
        layout, place = topology.layout, topology.place
        two_copies = is_tied(model) and layout.loss_at != 0
        for data in range(layout.replicas if two_copies else 0):
            for tensor in range(layout.tensor):
                ranks = [topology.axes.get_rank(pipe=p, data=data, model=tensor) for p in (0, layout.loss_at)]
                group = dist.new_group(ranks=ranks)
                if topology.rank in ranks:
                    weight = next(model.get_input_embeddings().parameters())
                    self._tied.append((weight, group))
                    if topology.rank != ranks[0]:
                        vars(weight).update(ds_pipe_replicated=True, tensor_model_parallel=False)
        for parameter in self.parameters():
            # Without ZeRO, `clip_grad_norm_` counts what these marks say, and of the first stage everything.
            if place.tensor == 0 and not vars(parameter)["ds_pipe_replicated"]:
                vars(parameter)["model_parallel"] = True

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """What the engine all-reduces before its step: the two copies of a tied embedding."""
        return self._tied


class StagesInV(Stages, DualPipeVModule):
    """The same with two stages on each rank, on the way out and on the way back (DualPipeV)."""


def _taken_from(own: Iterator[nn.Module]) -> type[nn.Module]:
    """A LayerSpec wants a class; each call of this one returns this rank's next stage."""

    class Built(nn.Module):
        def __new__(cls) -> Any:
            return next(own)

    return Built


class Clock:
    """Seconds this stage spends in forward and backward passes, out of the whole step: the rest is the bubble.

    On a GPU by its own events: to wait for each pass, so as to look at the host's clock, would keep the host from
    launching the next one, and make the bubble that is measured.
    """

    BUSY = (schedule.ForwardPass, schedule.BackwardPass)
    AFTER = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.reset()

    def _now(self) -> Any:
        """A moment: seconds of the host, or an event behind what was launched so far."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> float:
        """Seconds from one moment to another, which have passed."""
        return first.elapsed_time(second) / 1000 if self._on_gpu else second - first

    def reset(self) -> None:
        """Start a step."""
        self._started = self._now()
        self._passes: list[tuple[Any, Any]] = []
        self._ended: Any = None

    def timed(self, kind: type, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, the engine's method for an instruction, with its time noted."""

        def method(engine: Any, **kwargs: Any) -> Any:
            if kind in self.AFTER and self._ended is None:
                self._ended = self._now()
            started = self._now() if kind in self.BUSY else None
            result = run(engine, **kwargs)
            if started is not None:
                self._passes.append((started, self._now()))
            return result

        return method

    def busy_and_span(self) -> tuple[float, float]:
        """(busy seconds, seconds from the first instruction to this stage's first reduction of gradients)."""
        assert self._ended is not None, "no step was taken"
        if self._on_gpu:
            self._ended.synchronize()
        return sum(self._between(*each) for each in self._passes), self._between(self._started, self._ended)


def watch(engine: Any, clock: Clock, before_step: Callable[[], None]) -> None:
    """Time each instruction of `engine`, and call `before_step` when gradients are complete and not yet used."""
    step = engine._INSTRUCTION_MAP[schedule.OptimizerStep]

    def checked(engine: Any, **kwargs: Any) -> Any:
        before_step()
        return step(engine, **kwargs)

    def reduce_tied(engine: Any, **kwargs: Any) -> Any:
        # deepspeed 0.19.8 passes over a weight whose gradient it does not find (fp16 with ZeRO-1 accumulates in fp32,
        # elsewhere), in silence: the two copies of a tied embedding would drift apart.
        for weight, group in engine.module.get_tied_weights_and_groups():
            gradient = weight._hp_grad if engine.using_bf16_optimizer else weight.grad
            if gradient is None:
                gradient = getattr(weight, "grad_accum", None)
            if gradient is None:
                raise RuntimeError("the gradient of a tied embedding is nowhere that we know of")
            dist.all_reduce(gradient, group=group)

    # On the instance: the class's map belongs to every pipeline engine of the process.
    ours = {schedule.OptimizerStep: checked, schedule.ReduceTiedGrads: reduce_tied}
    engine._INSTRUCTION_MAP = {
        kind: clock.timed(kind, ours.get(kind, run)) for kind, run in engine._INSTRUCTION_MAP.items()
    }


INSTRUCTIONS = {
    schedule.ForwardPass: "forward", schedule.BackwardPass: "backward", schedule.CommitP2P: "commit",
    schedule.SendActivation: "send_activation", schedule.RecvActivation: "recv_activation",
    schedule.SendGrad: "send_grad", schedule.RecvGrad: "recv_grad",
}  # fmt: skip


def programs(layout: Layout, micro_batches: int) -> list[list[Instruction]]:
    """What the engine will have each rank of a folded pipeline do in a step, for the planner."""

    def named(place: int, instruction: Any) -> Instruction:
        numbers = instruction.kwargs
        phase = numbers.get("phase", 0)
        stage = layout.stages_of(place)[phase]
        return INSTRUCTIONS[type(instruction)], stage, numbers.get("buffer_id", 0) - phase * micro_batches

    found = []
    for place in range(layout.pipeline):
        steps = schedule.DualPipeVSchedule(micro_batches, layout.pipeline, place).steps()
        found.append([named(place, one) for step in steps for one in step if type(one) in INSTRUCTIONS])
    return found


def nothing() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the first and last stage read in place of data: an integer, for which no gradient is wanted."""
    while True:
        yield torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
