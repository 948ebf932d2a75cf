"""Linear regression as a model of transformers: built, saved and loaded like any other (importing this registers it).

model = AutoModelForSequenceClassification.from_config(LinearConfig(num_features=3))
model(features).logits  # (B, num_outputs)
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput


class LinearConfig(PretrainedConfig):
    """num_features: length F of an input vector. num_outputs: numbers to predict from it."""

    model_type = "linear_regression"

    num_features: int = 1
    num_outputs: int = 1


class LinearModel(PreTrainedModel):
    """y = x Wᵀ + b with W (num_outputs, F), from zero: the loss is convex, so that no start is better than another."""

    config: LinearConfig
    config_class = LinearConfig
    main_input_name = "features"
    _supports_sdpa = True  # there is no attention that could be of the wrong kind
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: LinearConfig):
        super().__init__(config)
        self.linear = nn.Linear(config.num_features, config.num_outputs)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, **ignored: object
    ) -> SequenceClassifierOutput:
        """features: (B, F). labels: (B, num_outputs), or (B,) for one output; with them `loss` is the mean square."""
        logits = self.linear(features)
        loss = None if labels is None else F.mse_loss(logits, labels.reshape(logits.shape).to(logits.dtype))
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(LinearConfig.model_type, LinearConfig, exist_ok=True)
AutoModelForSequenceClassification.register(LinearConfig, LinearModel, exist_ok=True)
