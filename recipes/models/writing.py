"""Whether a model can write texts as its folder says: tried on a model of nothing, before anything is trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from conf.errors import Problem, RequestError
from conf.weight_files import read_json
from recipes import hub

FILE = "generation_config.json"
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "return_dict_in_generate": False}
"""How a sample is drawn (`eval.prompt`)."""
OF_THE_MODEL = ("cache_implementation", "use_mtp", "output_attentions", "compile_config")
"""Settings that depend on what the family can do; transformers looks at their kinds itself."""
MOST_TOKENS = 2**18
"""Rows of the model of nothing: memory."""


def check_writing(folder: Path, config: PretrainedConfig) -> None:
    """Raises RequestError for each setting of a folder's `generation_config.json` with which `generate` fails.

    transformers 5.23 says so only once it writes, which is behind the training. Each setting is tried alone, as a
    sample is drawn, on one small layer with the model's vocabulary.
    """
    if not (folder / FILE).is_file():
        return
    hub.generation_config(folder)
    model = _of_nothing(getattr(config.get_text_config(), "vocab_size", None) or 1024)
    said, usual = read_json(folder / FILE), GenerationConfig().to_dict()
    tried = {
        name: value for name, value in said.items()
        if name in usual and value is not None and name not in (*OF_THE_MODEL, "stop_strings", *hub.CODE)
    }  # fmt: skip
    wrong = {name: reason for name, value in tried.items() if (reason := _fails(model, {name: value}))}
    if (words := said.get("stop_strings")) is not None and not _are_words(words):
        wrong["stop_strings"] = "neither a text nor a list of texts"
    if said.get("use_mtp") and not getattr(config.get_text_config(), "num_mtp_layers", None):
        wrong["use_mtp"] = "the model has no layers for several tokens at once (num_mtp_layers)"
    if wrong:
        raise RequestError(
            Problem(f"{folder / FILE}: {name}", json.dumps(said[name])[:60], reason, f"remove {name} from it")
            for name, reason in wrong.items()
        )


def _of_nothing(vocabulary: int) -> LlamaForCausalLM:
    size = LlamaConfig(
        vocab_size=min(vocabulary, MOST_TOKENS), hidden_size=2, intermediate_size=2, num_hidden_layers=1,
        num_attention_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return LlamaForCausalLM(size).eval()


def _fails(model: Any, settings: dict[str, Any]) -> str:
    """Why `generate` fails with these settings, empty where it does not."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        ids = torch.tensor([[1, 2, 3]])
        try:
            model.generation_config = GenerationConfig(**settings)
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=2, **SAMPLING
            )
        except Exception as error:  # whatever transformers raises for a wrong value
            return f"transformers refuses it: {' '.join(str(error).split())[:120] or type(error).__name__}"
    return ""


def _are_words(value: Any) -> bool:
    return bool(value) and all(isinstance(one, str) for one in (value if isinstance(value, list) else [value]))
