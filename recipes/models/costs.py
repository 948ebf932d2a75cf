"""What each layer of a model costs in time, for stages of equal length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from recipes.models.plans import find, head_parameters, pipeline_plan, token_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layer_costs(model: PreTrainedModel) -> tuple[list[float], float, float]:
    """(cost of each layer, of what comes before the layers, of what comes after): multiply-adds per token.

    A matrix costs its elements; of a mixture's experts, those that a token goes through. An embedding is looked up,
    which costs its width, but a head costs its whole matrix, tied or not. Where places become fewer from layer to
    layer, a token is one of the first layer's.
    """
    plan, base = pipeline_plan(model), model.base_model
    layers = base.get_submodule(plan.layers)
    assert isinstance(layers, nn.ModuleList)
    chosen = _chosen(model)

    def cost(module: nn.Module) -> float:
        return sum(p.numel() * _active_share(name, p, chosen) for name, p in module.named_parameters())

    table = token_table(model)
    if table is not None:
        before = float(table.weight.shape[-1])
    else:
        before = sum(cost(module) for path in plan.before if (module := find(base, path)) is not None)
    after = float(sum(p.numel() for p in head_parameters(model)))
    costs = [cost(layer) / plan.shrink**number for number, layer in enumerate(layers)]
    return costs, before, after / plan.shrink ** len(costs)


CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "top_k")
"""Names that families have for the number of experts a token goes through."""


def _chosen(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    return next((value for name in CHOSEN if isinstance(value := getattr(config, name, None), int)), None)


def _active_share(name: str, parameter: nn.Parameter, chosen: int | None) -> float:
    """Share of a parameter that one token multiplies with. transformers stacks experts along the first dimension."""
    if chosen is None or ".experts." not in f".{name}" or parameter.ndim < 3:
        return 1.0
    return min(1.0, chosen / parameter.shape[0])


def idle_elements(model: PreTrainedModel) -> int:
    """Elements of experts that a token does not go through."""
    chosen = _chosen(model)
    return round(sum(p.numel() * (1 - _active_share(name, p, chosen)) for name, p in model.named_parameters()))
