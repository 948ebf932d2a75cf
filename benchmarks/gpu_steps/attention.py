"""torch's attention over documents of any lengths (torch.nn.attention.varlen), offered to transformers for step d."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

NAME = "varlen"


def register() -> None:
    """As the attention `varlen`; raises ImportError where this torch has none."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    attend = _of_device()
    known: dict[str, Any] = {}

    def forward(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, scaling: float | None = None, position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """query (B, heads, T, D), key and value (B, key-value heads, T, D) → (B, T, heads, D)."""
        batch, heads, length, _size = query.shape
        if known.get("for") is not position_ids or position_ids is None:  # once for all layers
            known.update({"for": position_ids, "bounds": _bounds(position_ids, batch, length, query.device)})
        bounds, longest = known["bounds"]
        repeats = heads // key.shape[1]
        # All heads, as backends differ in whether they take fewer of keys and values.
        parts = [query, *(part.repeat_interleave(repeats, dim=1) for part in (key, value))]
        flat = [part.transpose(1, 2).reshape(batch * length, heads, -1) for part in parts]
        return attend(*flat, bounds, longest, scaling).view(batch, length, heads, -1), None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def _bounds(positions: torch.Tensor | None, batch: int, length: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """((documents + 1,) int32 where each begins in the flattened batch, and the end; the longest)."""
    if positions is None:
        positions = torch.arange(length, device=device)[None]
    starts = (positions.expand(batch, length).flatten() == 0).nonzero()[:, 0]
    bounds = torch.cat([starts, starts.new_tensor([batch * length])]).to(torch.int32)
    return bounds, int(bounds.diff().max())


def _of_device() -> Any:
    """(query, key, value (tokens, heads, D), bounds, longest, scale) → (tokens, heads, D), causal."""
    if not torch.cuda.is_available():
        return _each_document  # there is none on a CPU; the way to it is the same
    from torch.nn.attention.varlen import varlen_attn

    options = inspect.signature(varlen_attn).parameters
    # torch 2.13 has causal attention as a window, versions before it as a flag.
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in options else {"window_size": (-1, 0)}

    def attend(query: Any, key: Any, value: Any, bounds: Any, longest: int, scale: float | None) -> torch.Tensor:
        more = {"scale": scale} if "scale" in options and scale is not None else {}
        out = varlen_attn(query, key, value, bounds, bounds, longest, longest, **causal, **more)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _each_document(query: Any, key: Any, value: Any, bounds: Any, longest: int, scale: float | None) -> torch.Tensor:
    ends = bounds.tolist()
    found = []
    for begin, end in pairwise(ends):
        parts = [part[begin:end].transpose(0, 1)[None] for part in (query, key, value)]
        found.append(F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale)[0].transpose(0, 1))
    return torch.cat(found)
