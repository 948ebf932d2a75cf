"""Which tokens see which: measured on the model itself, not taken from a list of families."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from conf.errors import Problem

TOLERANCE = 1e-3
"""Relative to the size of the hidden states: two runs of one shape differ by kernels that are not deterministic."""


def check_causal(model: PreTrainedModel, device: torch.device) -> list[Problem]:
    """A model that is to predict the next token must not see it.

    When the last of four tokens changes, the hidden states of those before it must not move. Those of an encoder do
    (BERT without `is_decoder`), and its loss falls to nothing, having learnt to copy.
    """
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False)[0].float()
    if _alike(*hidden[:, :3]):
        return []
    rule = "this model lets tokens see those that follow, which it is to predict"
    nearest = "a decoder" + (", or model.config.is_decoder=true" if hasattr(model.config, "is_decoder") else "")
    return [Problem("model", model.config.model_type, rule, nearest)]


def keeps_documents_apart(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the second of two packed documents is blind to the first.

    Two documents of four tokens share a sequence, positions restarting. When the first document's tokens change, the
    hidden states of the second must not move. A recurrent family, or one that ignores position_ids in its mask, moves
    them.
    """
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 5, 6, 7, 8]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device).repeat(2, 1)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0].float()
    return _alike(*hidden[:, 4:])


def _alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() <= TOLERANCE * first.abs().max())
