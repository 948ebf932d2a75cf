"""The shape of any Hugging Face model: its tensors, and what one row leaves behind for backward.

The model is built on the meta device, where tensors have shapes and no memory: nothing is loaded, an 8B model takes
seconds. What backward will need is not guessed per family either: a forward pass over meta tensors is watched by
`torch.autograd.graph.saved_tensors_hooks`. Where the arithmetic is not the same for each token (images, encoder and
decoder), it is counted in such a pass, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from conf.errors import Problem, RequestError
from conf.schema import DataConfig, ModelConfig, ParallelConfig
from recipes import hub
from recipes.models.costs import idle_elements
from recipes.models.layouts import problems
from recipes.models.plans import head_parameters, token_table
from recipes.models.stage_shape import Part, Traffic, divide_on_meta, model_layers, parts, stage_plan

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "bf16_autocast": "float32"}
"""torch dtype of the parameters of each `precision.name`."""
TRACED = "recipes_traced"
"""Names under which the traced attention is registered with transformers start so."""


@dataclass(frozen=True)
class Activations:
    """Bytes that one sequence keeps for backward (batch 1; everything here is proportional to the micro batch)."""

    layers: tuple[int, ...]
    """Of each layer, its input included."""
    inputs: tuple[int, ...]
    """The hidden states that enter each layer: all that is left of a checkpointed one, and what a stage is sent."""
    outside: int
    """Embedding, positions, last norm: what is kept outside the layers, the head excluded."""


@dataclass(frozen=True)
class ModelShape:
    """A model in numbers. Counts are in elements, tied parameters counted once."""

    model_type: str
    seq_length: int
    """Tokens of a row; 1 where rows are none of tokens."""
    parameters: int
    embedding: int
    """Lookup tables: token, position and type embeddings; a tied head is this one."""
    head: int
    """The output matrix; 0 when it is tied to the embedding."""
    layers: int
    layer_parameters: tuple[int, ...]
    """Of each layer."""
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """(name, shape) of every parameter."""
    tied: bool
    vocab: int
    hidden: int
    intermediate: int | None
    heads: int
    """0 for a family without attention."""
    kv_heads: int
    head_dim: int
    max_positions: int | None
    activations: Activations | None
    """None for a family whose forward pass looks at values (which expert?): meta tensors have none."""
    counted: int | None = None
    """FLOPs of one row's forward pass, where it is more than a matrix product for each token and matrix."""
    idle: int = 0
    """Elements of experts that a token does not go through: they hold memory and multiply nothing."""
    parts: tuple[Part, ...] = ()
    """What a rank at each place of the pipeline holds."""


def model_shape(
    model: ModelConfig,
    data: DataConfig,
    precision: str,
    parallel: ParallelConfig | None = None,
    hf_class: Any = None,
    row_shape: Callable[[PretrainedConfig], tuple[int, ...]] | None = None,
    check: Callable[[PreTrainedModel], list[Problem]] | None = None,
) -> ModelShape:
    """The shape of the model that a configuration trains, in the dtype of `precision`.

    hf_class: the Auto class of the task; None: causal language models. row_shape: of the model's main input, for one
    row, given the configuration; None: `data.seq_length` tokens. check: what else the run asks of the model; None: that
    it can be divided.

    Raises RequestError for a type, an attribute, a folder or a hub name that transformers cannot make such a model of
    (model.*), for sequences longer than the model's positions (data.seq_length), and for a model that cannot be divided
    as asked (parallel.*).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from recipes.models.configuration import refused

    hf_class, parallel = hf_class or AutoModelForCausalLM, parallel or ParallelConfig()
    config = _config(model, data)
    row = row_shape(config) if row_shape else (data.seq_length,)
    of_tokens = len(row) == 1 and hasattr(config.get_text_config(), "vocab_size")
    seq_length = row[0] if of_tokens else 1
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions and 0 < positions < seq_length:  # XLNet says -1
        rule = f"the model has {positions} positions" + (
            f", a row {seq_length}" if seq_length != data.seq_length else ""
        )
        nearest = f"data.seq_length={positions * data.seq_length // seq_length}"
        raise RequestError(Problem("data.seq_length", str(data.seq_length), rule, nearest))
    attention = _register_traced(model.attention, of_tokens and data.packing == "documents")
    dtype = getattr(torch, DTYPE_NAMES[precision])
    try:
        with torch.device("meta"):
            try:
                network = hub.new_model(hf_class, config, dtype=dtype, attn_implementation=attention)
                network.tie_weights()
            except KeyError:
                # A family with attention classes of its own (Falcon, GPT-J) cannot be traced.
                config = _config(model, data)  # the one above has the traced attention's name by now
                network = hub.new_model(hf_class, config, dtype=dtype, attn_implementation=model.attention)
    except Exception as error:  # whatever a family raises for its own configuration
        raise RequestError(refused(config.model_type, error)) from error
    if wrong := check(network) if check else problems(network, parallel):
        raise RequestError(wrong)
    layers = model_layers(network, parallel)
    head = network.get_output_embeddings()
    table = token_table(network)
    tied = head is not None and table is not None and head.weight is table.weight
    heads, hidden = _number(text, "num_attention_heads"), _number(text, "hidden_size")
    whole = ModelShape(
        model_type=config.model_type,
        seq_length=seq_length,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        embedding=_embedding(network),
        head=0 if tied or head is None else sum(parameter.numel() for parameter in head.parameters()),
        layers=len(layers) if config.is_encoder_decoder else _number(text, "num_hidden_layers", len(layers)),
        layer_parameters=tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        tensors=tuple((name, tuple(parameter.shape)) for name, parameter in network.named_parameters()),
        tied=tied,
        vocab=text.vocab_size if head is not None else 0,
        hidden=hidden,
        intermediate=getattr(text, "intermediate_size", None),
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or (hidden // heads if heads else 0),
        max_positions=positions,
        activations=None,
        counted=_count(network, row) if config.is_encoder_decoder or not of_tokens else None,
        idle=idle_elements(network),
    )
    stages = stage_plan(network, parallel)
    ranks = divide_on_meta(network, parallel.tensor)
    # What is inside of attention is as much per rank with all tokens of some heads as with some tokens of all heads.
    activations = _trace(network, layers, (row[0] // parallel.sequence, *row[1:]))
    traffic = Traffic()
    if ranks is not None:
        states = seq_length // parallel.sequence * hidden * network.dtype.itemsize
        traffic = (
            ranks.traffic() if activations else Traffic((2 * whole.layers + 1) * states, 2 * whole.layers * states)
        )
    divided = parts(network, whole, activations, traffic, stages, parallel)
    return replace(whole, activations=activations, parts=divided)


def _config(model: ModelConfig, data: DataConfig) -> PretrainedConfig:
    """The transformers configuration; a new model without a vocabulary gets that of the tokenizer to be trained."""
    from recipes.data.tokenizer import DEFAULT_VOCABULARY
    from recipes.models.configuration import scratch_config, set_dropout
    from recipes.models.pretrained import pretrained_config

    if model.path is None:
        config = scratch_config(str(model.type), model.config)
        if "vocab_size" not in model.config and hasattr(config, "vocab_size"):
            config = scratch_config(
                str(model.type), {**model.config, "vocab_size": data.vocab_size or DEFAULT_VOCABULARY}
            )
        return set_dropout(config, model.dropout)

    config = pretrained_config(model)
    config.use_cache = False
    return config


def _number(config: PretrainedConfig, name: str, otherwise: int = 0) -> int:
    """An attribute of a configuration that is one number: Swin has as many of heads as stages, LXMERT a table."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else otherwise


def _embedding(network: PreTrainedModel) -> int:
    from torch import nn

    tables = {
        id(module.weight): module.weight.numel() for module in network.modules() if isinstance(module, nn.Embedding)
    }
    return sum(tables.values())


def _register_traced(attention: str | None, masked: bool) -> str:
    """Register an attention that keeps for backward what the real one keeps, and works on meta tensors.

    Fused kernels keep query, key, value, output and one fp32 number per row (FlashAttention, Dao et al. 2022, alg. 1),
    never the S×S scores; torch's SDPA on meta tensors would show the scores of its reference path instead. `masked`:
    for packed documents and padded rows transformers hands SDPA a mask: torch turns it from bool into the query's dtype
    anew in each layer, and grouped keys and values are then repeated to all heads. `eager` keeps the probabilities, in
    fp32 and in its dtype; so does SDPA's own path for a mask that is learnt (T5's positions).
    """
    import torch
    from transformers import AttentionInterface

    eager = attention == "eager"
    masked = masked and attention in (None, "sdpa")

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, whole: bool, masks: int) -> Any:
            batch, heads, rows, _ = query.shape
            scores = (batch, heads, rows, key.shape[2])
            # heads next to each other, as the kernels write it: what the output projection reads is the same memory
            out = query.new_empty(batch, rows, heads, value.shape[-1])
            kept = [query, key, value]
            if whole:
                kept += [query.new_empty(scores, dtype=dtype) for dtype in {torch.float32, query.dtype}]
            else:
                kept += [out, query.new_empty(scores[:3], dtype=torch.float32)]
            if masks and not whole:
                kept.append(query.new_empty(batch, masks, *scores[2:]))
            ctx.save_for_backward(*kept)
            groups = query.shape[1] // key.shape[1]
            probabilities = query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2)
            probabilities @ value.repeat_interleave(groups, dim=1)  # for who counts products
            return out

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise NotImplementedError("traced on meta tensors, never run backwards")

    def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, position_bias: Any = None, **__: Any) -> Any:
        if (masked or eager) and key.shape[1] != query.shape[1]:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        learnt = position_bias is not None and position_bias.requires_grad
        masks = query.shape[1] if position_bias is not None else int(masked)
        return Kept.apply(query, key, value, eager or learnt, masks), None

    # No mask function under this name: transformers then builds no mask, which would look at values. One name for each
    # behaviour: transformers may go on using what was first registered under a name.
    name = f"{TRACED}_{'eager' if eager else 'masked' if masked else 'fused'}"
    AttentionInterface.register(name, attend)
    return name


def _forward(network: PreTrainedModel, row: tuple[int, ...]) -> None:
    """One row through all but the head. Raises whatever a family does that looks at values."""
    import torch

    dtype = torch.long if network.main_input_name == "input_ids" else network.dtype
    x = torch.zeros(1, *row, dtype=dtype, device="meta")
    inputs: dict[str, Any] = {network.main_input_name: x}
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = x
    if network.main_input_name == "input_ids":
        inputs["use_cache"] = False
    network.base_model(**inputs)


def _count(network: PreTrainedModel, row: tuple[int, ...]) -> int | None:
    """FLOPs of one row's forward pass with the head."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _forward(network, row)
    except Exception:  # each family has its own where it looks at values: a meta tensor has none
        return None
    positions = row[0] if network.main_input_name == "input_ids" else 1
    if network.base_model is network:
        return counter.get_total_flops()
    return counter.get_total_flops() + 2 * positions * sum(p.numel() for p in head_parameters(network) if p.dim() > 1)


def _trace(network: PreTrainedModel, layers: Sequence[torch.nn.Module], row: tuple[int, ...]) -> Activations | None:
    """What a forward pass over one row saves for backward, by layer."""
    import torch

    weights = [parameter.untyped_storage() for parameter in network.parameters()]
    seen: dict[int, Any] = {storage._cdata: storage for storage in weights}
    saved = [0] * (len(layers) + 1)  # the last one: outside of the layers
    inputs = [0] * len(layers)
    where = len(layers)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # held, so that its address is not given away again
            saved[where] += storage.nbytes()
        return tensor

    def entering(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal where
            where = index
            hidden = args[0] if args else kwargs["hidden_states"]
            inputs[index] = hidden.numel() * hidden.element_size()

        return hook

    def leaving(*_: Any) -> None:
        nonlocal where
        where = len(layers)

    handles = [layer.register_forward_pre_hook(entering(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leaving) for layer in layers]
    network.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _forward(network, row)
    except Exception:  # each family has its own where it looks at values: a meta tensor has none
        return None
    finally:
        for handle in handles:
            handle.remove()
    return Activations(tuple(saved[:-1]), tuple(inputs), saved[-1]) if all(inputs) else None
