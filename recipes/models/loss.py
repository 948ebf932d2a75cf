"""Cross-entropy that never holds all logits: in chunks, over supervised positions only.

The head and the loss of a causal model are one function here. For N supervised positions and a vocabulary of V, the plain
way keeps N×V logits, their fp32 copy and their gradient; this keeps one chunk at a time and computes the gradient while
the chunk is at hand (the softmax minus one-hot, Bishop 2006, eq. 4.109), as "Cut Your Losses" (Wijmans et al. 2024) and
Liger (Hsu et al. 2024) do on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

IGNORE = -100
CHUNK_ELEMENTS = 2**22
"""Logits at hand at once (elements): 16 MiB in fp32, enough to keep a matrix product busy."""


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


def _loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool) -> tuple[torch.Tensor, ...]:
    """Summed loss of one chunk and, where wanted, d loss / d logits in fp32 (in the memory of the fp32 logits)."""
    logits = logits.float()
    log_norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    picked = logits.gather(-1, labels[:, None])
    loss = (log_norm - picked).sum()
    if not wants_gradient:
        return loss, None
    gradient = logits.sub_(log_norm).exp_() if logits.is_floating_point() else logits
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return loss, gradient


class _LinearCrossEntropy(torch.autograd.Function):
    """(hidden NH, weight VH, bias V or None, labels N) -> summed loss, scalar fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        wants = any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # The weight's gradient is a sum over chunks: kept in fp32, or bf16 would round it once per chunk.
        d_hidden = torch.empty_like(hidden) if wants else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants else None
        d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if wants and bias is not None else None
        for part in _chunks(len(labels), len(weight)):
            h_NH = hidden[part]
            logits = torch.nn.functional.linear(h_NH, weight, bias)
            partial, d_logits = _loss_and_gradient(logits, labels[part], wants)
            loss += partial
            if wants:
                d = d_logits.to(logits.dtype)
                d_hidden[part] = d @ weight.to(logits.dtype)
                if d_weight.dtype == logits.dtype:
                    d_weight.addmm_(d.t(), h_NH)
                else:
                    d_weight += d.t() @ h_NH.to(logits.dtype)
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            d_hidden * d_loss.to(d_hidden.dtype),
            (d_weight * d_loss).to(weight_dtype),
            None if d_bias is None else (d_bias * d_loss).to(bias_dtype),
            None,
        )


class _CrossEntropy(torch.autograd.Function):
    """(logits NV, labels N) -> summed loss, scalar fp32; the gradient is kept in the logits' dtype."""

    @staticmethod
    def forward(ctx, logits, labels):
        wants = ctx.needs_input_grad[0]
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits) if wants else None
        for part in _chunks(len(labels), logits.shape[-1]):
            # `_loss_and_gradient` writes into its fp32 input: give it a chunk of its own.
            partial, d_logits = _loss_and_gradient(logits[part].to(torch.float32, copy=True), labels[part], wants)
            loss += partial
            if wants:
                gradient[part] = d_logits
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss.to(gradient.dtype), None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Summed cross-entropy of `hidden @ weight.T + bias` against `labels`, without holding the logits.

    hidden (N, H), weight (V, H), bias (V,) or None, labels (N,) in [0, V). Returns an fp32 scalar; 0 for N = 0.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels)


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


def head_is_last(model: nn.Module, vocabulary: int, device: torch.device) -> bool:
    """Whether the model returns its head's output untouched, so that the loss may take the head's place.

    Some families scale or cap the logits afterwards (`logit_scale`, `final_logit_softcapping`, …). Rather than a list of
    them: the head answers with known numbers, and the model must hand just those back.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    known = torch.linspace(-3.0, 3.0, vocabulary, device=device).view(1, 1, vocabulary)
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.no_grad(), replaced_forward(head, lambda hidden: known.to(hidden.dtype)):
        answer = model(input_ids=token, use_cache=False).logits
    return answer.shape == known.shape and torch.equal(answer.float(), known.to(answer.dtype).float())
