"""Cross-entropy that never holds all logits: in chunks, over supervised positions only.

The head and the loss of a causal model are one function here. For N supervised positions and a vocabulary of V, the
plain way keeps N×V logits, their fp32 copy and their gradient; this keeps one chunk at a time and computes the gradient
while the chunk is at hand (the softmax minus one-hot, Bishop 2006, eq. 4.109), as "Cut Your Losses" (Wijmans et al.
2024) and Liger (Hsu et al. 2024) do on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.models.collectives import RankGroup

IGNORE = -100
CHUNK_ELEMENTS = 2**21
"""Logits at hand at once (elements): 8 MiB in fp32, which stays in a CPU's cache."""
CHUNK_POSITIONS = 512
"""But at least so many positions, whatever the vocabulary: each chunk passes over the whole weight's gradient."""


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    size = max(CHUNK_POSITIONS, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


class Vocabulary:
    """The columns of the logits that are at hand: all `size` of them, or the share of one of `ranks`."""

    def __init__(self, size: int, ranks: RankGroup | None = None):
        self._ranks = ranks
        share = ranks.part(size) if ranks is not None else slice(0, size)
        self._start, self._columns = share.start, share.stop - share.start
        self.widest = -(-size // ranks.size) if ranks is not None else size
        """Columns of the largest share: all ranks must go through equally many chunks."""

    def inside(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(column of each label, or 0; 1.0 where the label is among the columns at hand)."""
        local = labels - self._start
        here = (local >= 0) & (local < self._columns)
        return local.masked_fill(~here, 0), here.float()

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over all columns, from that of the columns at hand; in place."""
        if self._ranks is not None:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._ranks.group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all columns, from that of the columns at hand; in place."""
        if self._ranks is not None:
            torch.distributed.all_reduce(values, group=self._ranks.group)
        return values


def _loss_and_exponentials(
    logits: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss of one chunk, sums of its exponentials (n, 1)). The fp32 logits become their exponentials in place:
    one pass of exp serves the loss and the gradient."""
    column, here = vocabulary.inside(labels)
    picked = logits.gather(-1, column[:, None]) * here[:, None]
    top = vocabulary.largest(logits.amax(dim=-1, keepdim=True))
    total = logits.sub_(top).exp_().sum(dim=-1, keepdim=True)
    total, picked = vocabulary.sum(torch.stack([total, picked])).unbind(0)
    return (total.log() + top - picked).sum(), total


def _gradient_in_place(
    exponentials: torch.Tensor, total: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary
) -> torch.Tensor:
    """d loss / d logits of one chunk, in the memory of its exponentials."""
    gradient = exponentials.div_(total)
    column, here = vocabulary.inside(labels)
    gradient[torch.arange(len(labels), device=labels.device), column] -= here
    return gradient


class _LinearCrossEntropy(torch.autograd.Function):
    """(hidden NH, weight VH, bias V or None, labels N) -> summed loss, scalar fp32; V is that of `vocabulary`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, vocabulary):
        wanted = any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = []
        if wanted:
            # The weight's gradient is a sum over chunks: kept in fp32, or bf16 would round it once per chunk.
            fp32 = {"dtype": torch.float32, "device": weight.device}
            gradients = [torch.empty_like(hidden), torch.zeros(weight.shape, **fp32)]
            gradients += [torch.zeros(bias.shape, **fp32)] if bias is not None else []
        for part in _chunks(len(labels), vocabulary.widest):
            h_NH = hidden[part]
            logits = torch.nn.functional.linear(h_NH, weight, bias)
            dtype = logits.dtype  # under autocast not that of the weight
            logits = logits.float()
            partial, total = _loss_and_exponentials(logits, labels[part], vocabulary)
            loss += partial
            if wanted:
                d_logits = _gradient_in_place(logits, total, labels[part], vocabulary)
                d = d_logits.to(dtype)
                gradients[0][part] = d @ weight.to(dtype)
                if dtype == torch.float32:
                    gradients[1].addmm_(d.t(), h_NH.to(dtype))
                else:
                    gradients[1] += d.t() @ h_NH.to(dtype)
                if bias is not None:
                    gradients[2] += d_logits.sum(0)
        if wanted:
            vocabulary.sum(gradients[0])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [t.dtype for t in (hidden, weight, bias) if t is not None]
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        # In place: each gradient is used once, and the weight's is as large as the weight.
        gradients = [g.mul_(d_loss).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*gradients, *[None] * (5 - len(gradients)))


class _CrossEntropy(torch.autograd.Function):
    """(logits NV, labels N) -> summed loss, scalar fp32; the gradient is kept in the logits' dtype."""

    @staticmethod
    def forward(ctx, logits, labels):
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        whole = Vocabulary(logits.shape[-1])
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for part in _chunks(len(labels), logits.shape[-1]):
            chunk = logits[part].to(torch.float32, copy=True)  # a copy also in fp32: the gradient overwrites it
            partial, total = _loss_and_exponentials(chunk, labels[part], whole)
            loss += partial
            if gradient is not None:
                gradient[part] = _gradient_in_place(chunk, total, labels[part], whole)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(d_loss), None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    vocabulary: Vocabulary | None = None,
) -> torch.Tensor:
    """Summed cross-entropy of `hidden @ weight.T + bias` against `labels`, without holding the logits.

    hidden (N, H), weight (V, H), bias (V,) or None, labels (N,) in [0, V). Returns an fp32 scalar; 0 for N = 0.
    With a `vocabulary` cut over tensor ranks, weight and bias are this rank's rows (Megatron-LM, section 3), labels
    count in the whole vocabulary, and every rank returns the whole loss.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, vocabulary or Vocabulary(len(weight)))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of logits (N, V) against labels (N,), in fp32 chunks. Returns an fp32 scalar."""
    return _CrossEntropy.apply(logits, labels)


@contextmanager
def replaced_forward(module: nn.Module, forward) -> Iterator[None]:
    """`module.forward` is `forward` inside the block; hooks (ZeRO-3 gathers weights in them) run as ever."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def head_is_last(model: PreTrainedModel, vocabulary: int, device: torch.device) -> bool:
    """Whether the model returns its head's output untouched, so that the loss may take the head's place.

    Some families scale or cap the logits afterwards (`logit_scale`, `final_logit_softcapping`, …), or add a bias of
    zeros to them (BART). Rather than a list of them: the head answers with known numbers, and with a single one in the
    place of a loss, and the model must hand just those back.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    inputs = {"input_ids": token} | ({"decoder_input_ids": token} if model.config.is_encoder_decoder else {})
    known = torch.linspace(-3.0, 3.0, vocabulary, device=device).view(1, 1, vocabulary)
    for numbers in (known, known[0, 0, 0]):
        with torch.no_grad(), replaced_forward(head, lambda hidden, n=numbers: n.to(hidden.dtype)):
            answer = model(**inputs, use_cache=False).logits
        if answer.shape != numbers.shape or not torch.equal(answer.float(), numbers.to(answer.dtype).float()):
            return False
    return True


class TokenLoss:
    """The summed cross-entropy of a model with a language-model head, at supervised positions only.

    The head becomes part of the loss where the model returns the head's output untouched.
    """

    def __init__(self, model: PreTrainedModel, fused: bool):
        """fused: take the head into the loss; else logits of all positions, as torch has it."""
        self._head = model.get_output_embeddings()
        self._fused = fused and isinstance(self._head, nn.Linear)
        device = next(model.parameters()).device
        self._head_is_last = self._fused and head_is_last(model, model.config.get_text_config().vocab_size, device)

    def __call__(
        self,
        model: Callable[..., Any],
        inputs: Mapping[str, Any],
        labels: torch.Tensor,
        picked: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of `model(**inputs)`; labels (B, W) say what follows each position, or IGNORE.

        picked: (n,) the flat places of those that are not IGNORE. None: they are looked for, for which the host waits
        until a GPU has done all that it was given.
        """
        if not self._fused:
            logits = model(**inputs).logits.float().flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
        labels, head = labels.flatten(), self._head
        places = (labels != IGNORE).nonzero()[:, 0] if picked is None else picked
        targets = labels.index_select(0, places)
        if self._head_is_last:
            vocabulary = getattr(head, "vocabulary_shard", None)

            def loss_in_head(hidden: torch.Tensor) -> torch.Tensor:
                chosen = hidden.flatten(0, -2).index_select(0, places)
                return linear_cross_entropy(chosen, head.weight, head.bias, targets, vocabulary)

            with replaced_forward(head, loss_in_head):
                return model(**inputs).logits
        logits_of = head.forward
        with replaced_forward(head, lambda hidden: logits_of(hidden.flatten(0, -2).index_select(0, places)[None])):
            return cross_entropy(model(**inputs).logits[0], targets)
