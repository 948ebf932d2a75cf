"""What each layer of a model costs in time, for stages of equal length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from recipes.models.plans import pipeline_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layer_costs(model: PreTrainedModel) -> tuple[list[float], float, float]:
    """(cost of each layer, of what comes before the layers, of what comes after): multiply-adds per token.

    A matrix costs its elements; of a mixture's experts, those that a token goes through. An embedding is looked up,
    which costs its width, but a head costs its whole matrix, tied or not.
    """
    plan, base = pipeline_plan(model), model.base_model
    layers = base.get_submodule(plan.layers)
    assert isinstance(layers, nn.ModuleList)
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0

    def cost(module: nn.Module) -> float:
        total = 0.0
        for name, parameter in module.named_parameters():
            active = share if ".experts." in f".{name}" else 1.0
            total += parameter.numel() * active
        return total

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = float(next(table.parameters()).shape[-1])
    after = float(sum(p.numel() for p in head.parameters())) if head is not None else 0.0
    return [cost(layer) for layer in layers], before, after
