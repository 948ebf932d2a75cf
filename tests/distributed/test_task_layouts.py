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
from transformers import PreTrainedModel

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
from recipes.base import Recipe
from recipes.models.build import _learning_all_tokens, from_scratch

pytestmark = pytest.mark.slow
RELATIVE = 1e-5
"""As for language models; a gradient that is all rounding is measured against a hundredth of the largest one."""
GLOBAL = 8
WORDS = ("the", "a", "small", "large", "red", "blue", "cat", "dog", "house", "tree", "runs", "sleeps", "sees", "likes")
BERT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
VIT = {
    "image_size": 8, "num_channels": 1, "patch_size": 2, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
CNN = {
    "image_size": 8, "num_channels": 1, "patch_size": 1, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1],
    "drop_path_rate": 0.0,
}  # fmt: skip


T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
}  # fmt: skip
MARIAN = {**BART, "decoder_vocab_size": None}
PRETRAINED = "pretrained bert"
"""A folder with weights and a tokenizer, and no head."""


@dataclass(frozen=True)
class Case:
    """One task with a model in a layout. rows: the task, and after a colon which of its rows."""

    rows: str
    model: str
    stage: int = 1
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    beams: int = 1
    ends_often: bool = False
    """A text ends at every third token of the vocabulary."""

    @property
    def task(self) -> str:
        return self.rows.partition(":")[0]

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline


MODELS = {
    "sequence_classification": ("bert", "modernbert", "llama", PRETRAINED),
    "sequence_classification: pairs with several classes": ("bert",),
    "token_classification": ("bert", "llama"),
    "question_answering": ("bert",),
    "translation": ("bart", "t5", "marian", "llama"),
    "image_classification": ("vit", "convnext"),
    "regression": ("linear_regression",),
    "regression: of texts": ("bert",),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT, "modernbert": BERT, "llama": LLAMA, "bart": BART, "t5": T5, "marian": MARIAN, "vit": VIT,
    "convnext": CNN, "linear_regression": {},
}  # fmt: skip
WITH_PLANS = ("bert", "modernbert", "llama", "vit", PRETRAINED)


def layouts(rows: str, model: str) -> list[Case]:
    """ZeRO 0 to 3 on two data ranks, and tensor and pipeline where the family has plans."""
    cases = [Case(rows, model, stage, data=2) for stage in range(4)]
    if model in WITH_PLANS:
        cases.append(Case(rows, model, tensor=2))
    if model in (*WITH_PLANS, "convnext") and rows != "translation":
        cases.append(Case(rows, model, pipeline=2))
    return cases


CASES = [case for rows, models in MODELS.items() for model in models for case in layouts(rows, model)]
ALONE = [Case(rows, model, 0) for rows, models in MODELS.items() for model in models]
BEAMS = {
    data: [Case("translation", model, stage, data, beams=3)
           for model in ("bart", "llama") for stage in ((0,) if data == 1 else (0, 3))]
    for data in (1, 2)
}  # fmt: skip
COUNTS = [Case(rows, model, 0, data) for rows, models in MODELS.items() for model in models for data in (1, 2, 4)]
UNEVEN = [Case("translation", "t5", 3, data, ends_often=True) for data in (1, 2)]


DATA: dict[str, dict[str, Any]] = {
    "sequence_classification": {"kind": "jsonl", "path": "rows.jsonl", "label": "label"},
    "token_classification": {"kind": "conll", "path": "rows.conll"},
    "question_answering": {"kind": "squad", "path": "rows.json", "stride": 4},
    "translation": {"kind": "lines", "path": "one.txt", "target_path": "other.txt"},
    "image_classification": {"kind": "digits"},
    "regression": {"kind": "line"},
    "regression: of texts": {"kind": "jsonl", "path": "values.jsonl", "label": "value"},
    "sequence_classification: pairs with several classes": {
        "kind": "jsonl", "path": "pairs.jsonl", "pair": "second", "label": "found", "multi_label": True,
    },
}  # fmt: skip
"""Keys of `data` for each kind of rows; files are relative to a folder."""


def write_rows(folder: Path) -> None:
    """A small data set for each task that reads files."""
    draw = np.random.default_rng(0)
    sentences = [" ".join(draw.choice(WORDS, draw.integers(2, 14))) for _ in range(40)]
    rows = [{"text": text, "label": ["cat", "dog", "none"][number % 3]} for number, text in enumerate(sentences)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = [{"text": text, "value": text.count("cat") - 0.5 * text.count("dog")} for text in sentences]
    (folder / "values.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    pairs = [
        {"text": text, "second": other, "found": [word for word in ("cat", "dog") if word in f"{text} {other}"]}
        for text, other in zip(sentences, reversed(sentences), strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
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


def write_model(folder: Path) -> None:
    """An encoder as it comes from pretraining: other weights than those of seed 0, and no head."""
    from transformers import AutoModel, BertConfig

    from recipes.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    torch.manual_seed(1)
    AutoModel.from_config(BertConfig(**BERT, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def configuration(case: Case, folder: Path) -> tuple[Config, Layout]:
    accumulation = 2
    given = {key: str(folder / value) if "path" in key else value for key, value in DATA[case.rows].items()}
    vocabulary: dict[str, Any] = {"vocab_size": 300}
    model = ModelConfig(type=case.model, config=dict(CONFIGS.get(case.model, {})), dropout=0.0)
    if case.model == PRETRAINED:
        model, vocabulary = ModelConfig(type=None, path=str(folder / "bert"), dropout=0.0), {}
    cfg = Config(
        task=case.task,
        model=model,
        data=DataConfig(**given, **vocabulary, seq_length=32, held_out=0.25, cache_dir=str(folder / "cache")),
        batch=BatchConfig(
            global_size=GLOBAL, micro_size=GLOBAL // accumulation // case.data, accumulation=accumulation
        ),
        train=TrainConfig(steps=3),
        optimizer=OptimizerConfig(name="sgd", lr=0.1, momentum=0.0, gradient_clipping=0.0),
        scheduler=SchedulerConfig(name="constant"),
        eval=EvalConfig(micro_size=1 if case.ends_often else 3, new_tokens=8, beams=case.beams),
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
        if case.ends_often:
            engine.module.generation_config.eos_token_id = list(range(0, 300, 3))
        evaluation = engine.evaluate(held_out_batches(place.data, recipe, cfg, layout))
        results.append((*first, evaluation.metrics, evaluation.predictions))
        engine.ds.destroy()
    return results


@pytest.fixture(scope="module")
def folder() -> Path:
    made = Path(tempfile.mkdtemp())
    write_rows(made)
    write_model(made / "bert")
    return made


def plain_network(recipe: Recipe) -> PreTrainedModel:
    """The recipe's model without any engine, fp32, on this process alone."""
    whole: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": None}
    if recipe.weights() is None:
        return from_scratch(recipe.hf_class(), recipe.model_config(), seed=0, **whole)
    network = _learning_all_tokens(recipe.hf_class().from_pretrained(recipe.weights(), config=recipe.model_config()))
    # The new head is as in a model from scratch with the run's seed: drawn by its names, not by who draws when.
    drawn = from_scratch(recipe.hf_class(), recipe.model_config(), seed=0, **whole).state_dict()
    new = {name: values for name, values in drawn.items() if name.startswith("classifier")}
    assert new and not network.load_state_dict(new, strict=False).unexpected_keys
    return network


@functools.cache
def reference(rows: str, model: str, folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one process, row by row: no padding, no accumulation, no layout."""
    case = Case(rows, model)
    cfg, _ = configuration(case, folder)
    recipe = recipe_class(case.task)(cfg)
    recipe.prepare()
    network = plain_network(recipe)
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


def same_answers(case: Case, found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """The same predictions for the same rows, and the same metrics."""
    (metrics, predictions), (wanted, rows) = found, expected
    if case.task == "regression":
        assert [row["id"] for row in predictions] == [row["id"] for row in rows]
        values = [[row["prediction"] for row in side] for side in (predictions, rows)]
        np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6)
    else:
        assert predictions == rows
    assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_a_task(case: Case, folder: Path) -> None:
    """And what the model predicts after the step."""
    loss, gradients = reference(case.rows, case.model, folder)
    found = results(2, tuple(CASES), folder, 1)[CASES.index(case)]
    seen: dict[str, Any] = {}
    for measured, mine, _, _ in found:
        assert measured == pytest.approx(loss, rel=RELATIVE)
        seen |= mine
    alone = results(1, tuple(ALONE), folder, 1)[ALONE.index(Case(case.rows, case.model, 0))][0]
    same_answers(case, found[0][2:], alone[2:])
    assert gradients.keys() <= seen.keys(), gradients.keys() - seen.keys()
    floor = 1e-2 * max(np.linalg.norm(g) for g in gradients.values())
    for name, gradient in gradients.items():
        error = np.linalg.norm(seen[name] - gradient) / max(np.linalg.norm(gradient), floor)
        assert error < RELATIVE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("rows, model", [(case.rows, case.model) for case in ALONE])
def test_predictions_do_not_depend_on_the_number_of_ranks(rows: str, model: str, folder: Path) -> None:
    """Every held-out row once, in order, with the same metrics."""
    answers = {}
    for data in (1, 2, 4):
        case, mine = Case(rows, model, 0, data), tuple(case for case in COUNTS if case.data == data)
        answers[data] = results(data, mine, folder, 3)[mine.index(case)][0][2:]
    predictions = answers[1][1]
    assert len({str(row["id"]) for row in predictions}) == len(predictions) > 5
    for data in (2, 4):
        same_answers(Case(rows, model), answers[data], answers[1])


def test_ranks_that_end_their_texts_at_different_lengths(folder: Path) -> None:
    """Under ZeRO-3 a rank whose texts are all ended goes on with the others; nobody hangs, nothing is added."""
    alone, together = (results(case.data, (case,), folder, 1)[0][0][2:] for case in UNEVEN)
    same_answers(UNEVEN[1], together, alone)
    assert len({len(row["prediction"]) for row in alone[1]}) > 1


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
