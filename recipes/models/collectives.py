"""Collective operations with their gradients, over the ranks that share a matrix or a sequence.

The pairs are those of Megatron-LM (Shoeybi et al. 2019, section 3): a copy forward is an all-reduce backward, and the
other way round.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import distributed as dist


class RankGroup:
    """Some ranks that work on one thing together: `group` is their process group, `rank` this one's place in it."""

    def __init__(self, group: Any, rank: int, size: int):
        self.group, self.rank, self.size = group, rank, size
        self._copied: tuple[Any, Any] = (lambda: None, lambda: None)

    def part(self, length: int) -> slice:
        """This rank's share of `length` things; the first ranks have one more where it does not divide."""
        small, more = divmod(length, self.size)
        start = self.rank * small + min(self.rank, more)
        return slice(start, start + small + (self.rank < more))

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """x as it is; its gradient is the sum over the ranks.

        Query, key and value read the same x: they share one copy, so that their gradients are added before the sum.
        """
        last, copied = self._copied[0](), self._copied[1]()
        if last is x and copied is not None:
            return copied
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x
        copied = _Copy.apply(x, self.group)
        self._copied = weakref.ref(x), weakref.ref(copied)
        return copied

    def shared(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter as it is; its gradient is the sum over the ranks. Never one copy for two micro-batches."""
        return _Copy.apply(parameter, self.group)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks; the gradient passes as it is."""
        return _Sum.apply(x, self.group)

    def gather(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """Each rank's part of the last dimension, put together to `length`; the gradient is this rank's part."""
        return _Gather.apply(x, self, length)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the last dimension of x, which all have; the gradient is put together again."""
        return _Split.apply(x, self)

    def exchange(self, x: torch.Tensor, scatter: int, gather: int) -> torch.Tensor:
        """All-to-all: dimension `scatter` (a multiple of the ranks) is dealt out, `gather` is put together."""
        return _Exchange.apply(x, self, scatter, gather)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()  # other readers of this gradient must not see the sum
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _gathered(x: torch.Tensor, ranks: RankGroup, length: int) -> torch.Tensor:
    """Parts of the last dimension put together; uneven ones travel filled up to the longest."""
    longest = -(-length // ranks.size)
    padded = torch.nn.functional.pad(x, (0, longest - x.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(ranks.size)]
    dist.all_gather(parts, padded, group=ranks.group)
    small, more = divmod(length, ranks.size)
    return torch.cat([part[..., : small + (rank < more)] for rank, part in enumerate(parts)], dim=-1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, length):
        ctx.part = ranks.part(length)
        return _gathered(x, ranks, length)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[..., ctx.part].contiguous(), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks, ctx.length = ranks, x.shape[-1]
        return x[..., ranks.part(x.shape[-1])].contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return _gathered(gradient, ctx.ranks, ctx.length), None


def _exchanged(x: torch.Tensor, ranks: RankGroup, scatter: int, gather: int) -> torch.Tensor:
    send = torch.stack([part.contiguous() for part in x.chunk(ranks.size, dim=scatter)])
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=ranks.group)
    return torch.cat(received.unbind(0), dim=gather)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, scatter, gather):
        ctx.ranks, ctx.scatter, ctx.gather = ranks, scatter, gather
        return _exchanged(x, ranks, scatter, gather)

    @staticmethod
    def backward(ctx, gradient):
        return _exchanged(gradient, ctx.ranks, ctx.gather, ctx.scatter), None, None, None
