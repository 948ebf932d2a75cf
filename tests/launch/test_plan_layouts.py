"""The plan of layouts: against what the engine really holds, and against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import PLAN, environment, run

from conf.batch import Layout
from conf.schema import Config, DataConfig, ModelConfig, ParallelConfig
from launch.planner.communication import within_a_step
from launch.planner.schedule import bubble, in_flight, simulated_bubble, simulated_in_flight
from recipes.models.shape import model_shape
from recipes.models.stages import balanced_split

LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def shape(parallel: ParallelConfig, kind: str = "llama", **config: Any) -> Any:
    return model_shape(ModelConfig(type=kind, config={**LLAMA, **config}), DataConfig(seq_length=12), "fp32", parallel)


def test_stages_add_up_to_the_model() -> None:
    whole = shape(ParallelConfig())
    for pipeline in (2, 4):
        parts = shape(ParallelConfig(pipeline=pipeline)).parts
        assert sum(part.shape.parameters for part in parts) == whole.parameters
        assert [part.layers[0][0] for part in parts[1:]] == [part.layers[0][1] for part in parts[:-1]]
    first, last = shape(ParallelConfig(pipeline=2), tie_word_embeddings=True).parts
    assert first.shape.embedding == last.shape.embedding == 61 * 32, "a tied embedding is on both"
    ends, turn = shape(ParallelConfig(pipeline=2, schedule="dualpipev"), tie_word_embeddings=True).parts
    assert (ends.layers, turn.layers) == (((0, 1), (3, 4)), ((1, 2), (2, 3)))
    assert ends.shape.parameters + turn.shape.parameters == whole.parameters - 61 * 32, "one embedding, on one rank"


def test_a_rank_holds_what_is_divided_and_what_is_not() -> None:
    """Per layer: four projections and three MLP matrices by two, two norms whole; 61 rows are 31 and 30."""
    (part,) = shape(ParallelConfig(tensor=2)).parts
    layer = (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48) // 2 + 2 * 32
    assert part.shape.parameters == 4 * layer + 2 * 31 * 32 + 32


def test_bytes_that_tensor_ranks_exchange() -> None:
    """Forward: the embedding, two sums a layer. Backward: two a layer. (B, S, H) = (1, 12, 32) in fp32 each."""
    (part,) = shape(ParallelConfig(tensor=2)).parts
    assert (part.traffic.forward, part.traffic.backward) == (9 * 12 * 32 * 4, 8 * 12 * 32 * 4)
    mixture = shape(ParallelConfig(tensor=2), "mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert mixture.activations is None, "routing looks at values"
    assert mixture.parts[0].traffic.forward == 9 * 12 * 32 * 4, "not what was seen until the first router"
    assert mixture.idle == 4 * 4 * 3 * 32 * 48 // 2, "two of four experts"


def test_what_tensor_ranks_send_in_a_step() -> None:
    """Both passes of each sequence, the forward one twice where activations are computed again; 2 (r-1)/r of each."""
    whole = shape(ParallelConfig(tensor=2))
    (part,) = whole.parts
    for checkpointing, forwards in ((0, 1), (1, 2)):
        cfg = Config()
        cfg.batch.micro_size, cfg.batch.accumulation, cfg.train.activation_checkpointing = 3, 4, checkpointing
        sent = within_a_step(part, whole, cfg, Layout(2, 1, tensor=2), 0)
        expected = 12 * (part.traffic.forward * forwards + part.traffic.backward)
        assert sum(sent.values()) == pytest.approx(expected, rel=1e-6)


def test_the_bubble_by_hand() -> None:
    assert bubble([1, 1], 4) == pytest.approx(1 / 5)
    assert bubble([1, 1, 1, 1], 8) == pytest.approx(3 / 11)
    assert bubble([1.0], 8) == 0.0
    assert bubble([1, 3], 8) == pytest.approx(1 - 8 * 4 / (2 * (7 * 3 + 4)))
    assert [in_flight(stage, 4, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(0, 4, 2) == 2


def folded(ranks: int, micro_batches: int) -> list:
    from launch.runtime.pipeline import programs

    return programs(Layout(ranks, 1, pipeline=ranks, schedule="dualpipev"), micro_batches)


def test_the_bubble_of_a_folded_pipeline() -> None:
    """Shorter than in 1F1B, and the more micro-batches the shorter; two stages of each rank count for one."""
    for ranks, micro_batches in ((2, 4), (2, 16), (4, 8), (4, 32)):
        costs = [1.0] * (2 * ranks)
        found = simulated_bubble(folded(ranks, micro_batches), costs)
        assert 0 < found < bubble([1.0] * ranks, micro_batches), "less than 1F1B"
    more = [simulated_bubble(folded(2, steps), [1.0] * 4) for steps in (4, 8, 16, 32)]
    assert more == sorted(more, reverse=True)
    assert simulated_in_flight(folded(2, 8)[0], {0: 0.5, 3: 0.5}) == pytest.approx(2.5)


def test_stages_of_equal_cost() -> None:
    assert balanced_split([1, 1, 1, 1], 0, 0, 2) == [2, 2]
    assert balanced_split([1, 1, 1, 1], 0, 2, 2) == [3, 1], "a head as heavy as two layers"
    assert balanced_split([1, 1, 1, 1], 0, 0, 4) == [1, 1, 1, 1]
    assert balanced_split([5, 1, 1, 1], 0, 0, 2) == [1, 3]


@pytest.mark.slow
def test_the_search_lists_what_is_legal_and_why_the_rest_is_not(tmp_path: Path) -> None:
    command = ["python", PLAN, "+recipe=quickstart", "world_size=6", "batch.global_size=24", "search=true"]
    env = environment(tmp_path)
    said = run(command, tmp_path, env)
    assert said.returncode == 0, said.stderr
    assert "6×1×1×1" in said.stdout and "4 layers cannot be divided over 6 stages" in said.stdout
    assert "8 attention heads cannot be divided over 3 tensor ranks" in said.stdout
    listed = json.loads(run([*command, "format=json"], tmp_path, env).stdout, parse_constant=pytest.fail)
    legal = [entry for entry in listed if entry["plan"]]
    assert [entry["seconds"] for entry in legal] == sorted(entry["seconds"] for entry in legal)
    assert all(entry["why_not"] for entry in listed if not entry["plan"])
    assert len(listed) == 4 * 4 + sum(entry["layout"]["pipeline"] > 1 for entry in listed) / 2
    folded = next(entry for entry in legal if entry["layout"]["schedule"] == "dualpipev")
    assert folded["plan"]["batch"]["accumulation"] >= 2 * folded["layout"]["pipeline"]
    for wrong in ("rate=0", "bandwidth=nan", "rate=fast"):
        done = run([*command, wrong], tmp_path, env)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {wrong}"), done.stderr


@pytest.mark.slow
def test_every_family_that_can_be_cut_can_be_planned(tmp_path: Path) -> None:
    """Falcon and MPT have attention of their own, which cannot be exchanged for one that is traced."""
    for kind, config in (
        ("falcon", "{hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4, vocab_size: 512}"),
        ("mpt", "{d_model: 64, n_layers: 4, n_heads: 4}"),
    ):
        command = ["python", PLAN, "+recipe=quickstart", "world_size=2", "model=pretrained", f"model.type={kind}",
                   f"model.config={config}", "data.packing=blocks", "parallel.pipeline=2"]  # fmt: skip
        said = run(command, tmp_path, environment(tmp_path))
        assert said.returncode == 0, said.stderr
        assert "predicted" in said.stdout and "stage" in said.stdout
