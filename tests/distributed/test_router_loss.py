"""The load-balancing loss of a mixture's routers: transformers' own function of each row, in every layout."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from layouts import MODELS, Case, errors, reference, train
from ranks import run_ranks

from recipes.models.collectives import RankGroup
from recipes.models.router_loss import RouterLoss

RELATIVE = 1e-5
"""As for any other gradient; the worst of one parameter is 2e-6."""
COUNTS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
"""So large a factor that no bound could hide the routers' part of the gradient."""
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": MODELS["mixtral"],
    "qwen2_moe": {
        "type": "qwen2_moe", **SIZES, "num_experts": 6, "intermediate_size": 48, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "mlp_only_layers": [0, 1],
    },
    "olmoe": {"type": "olmoe", **SIZES, "num_experts": 4, "intermediate_size": 32},
}  # fmt: skip
"""Qwen2-MoE with a first stage that has no router."""


def tiny(family: str, **more: Any) -> str:
    return json.dumps({"vocab_size": 61, **FAMILIES[family], **more})


LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}, {"accumulation": 4, "packed": False}, {"stage": 3, "checkpointing": 1}],
    2: [
        {"data": 2, "stage": 3, "accumulation": 4, "packed": False}, {"tensor": 2},
        {"sequence": 2, "accumulation": 4, "packed": False}, {"sequence": 2},
        {"pipeline": 2, "accumulation": 4, "checkpointing": 1}, {"pipeline": 2, "packed": False},
    ],
    4: [
        {"pipeline": 2, "tensor": 2, "accumulation": 4}, {"pipeline": 2, "sequence": 2}, {"pipeline": 4},
        {"data": 2, "pipeline": 2, "accumulation": 4, "schedule": "dualpipev"},
    ],
}  # fmt: skip
"""Ranks → layouts of the cases."""


@functools.cache
def found(world: int) -> dict[tuple[str, int], dict[str, float]]:
    cases = {(name, at): Case(tiny(name, **COUNTS), **layout) for name in FAMILIES
             for at, layout in enumerate(LAYOUTS[world])}  # fmt: skip
    ranks = run_ranks(world, train, [*cases.values()], 2, timeout_s=900)
    return {key: errors(case, [rank[number] for rank in ranks], 2) for number, (key, case) in enumerate(cases.items())}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("world", "number"), [(world, number) for world, some in LAYOUTS.items() for number in range(len(some))],
    ids=[str(layout) for some in LAYOUTS.values() for layout in some],
)  # fmt: skip
def test_gradients_with_the_routers_loss(family: str, world: int, number: int) -> None:
    """Of loss and routers' loss together, against transformers' forward of each row alone."""
    for what, error in found(world)[family, number].items():
        assert error < RELATIVE, f"{what}: {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_has_it(family: str) -> None:
    """What the layouts are compared with is another gradient than without this loss."""
    (with_it, *_), without = reference(tiny(family, **COUNTS), True, 1)[0], reference(tiny(family), True, 1)[0][0]
    assert with_it[0] - without[0] > 0.5
    for name, gradient in without[2].items():
        if name.endswith((".gate.weight", "q_proj.weight")):
            assert np.linalg.norm(with_it[2][name] - gradient) > 100 * RELATIVE * np.linalg.norm(gradient), name


def listener(experts: int, chosen: int) -> RouterLoss:
    """A RouterLoss of no model."""
    made = RouterLoss.__new__(RouterLoss)
    made._experts, made._chosen, made._ranks = experts, chosen, None
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_stages_send_is_whole(dtype: torch.dtype) -> None:
    """The sums travel as numbers of the hidden states' dtype, and nothing of them is lost; nor of their gradient."""
    router = listener(experts=5, chosen=2)
    hidden = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    sums = (torch.rand(3, 2, 5) * 40).requires_grad_()
    sent = router.attach(hidden, sums)
    back, found = router.detach(sent)
    assert sent.dtype == dtype and torch.equal(back, hidden)
    assert torch.allclose(found, sums, rtol=1e-6 if dtype != torch.float16 else 1e-5)
    found.backward(torch.arange(30.0).view(3, 2, 5))
    assert sums.grad is not None and torch.equal(sums.grad, torch.arange(30.0).view(3, 2, 5))


def test_padding_and_empty_rows_do_not_count() -> None:
    """Whatever the routers say there."""
    router = listener(experts=4, chosen=2)
    said = torch.randn(2 * 6, 4)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    targets = torch.tensor([3, 0])
    loss = router.loss(router.sums([said, said + 1], real), targets)
    alone = router.loss(router.sums([said[:4], said[:4] + 1], real[:1, :4]), targets[:1])
    other = said.clone()
    other[4:] = 100 * torch.randn(8, 4)
    assert loss > 0 and torch.allclose(loss, alone)
    assert torch.equal(loss, router.loss(router.sums([other, other + 1], real), targets))


def parts(rank: int, world: int) -> tuple[float, float]:
    """(the loss of a sequence, the sum of what its ranks make of their parts)."""
    torch.manual_seed(0)
    said, targets = torch.randn(8, 4), torch.tensor([[1, 0, 1, 1, 0, 0, 0, 1]])
    real = torch.ones(1, 8, dtype=torch.bool)
    router = listener(experts=4, chosen=2)
    whole = router.loss(router.sums([said], real), targets.sum(1))
    ranks = router._ranks = RankGroup(None, rank, world)
    own = ranks.part(8)
    part = router.loss(router.sums([said[own]], real[:, own]), targets[:, own].sum(1))
    torch.distributed.all_reduce(part)
    return whole.item(), part.item()


def test_ranks_of_a_sequence_make_one_number() -> None:
    for whole, summed in run_ranks(2, parts):
        assert whole == pytest.approx(summed, rel=1e-6)
