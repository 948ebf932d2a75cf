"""The transformers configuration of a model: a new one, its dropout, and what can be told before it is built."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from conf.errors import Problem, RequestError, did_you_mean
from conf.model_folder import check_sizes
from conf.rules_values import shown
from conf.schema import Config
from recipes import hub
from recipes.data.tokenizer import id_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OLDER_NAMES = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Taken by transformers 5 and kept under other names."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Every configuration may have them, though some families (CodeGen) do not name all of them."""
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet", "longformer", "data2vec-text")
"""Families whose positions begin behind the number of the padding token."""


def scratch_config(model_type: str, config: dict[str, Any]) -> PretrainedConfig:
    """The transformers configuration of a new model: `config` over the defaults of its family.

    Raises RequestError for an unknown family, an attribute that the family does not have (transformers would keep it,
    and nothing would read it), or a value that it refuses.
    """
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        near = did_you_mean(model_type, CONFIG_MAPPING)
        rule = "not a model family of transformers"
        raise RequestError(Problem("model.type", model_type, rule, f"model.type={near}" if near else "")) from None
    names = {*known.to_dict(), *type(known).attribute_map, *OLDER_NAMES, *SPECIAL, *_read_if_there(known)}
    names -= {"model_type", "use_cache"}
    wrong = [
        Problem(f"model.config.{key}", str(value), f"{model_type} has no such attribute", _near(key, names))
        for key, value in config.items()
        if key not in names
    ]
    if wrong:
        raise RequestError(wrong)
    check_sizes({known.attribute_map.get(key, key): value for key, value in config.items()}, "model.config.")
    try:
        made = AutoConfig.for_model(model_type, **{**config, "use_cache": False})
    except Exception as error:  # transformers raises a dozen kinds here, each for a wrong value
        raise RequestError(refused(model_type, error)) from None
    made.architectures = made.architectures or []  # None is a TypeError where a family has several classes (DeiT)
    return made


def _read_if_there(config: PretrainedConfig) -> set[str]:
    """Attributes that a family's code reads where a configuration has them, and that no configuration has by default.

    DeBERTa-v2's `position_buckets`, for one, which each of its published models sets.
    """
    code = Path(inspect.getfile(type(config)))
    code = code.with_name(code.name.replace("configuration_", "modeling_"))
    return (
        set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', code.read_text(encoding="utf-8")))
        if code.is_file()
        else set()
    )


def set_dropout(config: PretrainedConfig, probability: float | None) -> PretrainedConfig:
    """Every dropout of a configuration (attention, hidden states, embeddings, head), in place; None: as it is.

    No layer is left out at random then (`layerdrop`): each rank would leave out others. Raises RequestError when the
    family has none to set.
    """
    if probability is None:
        return config
    numbers = {name: value for name, value in vars(config).items() if isinstance(value, int | float | None)}
    names = [name for name in numbers if "dropout" in name or name.endswith("pdrop")]
    names = [name for name in names if not isinstance(numbers[name], bool)]
    if not names and probability:
        rule = f"{config.model_type} has no dropout"
        raise RequestError(Problem("model.dropout", str(probability), rule, "model.dropout=null"))
    # transformers 5.23: taggers of decoders drop a tenth before the head where their configuration has no word of it.
    for name in (*names, "classifier_dropout"):
        setattr(config, name, probability)
    for name in _layerdrops(config):
        setattr(config, name, 0.0)
    return config


def _layerdrops(config: PretrainedConfig) -> list[str]:
    """Attributes that say how often a layer is left out."""
    return [name for name, value in vars(config).items() if name.endswith("layerdrop") and value]


def check_buildable(
    hf_class: Any, config: PretrainedConfig, cfg: Config, trained: bool = True, weights: Path | None = None,
    new_head: bool = False, notes: list[str] | None = None,
) -> list[Problem]:  # fmt: skip
    """What keeps a model from being built and trained as asked, shown on the meta device: no memory, no weights.

    weights: the folder it is to be filled from; new_head: whether its head may be missing there. notes: gets what is to
    be said of them.
    """
    try:
        with torch.device("meta"):
            network = hub.new_model(hf_class, config, attn_implementation=cfg.model.attention)
    except Exception as error:  # as above: whatever a family raises for its own configuration
        return [refused(config.model_type, error)]
    problems = check_network(network, cfg, trained)
    if weights is not None:
        from recipes.models.build import check_weights

        try:
            said = check_weights(network, weights, cfg.model.variant, new_head)
        except RequestError as error:
            return problems + error.problems
        if notes is not None:
            notes[:] = said
    return problems


def check_network(network: PreTrainedModel, cfg: Config, trained: bool = True) -> list[Problem]:
    """What keeps a model (whole, on the meta device) from being divided and trained as asked."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    from recipes.models import own_losses
    from recipes.models.layouts import problems

    found, family = problems(network, cfg.parallel), network.config.model_type
    batch, normalised = cfg.batch, any(isinstance(module, _BatchNorm) for module in network.modules())
    if trained and normalised and batch.micro_size != batch.global_size:
        rule = f"{family} normalises over a micro-batch: what it learns would depend on ranks and accumulation"
        nearest = "one rank with batch.accumulation=1, or a family that normalises each row (convnext, vit, swin)"
        found.append(Problem("batch.micro_size", shown(batch.micro_size), rule, nearest))
    for name in _layerdrops(network.config) if trained else ():
        key = f"model.config.{name}"
        nearest = f"{key}=0" if cfg.model.path is None else "model.dropout=0 (or what its other dropouts are to be)"
        rule = f"{family} leaves out layers at random, each rank others"
        found.append(Problem(key, shown(getattr(network.config, name)), rule, nearest))
    known = {problem.key for problem in found}
    found += [one for one in own_losses.problems(network, cfg) if one.key not in known] if trained else []
    if not any(isinstance(module, GradientCheckpointingLayer) for module in network.modules()):
        for key, value, none in (
            ("activation_checkpointing", cfg.train.activation_checkpointing, 0), ("compile", cfg.train.compile, False),
        ):  # fmt: skip
            if value:
                rule = f"{family} has no layers that transformers knows as such"
                found.append(Problem(f"train.{key}", shown(value), rule, f"train.{key}={shown(none)}"))
    return found


def check_text(
    config: PretrainedConfig, tokenizer: Any, seq_length: int, pretrained: str | None = None
) -> list[Problem]:
    """Whether the tokens of a tokenizer have rows in the embedding, and the rows of the data positions in the model.

    pretrained: the `model.path` of a model whose embedding is as it is.
    """
    text = config.get_text_config()
    problems = []
    rows = id_count(tokenizer)  # an id without a row is an error amid training
    if rows > text.vocab_size:
        rule = f"the tokenizer has ids up to {rows - 1}, more than the embedding has rows"
        key, value = "model.config.vocab_size", str(text.vocab_size)
        nearest = f"model.config.vocab_size={-(-rows // 64) * 64} or a tokenizer of that size"
        if pretrained is not None:
            key, value, rule = "model.path", pretrained, f"{rule} ({text.vocab_size})"
            nearest = "model.tokenizer=null where its own is in model.path, else the one that it was trained with, "
            nearest += f"or a copy made larger: model.resize_token_embeddings({rows}), save_pretrained(FOLDER)"
        problems.append(Problem(key, value, rule, nearest))
    positions = getattr(text, "max_position_embeddings", None)
    if positions and text.model_type in OFFSET_POSITIONS:
        positions -= (text.pad_token_id or 0) + 1
    if positions and 0 < positions < seq_length:
        rule = f"the model has {positions} positions"
        problems.append(Problem("data.seq_length", str(seq_length), rule, f"data.seq_length={positions}"))
    return problems


def _near(key: str, names: set[str]) -> str:
    near = did_you_mean(key, names)
    return f"model.config.{near}" if near else ""


def refused(model_type: str, error: Exception) -> Problem:
    """What transformers says against building a model."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return Problem(
        "model.config", model_type, f"transformers cannot build this model: {type(error).__name__}: {reason}"
    )
