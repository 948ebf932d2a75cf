"""Every YAML file of every group: it composes on its own, is legal somewhere, and says what the schema can hold."""

from __future__ import annotations

import re

import pytest
import yaml
from conf_cases import CPU, CPU_AIO, CPU_FP16, GPU, problems_of, quick, unchecked, write

from conf.compose import compose
from conf.overrides import CONF_DIR, groups, schema_keys
from conf.schema import TASKS

CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices]
NEEDS = {
    "model=pretrained": ["model.path=owner/name"],
    "data=text": ["data.path=notes.txt"],
    "data=jsonl": ["data.path=notes.txt"],
    "data=csv": ["data.path=notes.txt"],
    "data=parquet": ["data.path=notes.txt"],
    "data=hub": ["data.name=owner/name"],
    "data=mixture": ["data.mixture=[{kind: stdlib}, {kind: text, path: notes.txt}]"],
    "optimizer=lion": ["zero=stage2_offload"],
    "optimizer=lamb": ["zero=stage0"],
    "optimizer=adagrad": ["zero=stage0"],
    "zero=stage3_nvme": ["zero.nvme_path=."],
    "zero=stage3_plus": ["zero.hpz_partition_size=4"],
    **{f"data={kind}": ["data.path=notes.txt"] for kind in ("conll", "squad", "lines", "idx", "images")},
    **{
        f"+recipe={name}": ["model.path=owner/name", "data.path=notes.txt"]
        for name in ("finetune_causal_lm", "sst2", "wnut17", "squad", "conll2003")
    },
    **{f"+recipe={name}": ["model.path=owner/name"] for name in ("ag_news", "financial_phrases", "squad_v2", "wmt14")},
    **{f"+recipe={name}": ["data.path=notes.txt", "data.target_path=notes.txt"] for name in ("multi30k", "mnist")},
}
MACHINES = {"precision=fp16": CPU_FP16, "optimizer=lamb": GPU, "zero=stage3_nvme": CPU_AIO, "zero=stage3_plus": GPU}


def request_of(group: str, choice: str) -> tuple[str, list[str]]:
    name = f"{'+' if group == 'recipe' else ''}{group}={choice}"
    alone = [name] if group == "recipe" else quick(name)
    return name, alone + NEEDS.get(name, [])


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_choice_is_legal_somewhere(group, choice):
    write("notes.txt")
    name, request = request_of(group, choice)
    assert problems_of(request, world=4, env=MACHINES.get(name, CPU)) == []


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_file_explains_itself_and_sets_its_own_section_only(group, choice):
    text = (CONF_DIR / group / f"{choice}.yaml").read_text()
    assert text.startswith("# ")
    if group != "recipe":
        keys = schema_keys()
        assert {f"{group}.{key}" for key in yaml.safe_load(text)} <= set(keys)


@pytest.mark.parametrize("recipe", groups()["recipe"])
def test_a_recipe_header_gives_what_a_user_needs(recipe):
    header = (CONF_DIR / "recipe" / f"{recipe}.yaml").read_text().partition("\ndefaults:")[0]
    assert header.startswith("# @package _global_\n# description: ")
    assert re.search(rf"^#   deepspeed .*launch/train\.py \+recipe={recipe}\b", header, re.MULTILINE)
    assert re.search(r"^# needs: \S", header, re.MULTILINE)
    assert re.search(r"^# (loss|accuracy|token_accuracy|f1|bleu|mse)[:,] ?\S", header, re.MULTILINE)


@pytest.mark.parametrize("recipe", ["quickstart", "pretrain_llama", "pretrain_gpt2"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_recipes_run_on_any_small_world(recipe, world):
    assert problems_of([f"+recipe={recipe}"], world) == []


def test_recipes_are_thin():
    """A recipe says what makes it that recipe: every line of its body differs from the defaults it overrides."""
    for recipe in groups()["recipe"]:
        body = yaml.safe_load((CONF_DIR / "recipe" / f"{recipe}.yaml").read_text())
        assert len([line for line in yaml.safe_dump(body).splitlines() if line.strip()]) < 40


def test_published_shapes():
    """Parameter counts of the shapes, from the shapes: 12·n_layer·d² + embeddings, and Llama's own sum."""

    def llama(c: dict) -> float:
        head = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
        d, kv = c["hidden_size"], c["num_key_value_heads"] * head
        layer = 2 * d * c["num_attention_heads"] * head + 2 * d * kv + 3 * d * c["intermediate_size"] + 2 * d
        rows = c["vocab_size"] * d * (1 if c["tie_word_embeddings"] else 2)
        return c["num_hidden_layers"] * layer + rows + d

    def gpt2(c: dict) -> float:
        d = c["n_embd"]
        return c["n_layer"] * (12 * d * d + 13 * d) + (c["vocab_size"] + c["n_positions"]) * d + 2 * d

    # Published: meta-llama/Llama-3.2-1B, -3B, Llama-3.1-8B, JackFram/llama-160m; openai-community/gpt2*.
    expected = {
        "llama_1b": 1_235_814_400,
        "llama_3b": 3_212_749_824,
        "llama_8b": 8_030_261_248,
        "llama_160m": 162_417_408,
        "gpt2": 124_439_808,
        "gpt2_medium": 354_823_168,
        "gpt2_large": 774_030_080,
        "gpt2_xl": 1_557_611_200,
    }
    for name, count in expected.items():
        config = unchecked(quick(f"model={name}")).model.config
        assert (llama if name.startswith("llama") else gpt2)(config) == count, name
    assert 2e6 <= llama(unchecked(quick()).model.config) <= 6e6


def test_configs_are_those_of_transformers():
    """Every `config` key is an attribute of the model type's own configuration, and the values are accepted."""
    transformers = pytest.importorskip("transformers")
    import recipes.models.linear  # noqa: F401 - makes the linear model known to transformers

    for choice in groups()["model"]:
        model = unchecked(quick(f"model={choice}")).model
        if model.type is None:
            continue
        known = transformers.AutoConfig.for_model(model.type)
        assert [name for name in model.config if not hasattr(known, name)] == []
        built = transformers.AutoConfig.for_model(model.type, **model.config)
        assert {name: getattr(built, name) for name in model.config if name != "rope_parameters"} == {
            name: value for name, value in model.config.items() if name != "rope_parameters"
        }


def test_every_task_is_a_module_of_recipes():
    shared = {"__init__", "base", "checksums", "durable", "hub", "preview", "scores", "supervised", "text"}
    shared.add("translation_forms")
    assert set(TASKS) == {file.stem for file in (CONF_DIR.parent / "recipes").glob("*.py")} - shared


def test_offload_switches_the_fused_kernel_off():
    assert compose(quick("zero=stage2_offload"), 2, CPU).optimizer.fused is False
    assert compose(quick("optimizer=sgd"), 2, CPU).optimizer.fused is None
