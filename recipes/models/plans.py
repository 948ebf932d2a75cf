"""Which modules of a family go to which pipeline stage, and how its matrices are cut for tensor parallelism.

Both come from transformers: `base_model_pp_plan` and `base_model_tp_plan` of a model's configuration. A family without
one is a row of data here. Paths are relative to the base model (`model.base_model`), `*` stands for a layer's number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NoPlanError(ValueError):
    """A model cannot be divided as asked; the message says why."""


@dataclass(frozen=True)
class PipelinePlan:
    """Modules with a place in the pipeline, in the order of the forward pass."""

    before: tuple[str, ...]
    """On the first stage: embeddings and what follows them."""
    layers: str
    """The list of layers that is divided."""
    after: tuple[str, ...]
    """On the last stage: the last norm; the head, outside the base model, is there anyway."""
    pair: bool = False
    """A layer returns its hidden states and attention weights, not the former alone."""
    shrink: int = 1
    """Each layer has that many times fewer places to compute (pixels) than the one before."""


PIPELINE_PLANS: dict[str, PipelinePlan] = {
    **dict.fromkeys(
        (
            "bitnet", "diffllama", "granitemoe", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe",
            "nemotron", "olmoe", "phimoe", "stablelm",
        ),
        PipelinePlan(("embed_tokens",), "layers", ("norm",)),
    ),
    "persimmon": PipelinePlan(("embed_tokens",), "layers", ("final_layernorm",)),
    "gpt2": PipelinePlan(("wte", "wpe", "drop"), "h", ("ln_f",)),
    "gpt_bigcode": PipelinePlan(("wte", "wpe", "drop"), "h", ("ln_f",)),
    "gpt_neo": PipelinePlan(("wte", "wpe", "drop"), "h", ("ln_f",), pair=True),
    "gptj": PipelinePlan(("wte", "drop"), "h", ("ln_f",), pair=True),
    "codegen": PipelinePlan(("wte", "drop"), "h", ("ln_f",), pair=True),
    "bloom": PipelinePlan(("word_embeddings", "word_embeddings_layernorm"), "h", ("ln_f",), pair=True),
    "falcon": PipelinePlan(("word_embeddings",), "h", ("ln_f",), pair=True),
    "mpt": PipelinePlan(("wte",), "blocks", ("norm_f",), pair=True),
    "gpt_neox_japanese": PipelinePlan(("embed_in",), "layers", ("final_layer_norm",), pair=True),
    "opt": PipelinePlan(
        ("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"),
        "decoder.layers",
        ("decoder.final_layer_norm", "decoder.project_out"),
    ),
    "biogpt": PipelinePlan(("embed_tokens", "embed_positions"), "layers", ("layer_norm",)),
    "xglm": PipelinePlan(("embed_tokens", "embed_positions"), "layers", ("layer_norm",)),
    **dict.fromkeys(
        ("bert", "camembert", "electra", "roberta", "xlm-roberta"),
        PipelinePlan(("embeddings", "embeddings_project"), "encoder.layer", ("pooler",)),
    ),
    "distilbert": PipelinePlan(("embeddings",), "transformer.layer", ()),
    "modernbert": PipelinePlan(("embeddings",), "layers", ("final_norm",)),
    "vit": PipelinePlan(("embeddings",), "layers", ("layernorm", "pooler")),
    "convnext": PipelinePlan(("embeddings",), "encoder.stages", ("layernorm",), shrink=4),
    "bit": PipelinePlan(("embedder",), "encoder.stages", ("norm",), shrink=4),
}  # fmt: skip
"""Families that transformers 5.23 ships no pipeline plan for, by `model_type`."""

UNCUT: dict[str, str] = {
    "albert": "all its layers are one",
    **dict.fromkeys(("deberta", "deberta-v2", "mpnet"), "all its layers read one table of relative positions"),
}
"""Families that stages cannot be made of, and why: what every stage would need would have a part of its gradient
on each."""

_BERT = {
    **{f"encoder.layer.*.attention.self.{name}": "colwise" for name in ("query", "key", "value")},
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
_ALBERT = "encoder.albert_layer_groups.*.albert_layers.*"

TENSOR_PLANS: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn": "divide:split_size",
        "h.*.attn.c_attn": "fused_qkv",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), _BERT),
    "distilbert": {
        **{f"transformer.layer.*.attention.{name}_lin": "colwise" for name in "qkv"},
        "transformer.layer.*.attention.out_lin": "rowwise",
        "transformer.layer.*.ffn.lin1": "colwise",
        "transformer.layer.*.ffn.lin2": "rowwise",
    },
    "modernbert": {
        "layers.*.attn.Wqkv": "fused_qkv",
        "layers.*.attn.Wo": "rowwise",
        "layers.*.mlp.Wi": "packed_colwise",
        "layers.*.mlp.Wo": "rowwise",
    },
    "deberta": {
        **{name: style for name, style in _BERT.items() if ".self." not in name},
        "encoder.layer.*.attention.self": "divide:num_attention_heads,all_head_size",
        # Query, key and value of one head lie together: a plain cut leaves whole heads.
        **{f"encoder.layer.*.attention.self.{name}": "colwise" for name in ("in_proj", "pos_proj", "pos_q_proj")},
        **{f"encoder.layer.*.attention.self.{name}": "colwise" for name in ("q_bias", "v_bias")},
        # Talking heads: matrices over all heads. No such style, so that a model with them is refused.
        **{f"encoder.layer.*.attention.self.head_{name}_proj": "mixed_heads" for name in ("logits", "weights")},
    },
    "deberta-v2": {
        **{name: style for name, style in _BERT.items() if ".self." not in name},
        "encoder.layer.*.attention.self": "divide:num_attention_heads,all_head_size",
        **{
            f"encoder.layer.*.attention.self.{name}_proj": "colwise"
            for name in ("query", "key", "value", "pos_key", "pos_query")
        },
    },
    "albert": {
        **{f"{_ALBERT}.attention.{name}": "colwise" for name in ("query", "key", "value")},
        f"{_ALBERT}.attention.dense": "rowwise",
        f"{_ALBERT}.ffn": "colwise",
        f"{_ALBERT}.ffn_output": "rowwise",
    },
    "mpnet": {
        "encoder.layer.*.attention.attn": "divide:num_attention_heads,all_head_size",
        **{f"encoder.layer.*.attention.attn.{name}": "colwise" for name in "qkv"},
        "encoder.layer.*.attention.attn.o": "rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
        "encoder.relative_attention_bias.weight": "rowwise",  # (buckets, heads)
    },
    "vit": {
        **{f"layers.*.attention.{name}_proj": "colwise" for name in "qkv"},
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    },
    "convnext": {
        "encoder.stages.*.layers.*.pwconv1": "colwise",
        "encoder.stages.*.layers.*.pwconv2": "rowwise",
    },
}
"""Families that transformers 5.23 ships no tensor plan for, by `model_type`: module or parameter → style.

Beside transformers' styles: `fused_qkv`, three matrices of equal width in one, and `divide:NAME,NAME`, attributes of
the module that count what is divided."""


TENSOR_ADDITIONS: dict[str, dict[str, str]] = {
    # The activation's own two numbers see this rank's columns only; transformers 5.23 has them as replicated.
    "apertus": {"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"},
}
"""What is missing in a plan of transformers 5.23, found by comparing gradients."""


def pipeline_plan(model: PreTrainedModel) -> PipelinePlan:
    """The pipeline plan of a model, checked against its modules.

    Raises NoPlanError for a family without one, or whose parameters are not all in it: what stands beside the layers
    would be on every stage, and its gradient on each only a part. What stands beside the base model is the head.
    """
    config = model.config.get_text_config()
    if why := UNCUT.get(config.model_type):
        raise NoPlanError(f"{config.model_type} cannot be cut into stages: {why}")
    plan = PIPELINE_PLANS.get(config.model_type)
    if plan is None:
        named = getattr(config, "base_model_pp_plan", None)
        if not named:
            raise NoPlanError(f"transformers has no pipeline plan for {config.model_type}")
        names = list(named)
        lists = [name for name in names if isinstance(find(model.base_model, name), nn.ModuleList)]
        if len(lists) != 1:
            raise NoPlanError(f"the pipeline plan of {config.model_type} names {len(lists)} lists of layers, not one")
        at = names.index(lists[0])
        plan = PipelinePlan(tuple(names[:at]), lists[0], tuple(names[at + 1 :]))
    places = (*plan.before, plan.layers, *plan.after)
    head = {id(parameter) for parameter in head_parameters(model)}
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        inside = name.removeprefix(prefix)
        if id(parameter) in head:
            continue
        if not any(inside.startswith(f"{place}.") for place in places):
            raise NoPlanError(f"{name} has no place in the pipeline plan of {config.model_type}")
    return plan


def tensor_plan(model: PreTrainedModel) -> dict[str, str]:
    """Module or parameter path (`*` for numbers, of the whole model) → style of the family's tensor-parallel plan.

    Raises NoPlanError for a family without one.
    """
    config = model.config.get_text_config()
    base = TENSOR_PLANS.get(config.model_type) or getattr(config, "base_model_tp_plan", None)
    if not base:
        raise NoPlanError(f"transformers has no tensor-parallel plan for {config.model_type}")
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    base = {**base, **TENSOR_ADDITIONS.get(config.model_type, {})}
    plan = {f"{prefix}{name}": style for name, style in base.items()}
    return {**plan, **(getattr(type(model), "_tp_plan", None) or {})}


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters of the head: what stands beside the base model, and an output embedding, tied or not."""
    head = model.get_output_embeddings()
    own = list(head.parameters()) if head is not None else []
    base = {id(parameter) for parameter in model.base_model.parameters()}
    known = base | {id(parameter) for parameter in own}
    return [*own, *(parameter for parameter in model.parameters() if id(parameter) not in known)]


def token_table(model: PreTrainedModel) -> nn.Embedding | None:
    """The embedding of tokens; None for a model that has none (of images), or not on this stage."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None


def find(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or None: families leave out what a configuration does not need (OPT's `project_in`)."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
