"""The user's value wins for every key, in whatever form it is written, and no sibling is lost (`conf/changes.py`)."""

from __future__ import annotations

import copy
import json
import random
import shutil
from typing import Any

import pytest
from conf_cases import CPU, problems_of
from support.tiers import THOROUGH

from conf import compose as composing
from conf import overrides
from conf.changes import Change, apply, asked, changes_of, name_of
from conf.compose import compose
from conf.errors import RequestError

T5 = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 3, "num_heads": 4}


def rule(tree: Any, path: list[str], value: Any, takes_out: bool = False) -> Any:
    """The rule in ten lines: a mapping stands for its keys, all else is set as a whole, `~` takes out."""
    tree = dict(tree) if isinstance(tree, dict) else {}
    name, *below = path
    if below:
        return tree | {name: rule(tree.get(name), below, value, takes_out)}
    if takes_out:
        return {key: one for key, one in tree.items() if key != name}
    if not isinstance(value, dict):
        return tree | {name: value}
    whole = tree[name] if isinstance(tree.get(name), dict) else {}
    for key, one in value.items():
        whole = rule(whole, [key], one)
    return tree | {name: whole}


class Trees:
    """Random trees over few names, so that they meet."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)

    def scalar(self) -> Any:
        texts = ["x", "a b", "", "null", "1", "it's", 'a"b', "é", "a,b", "{a: 1}", "1e5", "on", "back\\slash"]
        return self.draw.choice([0, -3, 2.5, 1e-5, True, False, None, [1, "two"], [], *texts])

    def mapping(self, depth: int = 2, least: int = 0) -> dict[str, Any]:
        names = self.draw.sample(["a", "b", "c", "d_1", "7", "true"], self.draw.randint(least, 3))
        return {name: self.value(depth - 1) for name in names}

    def value(self, depth: int) -> Any:
        return self.mapping(depth) if depth > 0 and self.draw.random() < 0.4 else self.scalar()


def written(value: Any) -> str:
    """A value in Hydra's grammar: texts in quotes, keys without."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return name_of(value) if value is None or isinstance(value, bool) else repr(value)


def random_arguments(trees: Trees, base: dict[str, Any], count: int) -> tuple[list[str], dict[str, Any]]:
    """Overrides in random forms and what the rule makes of `base` with them."""
    arguments, expected, draw = [], copy.deepcopy(base), trees.draw
    for _ in range(count):
        section = draw.choice([["model", "config"], ["deepspeed"]])
        path = [*section, *draw.choices(["a", "b", "c", "d_1"], k=draw.randint(0, 2))]
        key, plus = ".".join(path), draw.choice(["", "+", "++"])
        found: Any = expected
        for name in path:
            found = found.get(name, ...) if isinstance(found, dict) else ...
        if len(path) > len(section) and found is not ... and draw.random() < 0.4:
            arguments.append(f"~{key}")
            expected = rule(expected, path, None, takes_out=True)
            continue
        value = trees.mapping(3, least=1) if len(path) == len(section) else trees.value(2)
        as_json = isinstance(value, dict) and draw.random() < 0.5
        if path == ["model", "config"] and draw.random() < 0.3:
            plus, key, text = "", "model", json.dumps({"config": value})
        else:
            text = json.dumps(value) if as_json else written(value)
        arguments.append(f"{plus}{key}={text}")
        expected = rule(expected, path, value)
    return arguments, expected


@pytest.mark.parametrize("seed", range(5000 if THOROUGH else 60))
def test_any_form_in_any_order_is_the_rule(seed):
    trees = Trees(seed)
    base = {"model": {"config": trees.mapping(3)}, "deepspeed": trees.mapping(3)}
    arguments, expected = random_arguments(trees, base, trees.draw.randint(1, 6))
    read = overrides.read_overrides(arguments)
    assert not read.problems, (arguments, read.problems)
    found = copy.deepcopy(base)
    apply(found, read.changes)
    assert found == expected, arguments
    again = overrides.read_overrides(read.spelled_out())
    assert [(one.path, one.value) for one in again.changes] == [(one.path, one.value) for one in read.changes]


@pytest.fixture
def own_conf(tmp_path, monkeypatch):
    """A copy of conf/ to write groups and recipes into."""
    shutil.copytree(overrides.CONF_DIR, tmp_path / "conf", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(overrides, "CONF_DIR", tmp_path / "conf")
    monkeypatch.setattr(composing, "CONF_DIR", tmp_path / "conf")
    return tmp_path / "conf"


def recipe_file(folder: Any, content: dict[str, Any], *defaults: dict[str, str]) -> None:
    body = json.dumps({"defaults": list(defaults), **content})
    (folder / "recipe" / "mine.yaml").write_text(f"# @package _global_\n# description: x\n{body}")


@pytest.mark.parametrize("seed", range(100 if THOROUGH else 6))
def test_group_recipe_and_command_line_are_layers_of_the_rule(own_conf, seed):
    trees = Trees(seed)
    draw = trees.draw
    preset, own = {"config": trees.mapping(3)}, {"model": {"config": trees.mapping(3)}, "deepspeed": trees.mapping(3)}
    typed = {
        "data": {"seq_length": 7, "text": "t", "header": ["a"]},
        "optimizer": {"lr": 0.5, "betas": [0.1, 0.2], "eps": None, "weight_decay": 0.0},
        "batch": {"global_size": 8, "micro_size": 2, "accumulation": None},
    }
    (own_conf / "model" / "odd.yaml").write_text("# x\n" + json.dumps({"type": "llama", **preset}))
    picked = {name: dict(draw.sample(list(keys.items()), 2)) for name, keys in typed.items()}
    recipe_file(own_conf, {**own, **picked}, {"override /model": "odd"})
    layers = rule(rule({}, ["model"], preset), ["model"], own["model"])
    base = {**rule(layers, ["deepspeed"], own["deepspeed"])}
    arguments, expected = random_arguments(trees, base, 4)
    for name, keys in typed.items():
        mine = dict(draw.sample(list(keys.items()), draw.randint(1, len(keys))))
        expected[name] = picked[name] | mine
        whole = [f"{name}={written(mine)}"] if name != "batch" else [f"{name}={json.dumps(mine)}"]
        arguments += draw.choice([whole, [f"{name}.{key}={written(value)}" for key, value in mine.items()]])
    arguments.insert(draw.randint(0, len(arguments)), "+recipe=mine")
    if draw.random() < 0.5:
        arguments.append("model=odd")
    read = overrides.read_overrides(arguments)
    assert not read.problems, (arguments, read.problems)
    composing._give_way(read)
    config, problems = composing._compose(read)
    assert config is not None, (arguments, problems)
    assert {"config": config.model.config} == expected["model"], arguments
    assert config.deepspeed == expected["deepspeed"], arguments
    for name in typed:
        found = {key: getattr(getattr(config, name), key) for key in expected[name]}
        assert found == expected[name], arguments


FORMS = [
    ["model.config={d_model: 256, d_kv: 64, d_ff: 1024, num_layers: 3, num_heads: 4}"],
    ["+model.config={d_model: 256}", "++model.config={d_kv: 64, d_ff: 1024, num_layers: 3, num_heads: 4}"],
    [f"model.config={json.dumps(T5)}"],
    [f"model.config.{key}={value}" for key, value in T5.items()],
    [f"model={{type: t5, config: {written(T5)}}}"],
    ["model.config={d_model: 1, d_kv: 64, d_ff: 1024}", "model.config={num_layers: 3, num_heads: 4, d_model: 256}"],
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
def test_another_family_has_all_the_sizes_it_is_given(form):
    """The preset has a `d_model`, too, which gave way to the dotted key and was lost to the mapping."""
    request = ["+recipe=describe_functions", *form, "model.type=t5"]
    assert compose(request, 1, CPU).model.config == T5
    assert compose(request[::-1], 1, CPU).model.config.keys() == T5.keys()


def test_a_later_dotted_key_wins_over_an_earlier_mapping():
    dotted, mapping = "model.config.num_hidden_layers={}", "model.config={{num_hidden_layers: {}}}"
    for first, second, third in ((dotted, mapping, dotted), (mapping, dotted, mapping)):
        given = [first.format(1), second.format(2), third.format(3)]
        assert compose(["+recipe=quickstart", *given], 1, CPU).model.config["num_hidden_layers"] == 3


def test_the_recipe_gives_way_to_mappings_as_to_dotted_keys():
    assert compose(["+recipe=quickstart", "train={epochs: 2}"], 2, CPU).train.steps is None
    assert compose(["+recipe=quickstart", "train.steps=30", "train.epochs=null"], 2, CPU).train.steps == 30
    muon = compose(["+recipe=quickstart", "optimizer={lr: 0.5}", "optimizer=muon"], 2, CPU).optimizer
    assert (muon.name, muon.lr) == ("muon", 0.5), "the choice first, wherever it stands"
    assert compose(["+recipe=quickstart", "train.epochs=null"], 2, CPU).train.steps == 110, "null asks for nothing"


def test_what_is_taken_out_can_be_set_anew():
    given = ["~model.config", "model.config={hidden_size: 64}", "deepspeed={flops_profiler: {enabled: true}}"]
    found = compose(["+recipe=quickstart", *given, "~deepspeed.flops_profiler"], 1, CPU)
    assert (found.model.config, found.deepspeed) == ({"hidden_size": 64}, {})
    family = ["+recipe=describe_functions", "model.type=t5", "~model.config.encoder_layers"]
    assert compose(family, 1, CPU).model.config == {}, "bart's own sizes are gone before they are taken out"


def test_a_recipe_of_another_family_than_its_preset(own_conf):
    recipe_file(own_conf, {"model": {"type": "gpt2", "config": {"n_layer": 2}}}, {"override /model": "llama_4m"})
    given = ["+recipe=mine", "train.steps=3", "batch.micro_size=1", "batch.accumulation=1", "data.seq_length=64"]
    assert compose(given, 1, CPU).model.config == {"n_layer": 2}
    chosen = compose([*given, "model=llama_tiny"], 1, CPU).model
    assert chosen.type == "llama" and "n_layer" not in chosen.config and chosen.config["hidden_size"] == 64
    assert compose([*given, "model.type=bert"], 1, CPU).model.config == {}


@pytest.mark.parametrize(
    ("body", "key", "rule"),
    [
        ("model:\n  config:\n    a: 1\n    a: 2\n", "conf/recipe/mine.yaml:6", "duplicate key a"),
        ("- 1\n", "conf/recipe/mine.yaml", "must be a mapping"),
        ("model:\n  config: 3\n", "conf/recipe/mine.yaml: model.config", ""),
        ("optimizer:\n", "conf/recipe/mine.yaml: optimizer", ""),
        ("model.config:\n  a: 1\n", "conf/recipe/mine.yaml: model.config", "no such key"),
    ],
)
def test_a_recipe_that_is_no_tree_of_keys(own_conf, body, key, rule):
    (own_conf / "recipe" / "mine.yaml").write_text(f"# @package _global_\n# description: x\n{body}")
    (problem,) = problems_of(["+recipe=mine"])
    assert problem.key == key and rule in problem.rule


def test_changes_of_a_tree():
    changes = [*changes_of(("a",), {1: {True: 2}, "b": {}}), Change(("a", "1"), takes_out=True), Change(("a", "c"), 3)]
    assert asked(changes) == {"a.b": {}, "a.c": 3}
    with pytest.raises(RequestError, match=r"set it there"):
        apply({"a": "${b}"}, [Change(("a", "c"), 3)])
