"""Configurations of strangers: a model can be built from them, or they are refused; soon, and by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from conf.errors import RequestError
from conf.schema import Config, ModelConfig
from recipes.models.configuration import check_buildable
from recipes.models.pretrained import pretrained_config

PLAIN: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
HOSTILE: dict[str, Any] = {
    "no family": {"model_type": None},
    "a family of nobody": {"model_type": "nobody"},
    "a family that is a path": {"model_type": "../llama"},
    "a family that is a list": {"model_type": ["llama"]},
    "words for numbers": {"hidden_size": "many"},
    "no width": {"hidden_size": 0},
    "a negative width": {"hidden_size": -8},
    "a width beyond all": {"hidden_size": 10**12},
    "a fraction": {"hidden_size": 32.5},
    "a truth": {"hidden_size": True},
    "nothing": {"hidden_size": None},
    "a list": {"hidden_size": [32]},
    "an object": {"hidden_size": {"a": 1}},
    "layers without end": {"num_hidden_layers": 10**9},
    "negative layers": {"num_hidden_layers": -1},
    "words for layers": {"num_hidden_layers": "two"},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 3},
    "more heads of keys": {"num_key_value_heads": 7},
    "no vocabulary": {"vocab_size": 0},
    "a negative vocabulary": {"vocab_size": -1},
    "a vocabulary beyond all": {"vocab_size": 10**15},
    "words for a vocabulary": {"vocab_size": "all"},
    "padding beyond the vocabulary": {"pad_token_id": 10**6},
    "no such activation": {"hidden_act": "explode"},
    "an activation that is a number": {"hidden_act": 7},
    "no such rope": {"rope_scaling": {"rope_type": "spiral"}},
    "a rope that is a list": {"rope_scaling": [1, 2]},
    "no such dtype": {"dtype": "float7"},
    "an attention of the hub": {"_attn_implementation": "someone/kernel"},
    "code": {"auto_map": {"AutoConfig": "evil.Config"}},
    "labels that are words": {"id2label": {"one": "a"}},
    "labels that are a number": {"id2label": 3},
    "kinds of layers": {"layer_types": ["none"]},
    "positions beyond all": {"max_position_embeddings": 10**15},
}


HARMLESS = ("code", "no vocabulary")
"""Code is not loaded; a tokenizer that is larger than the vocabulary is refused where there is one."""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_of_strangers(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | HOSTILE[name]))
    started = time.monotonic()
    try:
        config = pretrained_config(ModelConfig(path=str(tmp_path)))
        problems = check_buildable(AutoModelForCausalLM, config, Config(model=ModelConfig(path=str(tmp_path))))
    except RequestError as error:
        problems = list(error.problems)
    assert time.monotonic() - started < 15  # 5 s, on a machine that does other things
    assert all(problem.rule and len(problem.rule) < 600 for problem in problems)
    assert bool(problems) != (name in HARMLESS)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b"null", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": NaN' + b"0" * 100_000 + b"}"]
)
def test_what_is_no_configuration(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RequestError):
        pretrained_config(ModelConfig(path=str(tmp_path)))
