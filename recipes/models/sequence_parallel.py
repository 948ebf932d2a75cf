"""Sequence parallelism: each rank has a part of every sequence, and attention exchanges parts of it for heads.

DeepSpeed-Ulysses (Jacobs et al. 2023). An all-to-all before attention gives each rank whole sequences of some heads,
another one after it gives back its part with all heads. Masks are made from the whole sequence's positions, so packed
documents do not see each other (DeepSpeed 0.19.8's own UlyssesSPAttentionHF drops masks under SDPA).
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from recipes.models.collectives import RankGroup
from recipes.models.plans import NoPlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "recipes_ulysses_"
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers in which only attention looks along the sequence."""


class SequenceParallel:
    """Makes a model's attention sequence-parallel in place and cuts its batches. One per model and group of ranks."""

    def __init__(self, model: PreTrainedModel, ranks: RankGroup):
        self._ranks, self._dtype = ranks, model.dtype
        config = model.config.get_text_config()
        inner = config._attn_implementation
        # Masks are made as for the attention inside, over whole sequences.
        self._mask_config = copy.copy(config)
        name = f"{NAME}{inner}_{id(ranks)}"
        AttentionInterface.register(name, _attention(inner, ranks))
        # The model's own masks would be of its part of the sequence; None is plainly causal.
        AttentionMaskInterface.register(name, lambda *_, **__: None)
        config._attn_implementation = model.config._attn_implementation = name

    def split(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of a micro-batch (B, S): S/ranks columns of everything, the mask of the whole sequence."""
        ids = batch["input_ids"]
        length = ids.shape[1]
        if length % self._ranks.size:
            raise ValueError(f"{length} tokens cannot be divided over {self._ranks.size} sequence ranks")
        positions = batch.get("position_ids")
        mask = self._mask(ids, positions) if positions is not None or self._windowed else None
        whole = {"position_ids": torch.arange(length, device=ids.device).expand_as(ids), **batch}
        part = self._ranks.part(length)
        own = {name: tensor[:, part].contiguous() for name, tensor in whole.items()}
        return own if mask is None else {**own, "attention_mask": mask}

    @property
    def _windowed(self) -> bool:
        config = self._mask_config
        return bool(getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None))

    def _mask(self, ids: torch.Tensor, positions: torch.Tensor | None) -> Any:
        """What transformers makes of the whole sequence: (B, 1, S, S), or one by kind of layer, or None."""
        from transformers.masking_utils import create_masks_for_generate

        shape = torch.empty(*ids.shape, 1, device=ids.device, dtype=self._dtype)
        return create_masks_for_generate(self._mask_config, shape, None, None, position_ids=positions)


def check(model: PreTrainedModel, tensor: int, size: int) -> None:
    """NoPlanError for a model that reads along sequences elsewhere than in attention, or whose heads do not divide."""
    config = model.config.get_text_config()
    kind = config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        raise NoPlanError(f"the attention of {kind} cannot be replaced: no sequence parallelism")
    other = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if other:
        raise NoPlanError(
            f"{kind} has {', '.join(sorted(other))} layers, which read along the sequence in their own way"
        )
    if config._attn_implementation == "eager":
        raise NoPlanError(f"the eager attention of {kind} cannot be wrapped: sequence parallelism needs sdpa")
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    if heads % (tensor * size) or heads // tensor % math.lcm(max(1, keys // tensor), size):
        over = f"{size} sequence ranks" + (f" × {tensor} tensor ranks" if tensor > 1 else "")
        raise NoPlanError(f"{heads} heads over {keys} key-value heads cannot be divided over {over}")


def _attention(inner: str, ranks: RankGroup) -> Any:
    """Attention over whole sequences of this rank's heads. query (B, N, S/r, D) -> out (B, S/r, N, D)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        heads = key.shape[1]
        # Fewer key-value heads than ranks: each rank gets a copy of the one that its query heads belong to.
        copies = math.lcm(heads, ranks.size) // heads
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        query, key, value = (ranks.exchange(x, scatter=1, gather=2) for x in (query, key, value))
        as_seen = SimpleNamespace(
            num_key_value_groups=query.shape[1] // key.shape[1],
            is_causal=getattr(module, "is_causal", True),
            training=module.training,
            layer_idx=getattr(module, "layer_idx", None),
            config=getattr(module, "config", None),
        )
        out, _ = ALL_ATTENTION_FUNCTIONS[inner](as_seen, query, key, value, attention_mask, **kwargs)
        return ranks.exchange(out, scatter=1, gather=2), None

    return attend
