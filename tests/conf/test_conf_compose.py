"""From the command line's overrides to a typed configuration: what is accepted, and every mistake at once."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conf_cases import CPU, problems_of, quick
from omegaconf import OmegaConf

from conf.compose import compose, hydra_passthrough, list_recipes, to_yaml
from conf.errors import RequestError
from conf.overrides import CONF_DIR
from conf.schema import Config, SourceConfig

ROOT = Path(__file__).resolve().parents[2]


def only(overrides: list[str]):
    (problem,) = problems_of(overrides)
    return problem


def test_quickstart():
    cfg = compose(quick(), 2, CPU)
    assert isinstance(cfg, Config)
    assert (cfg.batch.global_size, cfg.batch.micro_size, cfg.batch.accumulation) == (32, 4, 4)
    assert cfg.eval.micro_size == 4
    assert cfg.optimizer.fused is True
    assert cfg.run_dir == "runs/quickstart"
    assert cfg.model.type == "llama"
    assert cfg.data.kind == "stdlib"


@pytest.mark.parametrize(("world", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_quickstart_keeps_its_global_batch_in_every_world(world, accumulation):
    cfg = compose(quick(), world, CPU)
    assert (cfg.batch.global_size, cfg.batch.accumulation) == (32, accumulation)


def test_the_order_of_overrides_does_not_matter():
    parts = ["+recipe=quickstart", "model=gpt2_tiny", "zero=stage2", "train.steps=70", "model.config.n_layer=3"]
    parts += ["data.seq_length=64"]
    expected = compose(parts, 2, CPU)
    for order in itertools.islice(itertools.permutations(parts), 0, 720, 90):
        assert compose(list(order), 2, CPU) == expected
    assert (expected.model.config["n_layer"], expected.zero.stage, expected.train.steps) == (3, 2, 70)


def test_free_form_keys_need_no_plus():
    cfg = compose(quick("deepspeed.wall_clock_breakdown=true", "+model.config.attention_bias=true"), 1, CPU)
    assert cfg.deepspeed == {"wall_clock_breakdown": True}
    assert cfg.model.config["attention_bias"] is True
    cfg = compose(quick("~model.config.rms_norm_eps"), 1, CPU)
    assert "rms_norm_eps" not in cfg.model.config


def test_a_mixture_has_typed_sources():
    sources = "data.mixture=[{kind: stdlib, weight: 2}, {kind: stdlib}]"
    cfg = compose(quick("data=mixture", sources), 1, CPU)
    assert cfg.data.mixture == [SourceConfig(weight=2.0), SourceConfig()]


def test_yaml_holds_everything():
    cfg = compose(quick("model=gpt2_tiny", "data.seq_length=64"), 2, CPU)
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(to_yaml(cfg))))
    assert again == cfg


def test_every_recipe_is_listed_with_a_description():
    names = [name for name, description in list_recipes() if description]
    assert names == sorted(file.stem for file in (CONF_DIR / "recipe").glob("*.yaml"))
    assert {"finetune_causal_lm", "pretrain_gpt2", "pretrain_llama", "quickstart", "sst2"} <= set(names)


def test_without_a_recipe_they_are_listed():
    problem = only(["train.steps=3"])
    assert problem.key == "+recipe=NAME"
    for name, description in list_recipes():
        assert name in problem.rule
        assert description in problem.rule


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("batch.micro_sise=4", "batch.micro_sise", "batch.micro_size=4"),
        ("micro_size=4", "micro_size", "batch.micro_size=4"),
        ("+train.stpes=40", "train.stpes", "train.steps=40"),
        ("dtaa.path=x", "dtaa.path", "data.path=x"),
        ("optimiser=adamw", "optimiser", "optimizer=adamw"),
        ("zero=2", "zero", "zero=stage2"),
        ("zero=satge3", "zero", "zero=stage3"),
        ("precision=float16", "precision", "precision=fp16"),
        ("precision=bfloat16", "precision", "precision=bf16"),
        ("precision=32", "precision", "precision=fp32"),
        ("model=gpt-2", "model", "model=gpt2"),
        ("model=null", "model", ""),
        ("data=json", "data", "data=jsonl"),
        ("train.steps=many", "train.steps", ""),
        ("train.steps=3.7", "train.steps", "train.steps=4"),
        ("train.steps=1e3", "train.steps", "train.steps=1000"),
        ("batch.micro_size=true", "batch.micro_size", ""),
        ("batch.micro_size=8k", "batch.micro_size", "batch.micro_size=8"),
        ("seed=null", "seed", ""),
        ("optimizer.lr=fast", "optimizer.lr", ""),
        ("overwrite=ture", "overwrite", "overwrite=true"),
        ("name=[a]", "name", ""),
        ("track.to=csv", "track.to", "track.to=[csv]"),
        ("track=csv,wandb", "track", "track.to=[csv,wandb]"),
        ("optimizer.betas=0.9,0.99", "optimizer.betas", "optimizer.betas=[0.9,0.99]"),
        ("seed=1,2", "seed", "seed=1"),
        ("data.mixture=[{kin: text}]", "data.mixture", "kind"),
        ("batch={micro: 3}", "batch.micro", "batch.micro_size=3"),
        ("eval.prompt=def f(", "eval.prompt", "\"eval.prompt='def f('\""),
        ("fast", "fast", ""),
        ("quickstrat", "quickstrat", "+recipe=quickstart"),
        ("--fast", "--fast", ""),
        ("~seed", "~seed", "seed=0"),
        ("~optimizer.momentum", "~optimizer.momentum", "optimizer.momentum=null"),
        ("~model.config.hidden_sise", "~model.config.hidden_sise", "~model.config.hidden_size"),
        ("~model.config.hidden_size=256", "~model.config.hidden_size", "~model.config.hidden_size"),
        ("~model", "~model", ""),
        ("batch={micro_size: 2", "batch", ""),
        ("model.config={}", "model.config", "~model.config takes all of its keys out"),
        ("model={config: {}}", "model.config", "~model.config takes all of its keys out"),
        ("model.config=${data}", "model.config", ""),
        ("deepspeed={flops_profiler.enabled: true}", "deepspeed", ""),
        ("optimizer={lr: fast}", "optimizer.lr", ""),
        ("optimizer={beta: [0, 1]}", "optimizer.beta", "optimizer.betas=[0, 1]"),
        ('batch={"micro": 3}', "batch.micro", "batch.micro_size=3"),
        ("hydra.run.dir=x", "hydra.run.dir", ""),
        ("model@data=gpt2", "model", ""),
        ("name='${nope}'", "name", ""),
    ],
)
def test_one_wrong_override_is_one_problem(override, key, nearest):
    problem = only(quick(override))
    assert problem.key == key
    if nearest:
        assert problem.nearest == nearest


@pytest.mark.parametrize("override", ["zero=stage2", "+recipe=quickstart"])
def test_given_twice(override):
    problem = only(quick(override, override) if "recipe" not in override else [override, override])
    assert "given twice" in problem.rule
    assert problem.nearest == override


def test_the_last_value_of_a_key_counts():
    assert compose(quick("seed=1", "seed=2", "model.config.num_hidden_layers=2"), 2, CPU).seed == 2


def test_unknown_recipe():
    problem = only(["+recipe=quikstart", "train.steps=30"])
    assert (problem.key, problem.nearest) == ("+recipe", "+recipe=quickstart")
    assert only(["recipe=quickstart"]).nearest == "+recipe=quickstart"
    assert only(["+recipe=zzz"]).key == "+recipe"


def test_all_problems_at_once_and_no_echo_of_a_misspelling():
    """Six mistakes of six kinds are six problems: what follows from a misspelt key is not reported again."""
    wrong = ["zero=2", "batch.micro_sise=8", "train.steps=abc", "precision=fp16", "scheduler.warmup_steps=-1"]
    wrong += ["deepspeed.gradient_cliping=1"]
    found = problems_of(quick(*wrong))
    keys = [problem.key for problem in found]
    expected = ["zero", "batch.micro_sise", "train.steps", "precision", "scheduler.warmup_steps"]
    assert sorted(keys) == sorted([*expected, "deepspeed.gradient_cliping"])
    text = RequestError(found).render()
    assert text.startswith("error: 6 problems")
    assert all(key in text for key in expected)


def test_a_removed_key_that_is_not_there():
    assert "model.config.nothing" in str(only(quick("~model.config.nothing")))


def test_world_size_is_positive():
    (problem,) = problems_of(quick(), world=0)
    assert problem.key == "world_size"


def test_a_cold_refusal_takes_no_torch_and_less_than_a_second(tmp_path):
    """The bound is for a quiet machine; four times it still means that torch (2 s alone) was not loaded."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from conf.compose import compose\n"
        "from conf.errors import RequestError\n"
        "compose(['+recipe=quickstart'], 2)\n"
        "try: compose(['+recipe=quickstart', 'zero=2', 'deepspeed.amp.enabled=true'], 2)\n"
        "except RequestError as error: assert len(error.problems) == 2, error\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert time.monotonic() - start < 4


def test_cfg_job_prints_the_resolved_configuration(capsys):
    assert hydra_passthrough(["--cfg", "job", "+recipe=quickstart", "seed=5"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.seed, shown.run_dir, shown.batch.accumulation) == (5, "runs/quickstart", 8)
    assert hydra_passthrough(["+recipe=quickstart", "--cfg", "job", "--package", "batch"]) == 0
    assert capsys.readouterr().out.startswith("global_size: 32")


def test_cfg_job_refuses_what_a_run_refuses():
    with pytest.raises(RequestError, match="zero=stage2"):
        hydra_passthrough(["--cfg", "job", "+recipe=quickstart", "zero=2"])


def test_help_explains_every_group(capsys):
    assert hydra_passthrough(["--help"]) == 0
    text = capsys.readouterr().out
    for group in ("model", "data", "optimizer", "scheduler", "precision", "zero", "parallel", "track", "recipe"):
        assert f"\n  {group} " in text
        assert f"\n{group}: " in text
    assert 'eval "$(python' in text


def test_other_flags(capsys, tmp_path):
    assert hydra_passthrough(["+recipe=quickstart", "seed=3"]) is None
    assert hydra_passthrough(["--info", "defaults", "+recipe=quickstart"]) == 0
    assert "recipe/quickstart" in capsys.readouterr().out
    for flag in ("-m", "--multirun", "--config-dir=x", "--run"):
        with pytest.raises(RequestError):
            hydra_passthrough([flag, "+recipe=quickstart"])
    with pytest.raises(RequestError, match="invalid choice"):
        hydra_passthrough(["--cfg", "jab"])
    assert list(tmp_path.iterdir()) == []


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert hydra_passthrough(["--help"]) == 0
    assert capsys.readouterr().out == ""


def test_shell_completion(tmp_path):
    """The script that bash evaluates, asked for the choices of a group the way bash asks."""
    command = tmp_path / "command.py"
    command.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from conf.compose import hydra_passthrough\n"
        "sys.exit(hydra_passthrough(sys.argv[1:]))\n"
    )
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    script = (
        f'export PATH={python.parent}:$PATH VIRTUAL_ENV={sys.prefix} PYTHONPATH="{":".join(sys.path)}"\n'
        'eval "$(python command.py -sc install=bash)"\n'
        'COMP_LINE="python command.py zero=stage2"; COMP_POINT=${#COMP_LINE}\n'
        "COMP_WORDS=(python command.py zero=stage2); COMP_CWORD=2\n"
        'hydra_bash_completion; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["zero=stage2", "zero=stage2_offload"], done.stderr


def test_another_source_or_model_brings_its_own_settings(tmp_path):
    (tmp_path / "rows.csv").write_text("review,stars\ngood,5\n")
    path = f"data.path={tmp_path / 'rows.csv'}"
    cfg = compose(["+recipe=sst2", "data=csv", path, "data.text=review", "data.label=stars", "model.path=x/y"], 1)
    assert (cfg.data.delimiter, cfg.data.header, cfg.data.labels, cfg.data.text) == (",", None, None, "review")
    assert cfg.data.seq_length == 64, "what is done with rows stays"
    assert compose(["+recipe=sst2", path, "model.path=x/y"], 1).data.labels == ["0", "1"]
    assert compose(["+recipe=tag_python", "data=conll", path], 1).data.max_files is None
    cfg = compose(["+recipe=mnist", "model=pretrained", "model.path=x/y", path, f"data.target_path={tmp_path}"], 1)
    assert cfg.model.config == {}
    assert compose(["+recipe=classify_packages", "model=pretrained", "model.path=x/y"], 1).data.vocab_size is None
    wide = ["+recipe=describe_functions", "model.config.d_model=64"]
    assert compose([*wide, "model.type=t5"], 1).model.config == {"d_model": 64}
    assert compose([*wide, "model.type=bart"], 1).model.config["encoder_layers"] == 3
    assert compose(["+recipe=quickstart", "model.type=gpt2"], 1).model.config == {}


def test_a_recipe_in_another_encoding_is_named(tmp_path, monkeypatch):
    from conf import compose as module

    monkeypatch.setattr(module, "CONF_DIR", tmp_path)
    file = tmp_path / "recipe/mine.yaml"
    file.parent.mkdir()
    for content, said in (
        ("# @package _global_\nname: é\n".encode("latin-1"), "mine.yaml:2: not valid UTF-8: byte 0xe9 at byte 26"),
        ("\ufeffname: é\n".encode(), "conf/recipe/mine.yaml:1: begins with a byte order mark"),
    ):
        file.write_bytes(content)
        with pytest.raises(RequestError) as refused:
            module.choice_file("recipe", "mine")
        assert said in str(refused.value)
    command = refused.value.problems[0].nearest.partition(": ")[2].replace("FILE", str(file))
    subprocess.run(["bash", "-c", command], check=True)
    assert module.choice_file("recipe", "mine") == {"name": "é"}, "the advice works"
