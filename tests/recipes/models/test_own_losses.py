"""Every attribute that a family's own loss depends on, or is called so, counts here or is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import own_losses as scanned
import pytest
import torch
from own_losses import models
from support.tiers import THOROUGH
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from conf.errors import Problem
from conf.schema import Config, ModelConfig
from recipes.causal_lm import CausalLM
from recipes.models.configuration import check_buildable, scratch_config
from recipes.models.own_losses import AXES, OFF, SWITCH, families, problems
from recipes.models.router_loss import RouterLoss

ROWS = families()
COUNTS = [kind for kind, row in ROWS.items() if row.get("router", {}).get("alone") == ""]
"""Families whose routers' loss counts."""
ROOT = Path(__file__).resolve().parents[3]


def test_the_data_are_what_the_installed_transformers_has() -> None:
    """A new version that adds a loss is noticed here: `python tests/recipes/models/own_losses.py`."""
    known = {kind: {name: part for name, part in row.items() if name != "router"} for kind, row in ROWS.items()}
    assert scanned.scan() == known
    for kind, row in ROWS.items():
        assert (scanned.with_routers(row) is not None) == ("router" in row), kind
        assert set(row.get("router", AXES)) == set(AXES), kind
    assert scanned.document(ROWS) == (ROOT / "docs" / "losses.md").read_text()


def test_the_scan_sees_what_is_known_to_be_there() -> None:
    assert scanned.read_by("mixtral", "MixtralForCausalLM") == {"router_aux_loss_coef": SWITCH}
    assert scanned.read_by("bamba", "BambaForCausalLM") == {"z_loss_coefficient": None}
    assert scanned.read_by("prophetnet", "ProphetNetForCausalLM").keys() == {"eps", "disable_ngram_loss"}
    assert scanned.read_by("llama", "LlamaForCausalLM") == {}
    assert len(COUNTS) >= 18


def asked(kind: str, head: str, given: dict[str, Any], task: str = "causal_lm", **config: Any) -> list[Problem]:
    """What is said of a model of a class whose configuration has some values; `given` are those of the request."""
    made = CONFIG_MAPPING[kind]()
    for key, value in {**given, **config}.items():
        *path, name = key.split(".")
        section = made.get_text_config()
        for part in path:
            section = getattr(section, part)
        object.__setattr__(section, name, value)  # without the checks of its type
    network = type(head, (), {"config": made})()
    return list(problems(network, Config(task=task, model=ModelConfig(type=kind, config=given))))


def other(value: Any) -> Any:
    """Another value than a default."""
    if isinstance(value, bool) or value is None:
        return not value
    return value + 1 if isinstance(value, int | float) else ["another"]


@pytest.mark.parametrize("kind", [kind for kind, row in ROWS.items() if "read" in row])
def test_what_a_family_has_in_its_loss_counts_or_is_refused(kind: str) -> None:
    row = ROWS[kind]
    own = ROWS[CONFIG_MAPPING[kind]().get_text_config().model_type]  # of a nested configuration the text's
    for key, found in row["read"].items():
        for head in found["heads"]:
            rest = {name: OFF[name] for name in row["read"] if name in OFF}
            on = {
                **rest,
                key: not OFF[key] if key in OFF else 0.5,
                **({found["switch"]: True} if found["switch"] else {}),
            }
            said = asked(kind, head, {}, **on)
            if found["switch"] and own.get("router", {}).get("alone") == "":
                assert said == [] and scanned.with_routers(row) == key
                said = asked(kind, head, {}, "translation", **on)
            (problem,) = said
            assert problem.key == f"model.config.{found['switch'] or key}" and key in f"{problem.key} {problem.rule}"
            off = {found["switch"]: False} if found["switch"] else {key: OFF.get(key, 0)}
            assert asked(kind, head, {}, **{**on, **off}) == []


@pytest.mark.parametrize("kind", [kind for kind, row in ROWS.items() if "named" in row])
def test_what_is_only_called_like_a_loss_is_refused_where_it_is_set(kind: str) -> None:
    row, default = ROWS[kind], CONFIG_MAPPING[kind]()
    for head in scanned.kinds()[kind]:
        read = {key: found for key, found in row.get("read", {}).items() if head in found["heads"]}
        for key in row["named"]:
            value = other(getattr(default, key))
            said = [problem for problem in asked(kind, head, {key: value}) if problem.key == f"model.config.{key}"]
            if key in OFF or (key == SWITCH and kind in COUNTS and read):
                assert said == []
            else:
                assert len(said) == 1, (head, key)
            assert [one for one in asked(kind, head, {key: getattr(default, key)}) if one.key.endswith(key)] == [
                one for one in asked(kind, head, {}) if one.key.endswith(key)
            ]


@pytest.mark.parametrize("kind", COUNTS)
def test_the_routers_loss_is_the_family_s_own(kind: str) -> None:
    """The same number as transformers' forward pass of a row, for every family whose it is said to be."""
    key = scanned.with_routers(ROWS[kind])
    assert key is not None
    options = {**models.tiny_options(kind), SWITCH: True, key: 0.25}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    ids = torch.randint(0, models.VOCABULARY, (2, 9))
    router = RouterLoss(network, None)
    with torch.no_grad():
        expected = [network(input_ids=row[None], use_cache=False).aux_loss for row in ids]
        with router.listening() as said:
            network(input_ids=ids, use_cache=False, output_router_logits=False)
        found = router.loss(router.sums(said, torch.ones(2, 9, dtype=torch.bool)), torch.tensor([3, 1]))
    assert router.coefficient == 0.25 and expected[0] > 0
    torch.testing.assert_close(found, 3 * expected[0] + expected[1])


WELL_BEHAVED = ["llama", "mixtral", "qwen2_moe", "bert", "gpt_neo", "deepseek_v3"]


@pytest.mark.parametrize("kind", models.families() if THOROUGH else WELL_BEHAVED)
def test_a_family_s_loss_is_cross_entropy_where_nothing_is_read(kind: str) -> None:
    """What a scan of the text could miss: a forward pass whose loss is something else by itself."""
    try:
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **models.tiny_options(kind))).eval()
        if sum(parameter.numel() for parameter in network.parameters()) > 30_000_000:
            raise ValueError("no tiny model")
        ids = torch.randint(0, models.VOCABULARY, (2, 9))
        with torch.no_grad():
            out = network(input_ids=ids, labels=ids, use_cache=False)
    except Exception as error:
        pytest.skip(f"cannot be built tiny: {error}")
    logits = out.logits.float()
    following = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(following.item(), rel=1e-4)


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "vocab_size": 64, "num_local_experts": 4}  # fmt: skip


def refused(
    given: dict[str, Any], auto: Any = AutoModelForCausalLM, kind: str = "mixtral", **keys: Any
) -> list[Problem]:
    cfg = Config(model=ModelConfig(type=kind, config=given))
    for key, value in keys.items():
        section, _, name = key.partition("__")
        setattr(getattr(cfg, section), name, value)
    return check_buildable(auto, scratch_config(kind, {**SIZES, **given} if kind == "mixtral" else given), cfg)


def test_what_cannot_be_is_refused_with_what_can() -> None:
    """Before anything is built, by the check that the plan runs as well."""
    on = {SWITCH: True, "router_aux_loss_coef": 0.1}
    assert refused(on) == [] and refused(on, parallel__tensor=2, parallel__pipeline=2) == []
    (compiled,) = refused(on, train__compile=True)
    assert compiled.key == "train.compile" and SWITCH in compiled.rule and compiled.nearest == "train.compile=false"
    (alone,) = refused({"router_aux_loss_coef": 0.1})
    assert alone.key == "model.config.router_aux_loss_coef" and alone.nearest == f"model.config.{SWITCH}=true"
    assert refused({"router_aux_loss_coef": 0.1, SWITCH: False}) == []
    (head,) = refused({SWITCH: True}, AutoModelForSequenceClassification)
    assert head.key == f"model.config.{SWITCH}" and "MixtralForSequenceClassification" in head.rule
    tokens = {"mtp_loss_scaling_factor": 0.3}
    assert "several tokens" in asked("bailing_hybrid", "BailingHybridForCausalLM", tokens)[0].rule


def test_an_axis_that_was_not_found_right_is_refused_by_its_key() -> None:
    made = CONFIG_MAPPING["flint"](**{SWITCH: True})
    cfg = Config(model=ModelConfig(type="flint"))
    cfg.parallel.sequence = 2
    (problem,) = problems(type("FlintForCausalLM", (), {"config": made})(), cfg)
    assert problem.key == "parallel.sequence" and problem.nearest == "parallel.sequence=1" and SWITCH in problem.rule


def test_a_folder_that_says_so(tmp_path: Path) -> None:
    """A pretrained model's own configuration counts as the request's does, and what cannot is named with its file."""
    made = CONFIG_MAPPING["bamba"](z_loss_coefficient=1e-4)
    cfg = Config(model=ModelConfig(path=str(tmp_path)))
    (problem,) = problems(type("BambaForCausalLM", (), {"config": made})(), cfg)
    assert problem.key == "model.path" and "z_loss_coefficient=0.0001" in problem.rule
    assert problem.nearest == "z_loss_coefficient: 0 in its config.json"
    scratch_config("mixtral", {**SIZES, SWITCH: True}).save_pretrained(tmp_path)
    recipe = CausalLM(cfg)
    recipe._folder = tmp_path
    assert recipe.balances_routers()
