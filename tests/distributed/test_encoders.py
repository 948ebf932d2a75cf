"""Encoders and classification heads in layouts of two ranks, against one process.

One world of two ranks for all families. Each holds all stages of its tensor rank and hands on between them itself, so
that a pipeline needs no engine.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from ranks import run_ranks
from tiny import VOCABULARY
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from conf.schema import ParallelConfig
from recipes.models import layouts
from recipes.models.collectives import RankGroup
from recipes.models.costs import layer_costs
from recipes.models.plans import NoPlanError, pipeline_plan
from recipes.models.stages import Stage, cut, ranges
from recipes.models.tensor_parallel import check, shard, take_shares

ROWS, LENGTH, LABELS, PAD = 3, 10, 5, 1
RELATIVE = 1e-5
_BERT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "hidden_dropout": 0.0,
}  # fmt: skip
_RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "pooler_dropout": 0.0,
    "pooler_hidden_size": 32,
}
TEXT: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _BERT),
    "electra": {**_BERT, "embedding_size": 16, "summary_last_dropout": 0.0},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, "max_position_embeddings": 32,
                   "dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0, "seq_classif_dropout": 0.0},
    "modernbert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "max_position_embeddings": 32, "local_attention": 6, "global_attn_every_n_layers": 2},
    "deberta": {**_BERT, **_RELATIVE, "type_vocab_size": 2},
    "deberta-v2": {**_BERT, **_RELATIVE, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3,
                   "share_att_key": True},
    "albert": {**_BERT, "embedding_size": 16, "classifier_dropout_prob": 0.0, "num_hidden_groups": 2},
    "mpnet": _BERT,
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0, "hidden_dropout": 0.0},
}  # fmt: skip
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 4},
    "convnext": {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "patch_size": 2, "image_size": 32},
    "bit": {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 2, 1, 1], "num_groups": 4},
}  # fmt: skip
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
WITH_SEGMENTS = ("bert", "electra", "albert", "deberta", "deberta-v2")
UNCUT = ("albert", "deberta", "deberta-v2", "mpnet")
UNDIVIDED = ("bit",)
"""Families without a tensor plan."""
MODELS = [
    *((family, head) for family in TEXT for head in HEADS),
    *((family, "ImageClassification") for family in IMAGES),
]
LAYOUTS = ("tensor", "pipeline", "v", "tensor and pipeline")
"""`v`: four stages, two of which one model holds (DualPipeV)."""
CASES = [
    (family, head, layout)
    for family, head in MODELS
    for layout in LAYOUTS
    if (family not in UNCUT or layout == "tensor")
    and (family not in UNDIVIDED or "tensor" not in layout)
    and (head not in HEADS[1:] or layout != "tensor and pipeline")
]
"""Both axes at once with one head each."""


def build(family: str, head: str) -> PreTrainedModel:
    """A tiny model whose every parameter matters: no zero biases, no norm of ones."""
    options = {**TEXT, **IMAGES}[family]
    special = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
    labels = 2 if head == "QuestionAnswering" else LABELS
    config = AutoConfig.for_model(family, **options, **(special if family in TEXT else {}), num_labels=labels)
    torch.manual_seed(0)
    attention = "eager" if head == "SequenceClassification" or family == "vit" else None
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batches(family: str, head: str, count: int = 2) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(inputs, labels) of each micro-batch; rows are padded to the same length, from very different ones."""
    draw = torch.Generator().manual_seed(1)
    for number in range(count):
        if family in IMAGES:
            size = IMAGES[family].get("image_size", 32)
            inputs = {"pixel_values": torch.randn(ROWS, 3, size, size, generator=draw)}
            yield inputs, {"labels": torch.randint(LABELS, (ROWS,), generator=draw)}
            continue
        lengths = torch.tensor([LENGTH, 3 + number, 6])[:, None]
        mask = (torch.arange(LENGTH) < lengths).long()
        ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=draw)
        inputs = {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}
        if family in WITH_SEGMENTS:
            inputs["token_type_ids"] = (torch.arange(LENGTH) >= lengths // 2).long() * mask
        if head == "SequenceClassification":
            yield inputs, {"labels": torch.randint(LABELS, (ROWS,), generator=draw)}
        elif head == "TokenClassification":
            labels = torch.randint(LABELS, (ROWS, LENGTH), generator=draw)
            yield inputs, {"labels": labels.where(mask.bool(), -100)}
        else:
            yield inputs, {"start_positions": torch.tensor([4, 0, 2]), "end_positions": torch.tensor([7, 1, 5])}


def loss_through(stages: Sequence[Stage], inputs: dict[str, Any], labels: dict[str, Any]) -> float:
    """One micro-batch through all stages and back, each with a gradient of its own like on its own rank."""
    sent: list[torch.Tensor] = []
    received: list[torch.Tensor] = []
    for stage in stages[:-1]:
        with stage.alone():
            sent.append(stage.forward(**inputs))
        received.append(sent[-1].detach().requires_grad_())
        stages[len(sent)].receive(received[-1])
    with stages[-1].alone():
        loss = stages[-1].model(**inputs, **labels).loss / 2
    loss.backward()
    for leaving, entered in zip(reversed(sent), reversed(received), strict=True):
        assert entered.grad is not None
        leaving.backward(entered.grad)
    return loss.item()


def divided(model: PreTrainedModel, layout: str, ranks: RankGroup) -> list[Stage]:
    """Stages in order, of copies of `model` that hold one or (`v`) two of them; none holds what is another's."""
    models: list[PreTrainedModel] = [copy.deepcopy(model)]
    stages = [Stage(models[0])]
    if layout == "v":
        models.append(copy.deepcopy(model))
        numbers = [range(n, n + 1) for n in range(4)]
        outer, inner = (
            cut(m, {n: numbers[n] for n in own}, 4) for m, own in zip(models, ((0, 3), (1, 2)), strict=True)
        )
        stages = [outer[0], inner[0], inner[1], outer[1]]
    elif layout != "tensor":
        models.append(copy.deepcopy(model))
        layers = ranges(layouts.split(model, ParallelConfig(pipeline=2)))
        stages = [cut(m, {n: layers[n]}, 2)[0] for n, m in enumerate(models)]
    if "tensor" in layout:
        for one in models:
            shard(one, ranks)
            take_shares(list(one.parameters()), ranks)
    return stages


def errors(
    stages: Sequence[Stage], loss: float, expected: dict[str, torch.Tensor], expected_loss: float, ranks: RankGroup
) -> dict[str, float]:
    """Relative error of the loss and of each parameter's gradient, on this rank's share of it.

    A small one is measured against a hundredth of the largest, and one that is all rounding against the largest itself:
    that of a key's bias, or of a span head's (a softmax does not change when all its logits do).
    """
    largest = max(gradient.norm().item() for gradient in expected.values())
    found = {"loss": abs(loss - expected_loss) / expected_loss}
    for model in {id(stage.model): stage.model for stage in stages}.values():
        for name, parameter in model.named_parameters():
            assert name not in found, f"{name} is on two stages"
            cut = getattr(parameter, "tensor_cut", None)
            whole = expected[name] if cut is None else cut.take(expected[name], ranks.rank, ranks.size)
            gradient = torch.zeros_like(whole) if parameter.grad is None else parameter.grad
            size = whole.norm().item()
            scale = largest if size < 1e-6 * largest else max(size, 1e-2 * largest)
            found[name] = (gradient - whole).norm().item() / scale
    assert found.keys() == {"loss", *expected}, sorted(found.keys() ^ expected.keys())
    return found


def compare(rank: int, world: int, cases: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], str]:
    """What is wrong with each case, in words; "" where nothing is."""
    ranks = RankGroup(None, rank, world)
    verdicts = {}
    for family, head in dict.fromkeys((family, head) for family, head, _ in cases):
        model = build(family, head)
        alone = copy.deepcopy(model)
        expected_loss = sum(loss_through([Stage(alone)], *batch) for batch in batches(family, head))
        expected = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in alone.named_parameters()
        }
        for layout in (case[2] for case in cases if case[:2] == (family, head)):
            if "tensor" not in layout and (LAYOUTS.index(layout) + rank) % world:
                continue  # nothing is divided: one rank has all stages, and the other has another layout's
            stages = divided(model, layout, ranks)
            loss = sum(loss_through(stages, *batch) for batch in batches(family, head))
            wrong = errors(stages, loss, expected, expected_loss, ranks)
            worst = max(wrong, key=lambda name: wrong[name])
            why = "" if wrong[worst] < RELATIVE else f"{worst} is off by {wrong[worst]:.0e}"
            verdicts[family, head, layout] = why
    return verdicts


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str, str], list[str]]:
    both = run_ranks(2, compare, CASES, timeout_s=600)
    return {case: [verdict[case] for verdict in both if case in verdict] for case in CASES}


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_gradients(family: str, head: str, verdicts: dict[tuple[str, str, str], list[str]]) -> None:
    mine = {layout: verdicts[family, head, layout] for layout in LAYOUTS if (family, head, layout) in verdicts}
    assert mine == {layout: ["", ""] if "tensor" in layout else [""] for layout in mine}


def on_meta(family: str, head: str = "SequenceClassification", **options: Any) -> PreTrainedModel:
    labels = 2 if head == "QuestionAnswering" else LABELS
    config = AutoConfig.for_model(family, **{**{**TEXT, **IMAGES}[family], **options}, num_labels=labels)
    with torch.device("meta"):
        return getattr(transformers, f"AutoModelFor{head}").from_config(config)


@pytest.mark.parametrize("family", UNCUT)
def test_a_family_whose_layers_share_something_is_not_cut(family: str) -> None:
    with pytest.raises(NoPlanError, match=f"{family} cannot be cut into stages: all its layers"):
        pipeline_plan(on_meta(family))


@pytest.mark.parametrize("family", [*TEXT, "vit"])
def test_heads_that_do_not_divide(family: str) -> None:
    head = "ImageClassification" if family in IMAGES else "SequenceClassification"
    with pytest.raises(NoPlanError, match="4 attention heads cannot be divided over 3 tensor ranks"):
        check(on_meta(family, head), 3)


def test_talking_heads_are_refused() -> None:
    with pytest.raises(NoPlanError, match="head_logits_proj is cut by `mixed_heads`, which is not supported"):
        check(on_meta("deberta", talking_head=True), 2)


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_what_was_compared_is_let_through(family: str, head: str) -> None:
    model = on_meta(family, head)
    divided, cut = family not in UNDIVIDED, family not in UNCUT
    assert (layouts.problems(model, ParallelConfig(tensor=2)) == []) == divided
    assert (layouts.problems(model, ParallelConfig(pipeline=2)) == []) == cut
    assert (layouts.problems(model, ParallelConfig(tensor=2, pipeline=2)) == []) == (divided and cut)
    (refused,) = layouts.problems(model, ParallelConfig(sequence=2))
    assert "whole sequences" in refused.rule
    assert refused.nearest == "parallel.sequence=1"


def test_costs() -> None:
    bert = on_meta("bert")
    layers, before, after = layer_costs(bert)
    assert before == 32, "an embedding is looked up"
    assert after == 32 * LABELS + LABELS, "the classifier stands beside the base model"
    assert len(set(layers)) == 1
    vit = on_meta("vit", "ImageClassification")
    _, before, _ = layer_costs(vit)
    assert before == sum(p.numel() for p in vit.vit.embeddings.parameters())
    convnext = on_meta("convnext", "ImageClassification")
    layers, _, after = layer_costs(convnext)
    sizes = [sum(p.numel() for p in stage.parameters()) for stage in convnext.convnext.encoder.stages]
    assert layers == [size / 4**number for number, size in enumerate(sizes)], "a stage has a quarter of the pixels"
    assert after == (24 * LABELS + LABELS) / 4**4


@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta", "distilbert"])
def test_a_tied_head_on_the_last_stage_owns_the_embedding(family: str) -> None:
    """A masked language model: its table lies inside of the embeddings, of which the last stage has nothing else."""
    whole = on_meta(family, "MaskedLM")
    whole.tie_weights()
    last = copy.deepcopy(whole)
    last.tie_weights()
    cut(last, {1: range(2, 4)}, 2)
    table = last.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    assert table.weight is last.get_output_embeddings().weight
    names = {name for name, _ in last.named_parameters()}
    assert [name for name in names if ".embeddings." in name] == [
        name for name, parameter in whole.named_parameters() if parameter is whole.get_input_embeddings().weight
    ]
    first = copy.deepcopy(whole)
    cut(first, {0: range(2)}, 2)
    assert not isinstance(first.get_output_embeddings(), nn.Linear), "the head is elsewhere"
    assert names | {name for name, _ in first.named_parameters()} == {name for name, _ in whole.named_parameters()}
