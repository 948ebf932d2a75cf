"""The load-balancing loss of a mixture's routers, the same number in every layout and for every accumulation count.

transformers adds `router_aux_loss_coef` times this to a language model's own loss when `output_router_logits` is set
(Switch Transformer, Fedus et al. 2021, eq. 4-6): with E experts of which each token takes k, over all tokens and all
layers that route, E · Σ_e f_e · P_e; f_e is how many of k choices fell on expert e per token, P_e its mean probability.

It is not linear in the tokens: transformers' number depends on which rows share a forward pass. Here a row (one
sequence, packed documents included) is what shares it: transformers' function of each row by itself, padding left out,
weighted by the row's supervised targets as everything else in the loss. Statistics of the whole global batch would need
every forward pass twice, because the gradient of the first micro-batch depends on the choices in the last one.

The choices f have no gradient. So ranks that share a sequence add up theirs and each keeps the part of the sum that is
made of its own P; and the stages of a pipeline send both sums along with the hidden states, as more positions of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recipes.models.collectives import RankGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What families call the factor of this loss, in their configurations and in their models."""


def asked_for(config: Any) -> bool:
    """Whether a configuration has this loss count."""
    return bool(getattr(config, "output_router_logits", False)) and coefficient(config) != 0


def coefficient(config: Any) -> float:
    """The factor of this loss; 0 for a family that has none."""
    return float(next((found for name in COEFFICIENTS if (found := getattr(config, name, None))), 0.0))


def listening(router: RouterLoss | None) -> AbstractContextManager[list[torch.Tensor]]:
    """`router.listening()`, or nothing heard where no router's loss counts."""
    return nullcontext([]) if router is None else router.listening()


class RouterLoss:
    """Listens to the routers of a model, whole or a pipeline's stage, and makes their loss of what they said."""

    def __init__(self, model: PreTrainedModel, ranks: RankGroup | None):
        """ranks: those that share each sequence. Made after the engine has put its own hooks on the model."""
        self.coefficient = coefficient(model.config.get_text_config())
        self._experts: int = model.num_experts  # type: ignore[assignment]
        self._chosen: int = model.num_experts_per_tok  # type: ignore[assignment]
        self._ranks = ranks
        self._said: list[torch.Tensor] | None = None
        for module, index in _routers(model):
            module.register_forward_hook(self._listener(index))

    def _listener(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # Layers that are computed again in backward find nobody who listens.
            if self._said is not None:
                said = output[index] if isinstance(output, tuple) else output
                if said is not None:
                    self._said.append(said)

        return hook

    @contextmanager
    def listening(self) -> Iterator[list[torch.Tensor]]:
        """What the routers say inside the block: logits (B·S, E), one tensor a layer."""
        said: list[torch.Tensor] = []
        self._said = said
        try:
            yield said
        finally:
            self._said = None

    def sums(self, logits: list[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
        """(B, 2, E) fp32: of each row, over its `real` (B, S) places and all layers, how often each expert was chosen,
        and its probabilities; divided by the places S of a row, padding included, so that fp16 can hold them."""
        size, width = real.shape
        mask = real.float()[..., None] / width
        total = torch.zeros(size, 2, self._experts, device=real.device)
        for layer in logits:
            # As transformers does: probabilities in the router's dtype, choices by them.
            probabilities = torch.softmax(layer.reshape(-1, self._experts), dim=-1)
            chosen = probabilities.topk(self._chosen, dim=-1).indices
            choices = torch.zeros_like(probabilities, dtype=torch.float32).scatter_(-1, chosen, 1.0)
            both = torch.stack([choices, probabilities.float()], dim=1).view(size, width, 2, self._experts)
            total = total + (both * mask[..., None]).sum(dim=1)
        return total

    def loss(self, sums: torch.Tensor, supervised: torch.Tensor) -> torch.Tensor:
        """Each row's loss times its targets, summed over the rows; a scalar in fp32, without the coefficient.

        supervised (B,): targets of each row. Both are of this rank's part of the sequence, and so is the result: the
        sum over the ranks is the whole.
        """
        choices, probabilities = sums.unbind(dim=1)
        with torch.no_grad():
            whole = torch.cat([choices, supervised[:, None].float()], dim=1)
            if self._ranks is not None:
                torch.distributed.all_reduce(whole, group=self._ranks.group)
            choices, targets = whole[:, :-1], whole[:, -1]
            # Every token of every layer chose k: their number, as divided as the sums are. A row of padding has none.
            tokens = choices.sum(dim=1) / self._chosen
            weights = torch.where(tokens > 0, targets * self._experts / tokens.clamp(min=1e-9) ** 2, 0.0)
        return (weights[:, None] * choices * probabilities).sum()

    def attach(self, hidden: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """`hidden` (B, S, H) with the sums so far as more positions behind it: what a stage sends."""
        size, _, width = hidden.shape
        flat = torch.cat(_pieces(sums.flatten(1), hidden.dtype), dim=1)
        places = self._places(hidden)
        padded = torch.nn.functional.pad(flat, (0, places * width - flat.shape[1]))
        return torch.cat([hidden, padded.view(size, places, width)], dim=1)

    def detach(self, received: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states, sums) of what the stage before sent."""
        places = self._places(received)
        hidden, behind = received[:, :-places], received[:, -places:].flatten(1)
        number = 2 * self._experts
        pieces = behind[:, : _count(received.dtype) * number].unflatten(1, (-1, number))
        return hidden, pieces.float().sum(dim=1).view(-1, 2, self._experts)

    def _places(self, hidden: torch.Tensor) -> int:
        return -(-2 * self._experts * _count(hidden.dtype) // hidden.shape[-1])


def _count(dtype: torch.dtype) -> int:
    """Numbers of a dtype that together are as good as one of fp32."""
    return 3 if dtype.itemsize < 4 else 1


def _pieces(values: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """fp32 numbers as sums of numbers of `dtype`; the first one has the gradient."""
    pieces, rest = [], values
    for _ in range(_count(dtype)):
        pieces.append(rest.to(dtype))
        rest = (rest - pieces[-1].float()).detach()
    return pieces


def _routers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, int]]:
    """(module, place of the logits in what it returns), by the family's own word (`_can_record_outputs`)."""
    known = (getattr(type(model.base_model), "_can_record_outputs", None) or {}).get("router_logits", [])
    for spec in known if isinstance(known, list) else [known]:
        target, layer = spec.target_class, spec.layer_name
        for name, module in model.named_modules():
            if isinstance(module, target) and (layer is None or f".{layer.strip('.')}." in f".{name}."):
                yield module, spec.index
