"""Tensor parallelism by the plan of the family: which parameters are cut how, and what travels where.

The modules stay those of transformers, with a new `forward` around their local matrices; a model's names do not change.
Every style of a plan is honoured or the model is refused: a style overlooked would be a gradient that is only a part.
Embedding and head are always cut along the vocabulary, which need not divide evenly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from recipes.models.collectives import RankGroup
from recipes.models.loss import Vocabulary
from recipes.models.plans import NoPlanError, tensor_plan, token_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cut:
    """How a parameter is divided over the tensor ranks: along `dim`, in each of `parts` matrices packed into one."""

    dim: int
    parts: int = 1
    whole: tuple[int, ...] = ()
    """Shape of the whole parameter."""

    def take(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """This rank's share of the whole parameter."""
        shares = [part.tensor_split(size, self.dim)[rank] for part in whole.chunk(self.parts, self.dim)]
        return torch.cat(shares, self.dim).contiguous()

    def join(self, shares: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole parameter from all ranks' shares, in order."""
        parts = [
            torch.cat(pieces, self.dim) for pieces in zip(*(s.chunk(self.parts, self.dim) for s in shares), strict=True)
        ]
        return torch.cat(parts, self.dim)

    def shapes(self, size: int) -> list[tuple[int, ...]]:
        """Shapes of all ranks' shares."""
        small, more = divmod(self.whole[self.dim] // self.parts, size)
        widths = [self.parts * (small + (rank < more)) for rank in range(size)]
        return [(*self.whole[: self.dim], width, *self.whole[self.dim + 1 :]) for width in widths]


Style = Callable[[nn.Module, RankGroup], dict[str, Cut]]
"""Gives a module its parallel forward and returns the cuts of its own parameters."""


def _widths(module: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, which GPT-2 calls Conv1D and stores the other way round."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    raise NoPlanError(f"{type(module).__name__} is not a linear layer")


def _columns(module: nn.Module, parts: int = 1) -> dict[str, Cut]:
    dim = 1 if isinstance(module, Conv1D) else 0
    return {"weight": Cut(dim, parts), **({"bias": Cut(0, parts)} if getattr(module, "bias", None) is not None else {})}


def _matmul(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ module.weight if isinstance(module, Conv1D) else F.linear(x, module.weight)


def _biased(module: Any, out: torch.Tensor) -> torch.Tensor:
    return out if module.bias is None else out + module.bias


def _colwise(module: Any, ranks: RankGroup, parts: int = 1, gather: bool = False) -> dict[str, Cut]:
    _, width = _widths(module)
    if isinstance(module, Conv1D):

        def product(x: torch.Tensor) -> torch.Tensor:
            return _biased(module, _matmul(module, x))
    else:
        product = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = product(ranks.copy(x))
        return ranks.gather(out, width) if gather else out

    module.forward = forward
    return _columns(module, parts)


def _packed_colwise(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
    return _colwise(module, ranks, parts=2)


def _fused_qkv(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
    return _colwise(module, ranks, parts=3)


def _colwise_gathered(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
    return _colwise(module, ranks, gather=True)


def _rowwise(module: Any, ranks: RankGroup, take: Callable = lambda x: x) -> dict[str, Cut]:
    _widths(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return _biased(module, ranks.sum(_matmul(module, take(x))))

    module.forward = forward
    return {"weight": Cut(0 if isinstance(module, Conv1D) else 1)}


def _divide(attributes: Sequence[str]) -> Style:
    def divide(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
        for name in attributes:
            setattr(module, name, getattr(module, name) // ranks.size)
        return {}

    return divide


def _rowwise_split_input(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
    return _rowwise(module, ranks, ranks.split)


def _partial_gradient(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
    """A whole parameter that sees only this rank's heads: its gradient is a part, and summed."""
    before, own = module.forward, dict(module.named_parameters(recurse=False))

    def forward(*args: Any, **kwargs: Any) -> Any:
        # A hook on the parameter would miss it after the engine has replaced it; the copy's gradient is the sum.
        held = {name: getattr(module, name) for name in own}
        for name, parameter in held.items():
            del module._parameters[name]
            setattr(module, name, ranks.shared(parameter))
        try:
            return before(*args, **kwargs)
        finally:
            for name, parameter in held.items():
                delattr(module, name)
                module._parameters[name] = parameter

    module.forward = forward
    return {}


def _experts(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
    """All experts on every rank, each expert's matrices cut: what goes in is copied, what comes out summed."""
    before = module.forward

    def forward(hidden: torch.Tensor, *routing: Any, **kwargs: Any) -> torch.Tensor:
        if len(routing) >= 2:
            index, weights, *more = routing
            routing = (index, ranks.copy(weights), *more)
        return ranks.sum(before(ranks.copy(hidden), *routing, **kwargs))

    module.forward = forward
    return {}


def _identity_expert(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
    before = module.forward
    module.forward = lambda x, *args, **kwargs: before(x / ranks.size, *args, **kwargs)
    return {}


def _latent_keys(module: Any, ranks: RankGroup) -> dict[str, Cut]:
    """Multi-head latent attention (DeepSeek-V2): the rotary part of the output goes to each rank's heads uncut, so that
    its gradient is a part; the rest goes through a column-parallel layer, which sums it."""
    before, rotary = module.forward, module.config.qk_rope_head_dim

    def forward(x: torch.Tensor) -> torch.Tensor:
        latent, rope = before(x).tensor_split([-rotary], dim=-1)
        return torch.cat([latent, ranks.copy(rope)], dim=-1)

    module.forward = forward
    return {}


def _all_reduce(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
    before = module.forward
    module.forward = lambda *args, **kwargs: ranks.sum(before(*args, **kwargs))
    return {}


def _nothing(module: nn.Module, ranks: RankGroup) -> dict[str, Cut]:
    return {}


MODULE_STYLES: dict[str, Style] = {
    "colwise": _colwise,
    "packed_colwise": _packed_colwise,
    "fused_qkv": _fused_qkv,
    "colwise_gather_output": _colwise_gathered,
    "colwise_rep": _colwise_gathered,
    "rowwise": _rowwise,
    "rowwise_split_input": _rowwise_split_input,
    "rowwise_rep": _rowwise_split_input,
    "replicated_with_grad_allreduce": _partial_gradient,
    "moe_tp_experts": _experts,
    "moe_identity_expert": _identity_expert,
    "mla_kv_a_proj": _latent_keys,
    "all_reduce": _all_reduce,
    "local_params": _nothing,
    "replicate": _nothing,
}
"""Styles of transformers/distributed/tensor_parallel.py (5.23) on a module."""
PACKED = {"packed_colwise": 2, "fused_qkv": 3}
COLUMNS = ("colwise", "packed_colwise", "fused_qkv", "colwise_gather_output", "colwise_rep")
ROWS = ("rowwise", "rowwise_split_input", "rowwise_rep")
PARAMETER_STYLES: dict[str, Callable[[nn.Parameter], Cut | None]] = {
    "colwise": lambda p: Cut(max(0, p.ndim - 2)),
    "packed_colwise": lambda p: Cut(max(0, p.ndim - 2), parts=2),
    "rowwise": lambda p: Cut(p.ndim - 1) if p.ndim > 1 else None,
    "packed_rowwise": lambda p: Cut(p.ndim - 1, parts=2) if p.ndim > 1 else None,
    "replicate": lambda p: None,
}
"""The same on a bare parameter, the experts' stacked matrices above all: the module around it has its own entry."""


def _embedding(module: Any, ranks: RankGroup) -> dict[str, Cut]:
    """Each rank looks up the tokens that it has rows for; the rest are zero, and the sum is the whole."""
    before, rows = module.forward, ranks.part(module.num_embeddings)
    if module.padding_idx is not None:
        inside = rows.start <= module.padding_idx < rows.stop
        module.padding_idx = module.padding_idx - rows.start if inside else None

    def forward(ids: torch.Tensor) -> torch.Tensor:
        outside = (ids < rows.start) | (ids >= rows.stop)
        found = before((ids - rows.start).masked_fill(outside, 0))
        return ranks.sum(found.masked_fill(outside[..., None], 0.0))

    module.forward = forward
    return {"weight": Cut(0)}


def shard(model: PreTrainedModel, ranks: RankGroup) -> None:
    """Make `model` (on the meta device, possibly a pipeline stage) tensor-parallel in place.

    Divided parameters get a mark (`tensor_cut`) and stay whole: whoever fills them takes their shares (`take_shares`).
    `check` has said that it can be done.
    """
    plan = tensor_plan(model)
    table, head = token_table(model), model.get_output_embeddings()
    cuts: dict[str, Cut] = {}
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for name, module in modules.items():
        if module is table or module is head:
            continue
        style = plan.get(_generic(name))
        if style == "mla_kv_a_proj":
            module.__dict__["config"] = model.config.get_text_config()  # as transformers does
        # A stage has no parameters where other stages have layers.
        if style == "moe_identity_expert" or (style and next(module.parameters(), None) is not None):
            cuts |= {f"{name}.{own}": cut for own, cut in _styled(MODULE_STYLES, style, name)(module, ranks).items()}
    for name, parameter in parameters.items():
        if (style := plan.get(_generic(name))) is not None:
            cut = _styled(PARAMETER_STYLES, style, name)(parameter)
            if cut is not None:
                cuts[name] = cut
    if table is not None:
        if "forward" not in vars(table):  # else a tied last stage's: it only owns the weight
            _embedding(table, ranks)
        cuts[f"{_name(modules, table)}.weight"] = Cut(0)
    if isinstance(head, nn.Linear):
        cuts |= {f"{_name(modules, head)}.{own}": cut for own, cut in _colwise_gathered(head, ranks).items()}
        vars(head)["vocabulary_shard"] = Vocabulary(head.out_features, ranks)
    for name, cut in cuts.items():
        marks = vars(parameters[name])
        marks["tensor_cut"] = replace(cut, whole=tuple(parameters[name].shape))
        # The engine counts a parameter with this mark on every tensor rank in the gradient norm, others once.
        marks["tensor_model_parallel"] = True


def _name(modules: dict[str, nn.Module], wanted: nn.Module) -> str:
    return next(name for name, module in modules.items() if module is wanted)


def _generic(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _styled(styles: dict[str, Any], style: str, name: str) -> Any:
    if style.startswith("divide:"):
        return _divide(style.removeprefix("divide:").split(","))
    try:
        return styles[style]
    except KeyError:
        raise NoPlanError(f"{name} is cut by `{style}`, which is not supported") from None


def take_shares(parameters: Sequence[nn.Parameter], ranks: RankGroup) -> None:
    """Replace whole values by this rank's shares, in place; parameters without a cut stay whole."""
    for parameter in parameters:
        cut: Cut | None = getattr(parameter, "tensor_cut", None)
        if cut is not None:
            with torch.no_grad():
                parameter.data = cut.take(parameter.data, ranks.rank, ranks.size).clone()


def join(parameter: torch.Tensor, share: torch.Tensor, ranks: RankGroup | None) -> torch.Tensor:
    """The whole of a parameter, or of something with its shape, from this rank's share; a collective call."""
    cut: Cut | None = getattr(parameter, "tensor_cut", None)
    if cut is None or ranks is None:
        return share
    shapes = cut.shapes(ranks.size)
    longest = max(shape[cut.dim] for shape in shapes)
    padding = [0, 0] * (share.ndim - 1 - cut.dim) + [0, longest - share.shape[cut.dim]]
    padded = F.pad(share, padding).contiguous()
    shares = [torch.empty_like(padded) for _ in shapes]
    torch.distributed.all_gather(shares, padded, group=ranks.group)
    return cut.join([part.narrow(cut.dim, 0, shape[cut.dim]) for part, shape in zip(shares, shapes, strict=True)])


def check(model: PreTrainedModel, size: int) -> None:
    """NoPlanError unless the family has a plan whose styles are known, and heads and every divided dimension (the
    vocabulary excepted) are multiples of `size`."""
    plan = tensor_plan(model)
    config = model.config.get_text_config()
    if any(style in ("colwise", "fused_qkv") and re.search(r"attn|attention", name) for name, style in plan.items()):
        for key, what in (("num_attention_heads", "attention heads"), ("num_key_value_heads", "key-value heads")):
            heads = getattr(config, key, None)
            if isinstance(heads, int) and heads % size:
                raise NoPlanError(f"{heads} {what} cannot be divided over {size} tensor ranks")
    edges = {id(edge) for edge in (token_table(model), model.get_output_embeddings()) if edge is not None}
    for name, module in model.named_modules():
        style = plan.get(_generic(name))
        if id(module) in edges or style is None:
            continue
        _styled(MODULE_STYLES, style, name)
        if style in COLUMNS + ROWS:
            width = _widths(module)[style in COLUMNS]
            if width % (size * PACKED.get(style, 1)):
                raise NoPlanError(f"{name}: a width of {width} cannot be divided over {size} tensor ranks")
    for name, parameter in model.named_parameters():
        if (style := plan.get(_generic(name))) is not None:
            cut = _styled(PARAMETER_STYLES, style, name)(parameter)
            if cut is not None and parameter.shape[cut.dim] % (size * cut.parts):
                width = parameter.shape[cut.dim]
                raise NoPlanError(f"{name}: a width of {width} cannot be divided over {size} tensor ranks")
