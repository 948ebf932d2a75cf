"""Every task in every layout: gradients of one process, and the same predictions at any number of ranks."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

from conf.batch import Layout
from conf.schema import (
    BatchConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
)
from recipes import recipe_class
from recipes.models.build import from_scratch

pytestmark = pytest.mark.slow
RELATIVE = 1e-5
"""As for language models; a gradient that is all rounding is measured against a hundredth of the largest one."""
GLOBAL = 8
WORDS = ("the", "a", "small", "large", "red", "blue", "cat", "dog", "house", "tree", "runs", "sleeps", "sees", "likes")
BERT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0,
}  # fmt: skip
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
VIT = {
    "image_size": 8, "num_channels": 1, "patch_size": 2, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CNN = {
    "image_size": 8, "num_channels": 1, "patch_size": 1, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1],
    "drop_path_rate": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One task with a model in a layout."""

    task: str
    model: str
    stage: int = 1
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    beams: int = 1

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline


MODELS = {
    "sequence_classification": (("bert", BERT), ("llama", LLAMA)),
    "token_classification": (("bert", BERT),),
    "question_answering": (("bert", BERT),),
    "translation": (("bart", BART), ("llama", LLAMA)),
    "image_classification": (("vit", VIT), ("convnext", CNN)),
    "regression": (("linear_regression", {}), ("bert", BERT)),
}
CONFIGS = {name: config for models in MODELS.values() for name, config in models}


def layouts(task: str, model: str) -> list[Case]:
    """ZeRO 0 to 3 on two data ranks, and tensor and pipeline where the family has plans."""
    cases = [Case(task, model, stage, data=2) for stage in range(4)]
    if model in ("bert", "llama", "vit"):
        cases.append(Case(task, model, tensor=2))
    if model in ("bert", "llama", "vit", "convnext") and task != "translation":
        cases.append(Case(task, model, pipeline=2))
    return cases


CASES = [case for task, models in MODELS.items() for model, _ in models for case in layouts(task, model)]
BEAMS = {
    data: [Case("translation", model, stage, data, beams=3)
           for model in ("bart", "llama") for stage in ((0,) if data == 1 else (0, 3))]
    for data in (1, 2)
}  # fmt: skip
COUNTS = [Case(task, model, 0, data) for task, models in MODELS.items() for model, _ in models for data in (1, 2, 4)]


DATA: dict[str, dict[str, Any]] = {
    "sequence_classification": {"kind": "jsonl", "path": "rows.jsonl", "label": "label"},
    "token_classification": {"kind": "conll", "path": "rows.conll"},
    "question_answering": {"kind": "squad", "path": "rows.json", "stride": 4},
    "translation": {"kind": "lines", "path": "one.txt", "target_path": "other.txt"},
    "image_classification": {"kind": "digits"},
    "regression": {"kind": "line"},
    "regression of texts": {"kind": "jsonl", "path": "values.jsonl", "label": "value"},
}
"""Keys of `data` for each task; files are relative to a folder."""


def write_rows(folder: Path) -> None:
    """A small data set for each task that reads files."""
    draw = np.random.default_rng(0)
    sentences = [" ".join(draw.choice(WORDS, draw.integers(2, 14))) for _ in range(40)]
    rows = [{"text": text, "label": ["cat", "dog", "none"][number % 3]} for number, text in enumerate(sentences)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = [{"text": text, "value": text.count("cat") - 0.5 * text.count("dog")} for text in sentences]
    (folder / "values.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    tagged = [
        "\n".join(f"{word}\t{'B-thing' if word in ('cat', 'dog') else 'O'}" for word in text.split())
        for text in sentences
    ]
    (folder / "rows.conll").write_text("\n\n".join(tagged) + "\n")
    articles = []
    for number, text in enumerate(sentences):
        answer = {"text": text.split()[-1], "answer_start": text.rindex(" ") + 1}
        asked = {"id": str(number), "question": "which one?", "answers": [answer]}
        articles.append({"title": str(number), "paragraphs": [{"context": text, "qas": [asked]}]})
    (folder / "rows.json").write_text(json.dumps({"data": articles}))
    (folder / "one.txt").write_text("\n".join(sentences) + "\n")
    (folder / "other.txt").write_text("\n".join(text.upper() for text in sentences) + "\n")


def configuration(case: Case, folder: Path) -> tuple[Config, Layout]:
    accumulation = 2
    of_texts = case.task == "regression" and case.model != "linear_regression"
    data = DATA["regression of texts" if of_texts else case.task]
    given = {key: str(folder / value) if "path" in key else value for key, value in data.items()}
    cfg = Config(
        task=case.task,
        model=ModelConfig(type=case.model, config=dict(CONFIGS[case.model])),
        data=DataConfig(**given, seq_length=32, vocab_size=300, held_out=0.25, cache_dir=str(folder / "cache")),
        batch=BatchConfig(
            global_size=GLOBAL, micro_size=GLOBAL // accumulation // case.data, accumulation=accumulation
        ),
        train=TrainConfig(steps=3),
        optimizer=OptimizerConfig(name="sgd", lr=0.1, momentum=0.0, gradient_clipping=0.0),
        scheduler=SchedulerConfig(name="constant"),
        eval=EvalConfig(micro_size=3, new_tokens=8, beams=case.beams),
    )
    cfg.zero.stage, cfg.zero.param_persistence_threshold = case.stage, 0
    cfg.parallel.tensor, cfg.parallel.pipeline = case.tensor, case.pipeline
    return cfg, Layout.of(case.world, cfg.parallel)


def train(rank: int, world: int, cases: list[Case], folder: Path, steps: int) -> list[Any]:
    """For each case: (loss and {name: gradient} of the first step, metrics and predictions after the last)."""
    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import held_out_batches, training_batches
    from launch.runtime.staged import make_engine

    results: list[Any] = []
    for case in cases:
        cfg, layout = configuration(case, folder)
        recipe = recipe_class(case.task)(cfg)
        recipe.prepare()
        engine = make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), torch.device("cpu"), steps)
        place = layout.place(rank)
        first: Any = None
        for step in range(steps):
            gradients: dict[str, Any] = {}

            def inspect(e, into=gradients):
                into.update({name: g.clone().numpy() for name, g in e.gradients()})

            result = engine.train_step(training_batches(step, place.data, recipe, cfg, layout), inspect)
            first = first or (result.loss, gradients if place.data == place.tensor == 0 else {})
        evaluation = engine.evaluate(held_out_batches(place.data, recipe, cfg, layout))
        results.append((*first, evaluation.metrics, evaluation.predictions))
        engine.ds.destroy()
    return results


@pytest.fixture(scope="module")
def folder() -> Path:
    made = Path(tempfile.mkdtemp())
    write_rows(made)
    return made


@functools.cache
def reference(task: str, model: str, folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one process, row by row: no padding, no accumulation, no layout."""
    cfg, _ = configuration(Case(task, model), folder)
    recipe = recipe_class(task)(cfg)
    recipe.prepare()
    network = from_scratch(
        recipe.hf_class(),
        recipe.model_config(),
        seed=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attention=None,
    )
    recipe.adopt(network)
    total, count = torch.zeros(()), 0
    for index in range(GLOBAL):
        batch = recipe.collate([recipe.train.row(index)], 1)
        count += recipe.count(batch)[0]
        total = total + recipe.loss(network, {name: torch.from_numpy(value) for name, value in batch.items()})
    (total / count).backward()
    gradients = {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None}
    return (total / count).item(), gradients


@functools.cache
def results(world: int, cases: tuple[Case, ...], folder: Path, steps: int) -> list[list[Any]]:
    ranks = run_ranks(world, train, list(cases), folder, steps, timeout_s=600)
    return [[rank[number] for rank in ranks] for number in range(len(cases))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_a_task(case: Case, folder: Path) -> None:
    loss, gradients = reference(case.task, case.model, folder)
    found = results(2, tuple(CASES), folder, 1)[CASES.index(case)]
    seen: dict[str, Any] = {}
    for measured, mine, _, _ in found:
        assert measured == pytest.approx(loss, rel=RELATIVE)
        seen |= mine
    assert gradients.keys() <= seen.keys(), gradients.keys() - seen.keys()
    floor = 1e-2 * max(np.linalg.norm(g) for g in gradients.values())
    for name, gradient in gradients.items():
        error = np.linalg.norm(seen[name] - gradient) / max(np.linalg.norm(gradient), floor)
        assert error < RELATIVE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("task, model", [(case.task, case.model) for case in COUNTS if case.data == 1])
def test_predictions_do_not_depend_on_the_number_of_ranks(task: str, model: str, folder: Path) -> None:
    """Every held-out row once, in order, with the same metrics."""
    cases = {case.data: case for case in COUNTS if (case.task, case.model) == (task, model)}
    answers = {}
    for data in (1, 2, 4):
        mine = tuple(case for case in COUNTS if case.data == data)
        metrics, predictions = results(data, mine, folder, 3)[mine.index(cases[data])][0][2:]
        answers[data] = metrics, predictions
    one, rows = answers[1]
    assert len({str(row["id"]) for row in rows}) == len(rows) > 5
    for metrics, predictions in (answers[2], answers[4]):
        shown, expected = predictions, rows
        if task == "regression":
            assert [row["id"] for row in shown] == [row["id"] for row in expected]
            np.testing.assert_allclose([r["prediction"] for r in shown], [r["prediction"] for r in expected], rtol=1e-5)
        else:
            assert shown == expected
        assert metrics == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_beams(folder: Path) -> None:
    """A search over several continuations: the same on one and two ranks and under ZeRO-3, and not the greedy texts."""
    found = {
        case: results(data, tuple(cases), folder, 3)[number][0][3]
        for data, cases in BEAMS.items()
        for number, case in enumerate(cases)
    }
    for model in ("bart", "llama"):
        texts = {case: [row["prediction"] for row in rows] for case, rows in found.items() if case.model == model}
        alone = texts[Case("translation", model, 0, 1, beams=3)]
        assert len(texts) == 3 and all(those == alone for those in texts.values())
        greedy = Case("translation", model, 0, 1)
        mine = tuple(case for case in COUNTS if case.data == 1)
        rows = results(1, mine, folder, 3)[mine.index(greedy)][0][3]
        assert [row["prediction"] for row in rows] != alone
