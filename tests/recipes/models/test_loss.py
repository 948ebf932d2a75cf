"""The fused losses equal the plain one, and hold no more than a chunk of logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.models import loss as fused

V, H = 37, 16


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS", V * 5)
    monkeypatch.setattr(fused, "CHUNK_POSITIONS", 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_linear_cross_entropy_equals_the_plain_loss(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(n, dtype=dtype, requires_grad=True) for n in ((23, H), (V, H), *([(V,)] if bias else []))]
    labels = torch.randint(0, V, (23,))
    hidden, weight, b = [*inputs, None][:3]
    plain = F.cross_entropy(F.linear(hidden, weight, b).float(), labels, reduction="sum")
    expected = torch.autograd.grad(plain * 3, inputs)
    ours = fused.linear_cross_entropy(hidden, weight, b, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for got, want in zip(torch.autograd.grad(ours * 3, inputs), expected, strict=True):
        assert (got - want).norm() <= tolerance * want.norm()


def test_cross_entropy_equals_the_plain_loss() -> None:
    logits = torch.randn(23, V, requires_grad=True)
    labels = torch.randint(0, V, (23,))
    plain = F.cross_entropy(logits, labels, reduction="sum")
    ours = fused.cross_entropy(logits, labels)
    torch.testing.assert_close(ours, plain)
    (want,), (got,) = torch.autograd.grad(plain, logits), torch.autograd.grad(ours, logits)
    torch.testing.assert_close(got, want)


def test_a_batch_without_supervised_positions_has_a_zero_gradient() -> None:
    """Every rank must run backward (ZeRO-3 gathers in it), also one whose rows supervise nothing."""
    hidden = torch.randn(0, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    loss = fused.linear_cross_entropy(hidden, weight, None, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and weight.grad.abs().sum() == 0


def test_gradcheck_of_the_backward_formula() -> None:
    """Against finite differences, in fp64 inputs (the loss itself is fp32: tolerance accordingly)."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(7, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.randint(0, V, (7,))
    (analytic,) = torch.autograd.grad(fused.linear_cross_entropy(hidden, weight, None, labels), weight)
    direction = torch.randn_like(weight)
    step = 1e-2
    with torch.no_grad():
        up = fused.linear_cross_entropy(hidden, weight + step * direction, None, labels)
        down = fused.linear_cross_entropy(hidden, weight - step * direction, None, labels)
    assert (up - down).item() / (2 * step) == pytest.approx((analytic * direction).sum().item(), rel=1e-2)


def test_no_more_than_a_chunk_of_logits_is_alive() -> None:
    """The largest tensor of the graph is the hidden states or the weight, never N x V."""
    hidden, weight = torch.randn(4000, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)
            )
            return out

    with Watch():
        fused.linear_cross_entropy(hidden, weight, None, torch.randint(0, V, (4000,))).backward()
    assert max(sizes) <= 4000 * H < 4000 * V


FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "gemma2": {"head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize(
    "family, last", [("llama", True), ("gpt2", True), ("gemma2", False), ("cohere", False), ("granite", False)]
)
def test_families_that_change_their_logits_are_noticed(family: str, last: bool) -> None:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    options = FAMILIES[family] if family == "gpt2" else {**shape, **FAMILIES[family]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=V, **special, **options))
    assert fused.head_is_last(model, V, torch.device("cpu")) is last
    assert "forward" not in model.get_output_embeddings().__dict__, "the head was not given its own forward back"
