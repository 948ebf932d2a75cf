"""The engine interface over a pipeline, and the choice between the two engines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from conf.batch import Layout
from conf.schema import Config
from launch.runtime.engine import Engine, NumpyBatch, Outputs, persistent_buffers
from launch.runtime.pipeline import Clock, StageModule, Stages, StagesInV, nothing, watch
from recipes.base import Recipe
from recipes.models.router_loss import RouterLoss


class StagedEngine(Engine):
    """The same for a pipeline: each rank has the layers of its stages, and micro-batches pass through these."""

    def _wrap(self) -> nn.Module:
        own = [StageModule(stage, self.recipe) for stage in self._built]
        kind = StagesInV if self._folded else Stages
        self._stages = kind(own, self.topology)
        return self._stages

    @property
    def _folded(self) -> bool:
        """Whether the pipeline leads out and back: two stages on each rank."""
        return len(self._built) > 1

    def _listen(self, router: RouterLoss | None) -> None:
        super()._listen(router)
        self._stages.listen(router)

    def _run(
        self,
        micro_batches: Sequence[NumpyBatch],
        scale: float,
        before_update: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        if self._clock is None:
            self._clock = Clock(self.device)
            watch(self.ds, self._clock, lambda: self._before_update())
        scale *= self._loss_scale
        micro_batches = self._of_one_width(micro_batches)
        # The engine divides by the accumulation; the last stage's loss is scaled up by it.
        self._stages.start([self._tensors(batch) for batch in micro_batches], scale * self.accumulation)
        self._before_update = lambda: before_update(*self._partial(self.ds.fwd_outputs, scale * self.accumulation))
        self._clock.reset()
        self.doing = "a pass through the stages"
        self._expect(micro_batches[0])
        self.ds.train_batch(nothing())

    def _partial(self, outputs: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
        """(2,): this rank's summed losses, of the targets and of the routers, from those of the micro-batches."""
        losses = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.topology.has_loss:
            losses[0] = torch.stack([*outputs]).double().sum() / scale
        if self.topology.has_loss and self.router is not None:
            losses[1] = torch.stack(self._stages.router_losses()[: len(outputs)]).double().sum()
            losses[0] -= losses[1] * self.router.coefficient
        return losses

    _clock: Clock | None = None
    _before_update: Callable[[], None]
    _shape: tuple[int, ...] | None = None

    def _expect(self, batch: NumpyBatch) -> None:
        """The engine exchanges shapes once; other micro-batches than the last ones (in evaluation) need it again."""
        shape = next(iter(batch.values())).shape
        if shape != self._shape:
            self.ds.reset_activation_shape()
        self._shape = shape

    def _evaluated(self, micro_batches: Iterator[NumpyBatch]) -> Iterator[list[NumpyBatch]]:
        at_once = self.accumulation if self._folded else max(self.accumulation, 4 * self.layout.pipeline)
        while batches := list(itertools.islice(micro_batches, at_once)):
            yield batches

    def _of_one_width(self, batches: Sequence[NumpyBatch]) -> list[NumpyBatch]:
        """What stages send each other has one shape; unpacked micro-batches are as wide as their longest row."""
        width = max(self.recipe.width(batch) for batch in batches)
        return [
            batch if self.recipe.width(batch) == width else self.recipe.widen(dict(batch), width) for batch in batches
        ]

    def _eval_outputs(self, batches: list[NumpyBatch]) -> tuple[torch.Tensor, list[Outputs]]:
        batches = self._of_one_width(batches)
        self._expect(batches[0])
        # deepspeed 0.19.8: DualPipeV finds its buffers for as many micro-batches as training has and no other number.
        # The last one again, then, and its loss not counted.
        missing = self.accumulation - len(batches) if self._folded else 0
        tensors = [self._tensors(batch) for batch in [*batches, *[batches[-1]] * missing]]
        self._stages.start(tensors, 1.0)
        losses = self.ds.eval_batch(nothing(), reduce_output=None, bcast_loss=False, num_micro_batches=len(tensors))
        kept = self._stages.outputs()[: len(batches)] if self.topology.has_loss else []
        return self._partial(losses[: len(batches)] if self.topology.has_loss else [], 1.0), kept

    def tensors(self) -> dict[str, int]:
        return {name: size for name, (size, _) in self._all_tensors().items()}

    def _all_tensors(self) -> dict[str, tuple[int, int]]:
        """Name → (bytes, the first stage that has it), in the order of the stages."""
        answers: list[tuple[int, dict[str, int]]] = [(0, {})] * self.layout.world
        dist.all_gather_object(answers, (self.topology.place.pipeline, self._own_tensors()))
        found: dict[str, tuple[int, int]] = {}
        for stage, tensors in sorted(answers, key=lambda answer: answer[0]):
            found |= {name: (size, stage) for name, size in tensors.items() if name not in found}
        return found

    def stream(self) -> Generator[tuple[str, torch.Tensor]]:
        # One replica of the pipeline works; the other ones would send the same.
        place = self.topology.place
        works, first = place.data == place.sequence == 0, self.topology.rank == 0
        own = {**dict(self.module.named_parameters()), **dict(persistent_buffers(self.module))}
        for name, (_, stage) in self._all_tensors().items():
            value = torch.empty(0)
            if works and place.pipeline == stage:
                value = self._whole(own[name], own[name].detach())
                if stage > 0 and place.tensor == 0:
                    self._send(value)
            elif first:
                value = self._receive(self.topology.axes.get_rank(pipe=stage, data=0, model=0))
            yield name, value

    def _send(self, value: torch.Tensor) -> None:
        dist.send_object_list([(tuple(value.shape), value.dtype)], dst=0, device=self.device)
        dist.send(value.contiguous(), dst=0)

    def _receive(self, source: int) -> torch.Tensor:
        described: list[Any] = [None]
        dist.recv_object_list(described, src=source, device=self.device)
        shape, dtype = described[0]
        value = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(value, src=source)
        return value

    def _bubble(self) -> float | None:
        assert self._clock is not None  # a step was taken
        busy, span = self._clock.busy_and_span()
        # The last stage is through before the first one, and waits for it in the reduction.
        return max(0.0, 1.0 - self._sum(busy)[0] / self.layout.world / self._max(span))


def make_engine(
    recipe: Recipe, cfg: Config, layout: Layout, ds_config: dict[str, Any], device: torch.device, steps: int
) -> Engine:
    """The engine of a layout."""
    kind = StagedEngine if layout.pipeline > 1 else Engine
    return kind(recipe, cfg, layout, ds_config, device, steps)
