"""Which tokens see which: measured on the model itself, not taken from a list of families."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from conf.errors import Problem

TOLERANCE = 1e-3
"""Relative to the size of the hidden states: two runs of one shape differ by kernels that are not deterministic."""

OF_HALVES = 0.05
"""The same in 16 bits, where the kernels of other shapes round otherwise."""
OF_APPROXIMATIONS = 0.05
"""Of outputs in families that approximate attention (YOSO: 0.04); FNet, which has no mask, is at 0.07 and more."""


def check_causal(model: PreTrainedModel, device: torch.device) -> list[Problem]:
    """A model that is to predict the next token must not see it.

    When the last of four tokens changes, the hidden states of those before it must not move. Those of an encoder do
    (BERT without `is_decoder`), and its loss falls to nothing, having learnt to copy.
    """
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False)[0].float()
    if problems := _not_finite(model, hidden):
        return problems
    if _alike(*hidden[:, :3]):
        return []
    rule = "this model lets tokens see those that follow, which it is to predict"
    nearest = "a decoder" + (", or model.config.is_decoder=true" if hasattr(model.config, "is_decoder") else "")
    return [Problem("model", model.config.model_type, rule, nearest)]


def check_padding(model: PreTrainedModel, device: torch.device) -> list[Problem]:
    """A model that generates in batches must not see what is padded on the left.

    The token after a prompt has the same logits with and without it; not in a recurrent family that takes padding into
    its state (RWKV), whose texts would depend on what stands beside them in the batch.
    """
    ids = torch.tensor([[1, 2, 3, 4]], device=device)
    padded, mask = (torch.nn.functional.pad(part, (3, 0)) for part in (ids, torch.ones_like(ids)))
    options: dict[str, Any] = {
        "max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    generate: Any = model.generate
    with torch.no_grad():
        alone = generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits[0].float()
        beside = generate(input_ids=padded, attention_mask=mask, **options).logits[0].float()
    if problems := _not_finite(model, alone):
        return problems
    tolerance = TOLERANCE if model.dtype == torch.float32 else OF_HALVES
    if bool((alone - beside).abs().max() <= tolerance * alone.abs().max()):
        return []
    rule = "this model sees the padding before a prompt: what it writes depends on the batch"
    return [Problem("model", model.config.model_type, rule, "a decoder with attention, or task=causal_lm")]


def check_right_padding(model: PreTrainedModel, alone: torch.Tensor, beside: torch.Tensor) -> list[Problem]:
    """What a model says of a row must not depend on the padding behind it.

    It does in a family that mixes tokens without a mask (FNet), or that reads its answer from the last place (XLNet):
    answers would depend on what stands beside a row in the batch.
    alone, beside: outputs for one row, (1, …) or (1, T, …), and for the same with more padding. Not asked in 16 bits:
    rounding may be as large there as what a new head says.
    """
    if model.dtype != torch.float32:
        return []
    if problems := _not_finite(model, alone):
        return problems
    if alone.shape != beside.shape:  # an output for each token
        beside = beside[:, : alone.shape[1]]
    if bool((alone - beside).abs().max() <= OF_APPROXIMATIONS * alone.abs().max()):
        return []
    rule = "what this model says of a row depends on the padding behind it, and so on the batch"
    return [Problem("model", model.config.model_type, rule, "a family that has a mask for padding")]


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


def _not_finite(model: PreTrainedModel, outputs: torch.Tensor) -> list[Problem]:
    """What is compared with a number that is none is never alike, which says nothing of who sees what.

    Of buffers, too: running means are learnt.
    """
    if bool(outputs.isfinite().all()):
        return []
    learnt = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    names = [name for name, value in learnt.items() if not bool(value.isfinite().all())]
    rule = f"its weights are not finite: {', '.join(names[:3]) or 'its outputs'}"
    return [Problem("model", model.config.model_type, rule, "weights of a training that went well")]


def _alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() <= TOLERANCE * first.abs().max())
