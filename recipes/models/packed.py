"""Whether a model keeps packed documents apart: measured on the model itself, not taken from a list of families."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def keeps_documents_apart(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the second of two packed documents is blind to the first.

    Two documents of four tokens share a sequence, positions restarting. When the first document's tokens change, the
    hidden states of the second must not move. A recurrent family, or one that ignores position_ids in its mask, moves
    them. The comparison is between two runs of one shape, so it is exact but for kernels that are not deterministic;
    the tolerance is relative to the size of the states.
    """
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 5, 6, 7, 8]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device).repeat(2, 1)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0].float()
    first, second = hidden[:, 4:]
    return bool((first - second).abs().max() <= 1e-3 * first.abs().max())
