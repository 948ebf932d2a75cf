"""Bytes per rank: against tensors that torch really made, and against numbers worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from conf.batch import Layout
from conf.schema import BatchConfig, Config, DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig, ZeroConfig
from launch.planner.memory import memory, optimizer_numbers, persistent_parameters

GIVEN = {
    "llama": {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "gpt2": {
        "vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip
SEQ = 48


def toy(**changes: Any) -> Any:
    """1000 parameters: a 20×20 embedding, two layers of 250 (a 10×20 matrix and 50 in vectors), a 5×20 head."""
    tensors = [("embed.weight", (20, 20)), ("lm_head.weight", (5, 20))]
    for index in range(2):
        tensors += [(f"layers.{index}.w", (10, 20)), (f"layers.{index}.norm", (50,))]
    activations = SimpleNamespace(layers=(700, 600), inputs=(100, 100), outside=50)
    given = {
        "parameters": 1000, "idle": 0, "embedding": 400, "head": 100, "layers": 2, "layer_parameters": (250, 250),
        "tensors": tensors, "tied": False, "vocab": 5, "hidden": 20, "seq_length": SEQ, "heads": 2, "head_dim": 10,
        "activations": activations,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


def config(stage: int, precision: str = "fp32", accumulation: str = "fp32", name: str = "adamw", **zero: Any) -> Config:
    return Config(
        batch=BatchConfig(global_size=8, micro_size=2, accumulation=1),
        optimizer=OptimizerConfig(name=name),
        precision=PrecisionConfig(name=precision, accumulation_dtype=accumulation),
        zero=ZeroConfig(
            stage=stage, reduce_bucket_size=300, prefetch_bucket_size=10, **{"param_persistence_threshold": 60, **zero}
        ),
    )


def parts(cfg: Config, ranks: int = 4, device: str = "cuda") -> dict[str, int]:
    return memory(toy(), cfg, Layout(ranks, ranks), device).device


@pytest.mark.parametrize(
    "stage,precision,accumulation,parameters,gradients,state",
    [
        # fp32, 4 ranks. Adam: 8 bytes a parameter; stages 1 and 2 clone an fp32 master share.
        (0, "fp32", "fp32", 4000, 4000, 8000),
        (1, "fp32", "fp32", 4000, 4000 + 1000, 2000 + 1000),
        (2, "fp32", "fp32", 4000, 1000 + 1000, 2000 + 1000),
        # stage 3: 100 elements (two vectors of 50) stay whole, 900 are cut in four; the step works in place.
        (3, "fp32", "fp32", (100 + 225) * 4, 1000, 2000),
        # 16 bits: master weights and Adam in fp32.
        (0, "bf16", "bf16", 2000, 2000 + 4000, 4000 + 8000),
        (1, "bf16", "fp32", 2000, 2000 + 4000, 1000 + 2000),
        (1, "fp16", "fp32", 2000, 4000 + 1000, 1000 + 2000),
        (2, "bf16", "fp32", 2000, 1000 + 1000, 1000 + 2000),
        (2, "bf16", "bf16", 2000, 500 + 1000, 1000 + 2000),
        (3, "bf16", "fp32", (100 + 225) * 2, 1000, 1000 + 2000),
        (3, "bf16", "bf16", (100 + 225) * 2, 500 + 1000, 1000 + 2000),
    ],
)
def test_zero_by_hand(
    stage: int, precision: str, accumulation: str, parameters: int, gradients: int, state: int
) -> None:
    got = parts(config(stage, precision, accumulation))
    assert (got["parameters"], got["gradients"], got["optimizer state"]) == (parameters, gradients, state)


def test_buckets_by_hand() -> None:
    assert parts(config(0))["engine buffers"] == 0
    assert parts(config(1))["engine buffers"] == 300 * 4
    assert parts(config(1, "bf16"))["engine buffers"] == 0  # BF16_Optimizer reduces its own buffer in place
    assert parts(config(2, "bf16"))["engine buffers"] == 300 * 2
    assert parts(config(2, "bf16", overlap_comm=True))["engine buffers"] == 2 * 300 * 2
    assert parts(config(3, "bf16"))["engine buffers"] == 300 * 4 + (400 + 10) * 2
    big = config(1)
    big.zero.reduce_bucket_size = 10**9
    assert parts(big, device="cuda")["engine buffers"] == 4 * 10**9  # the engine allocates it whole
    assert parts(big, device="cpu")["engine buffers"] == 4 * 1000  # pages that nobody touches do not exist


def test_offload_moves_bytes_off_the_device() -> None:
    layout = Layout(4, 4)
    cfg = config(3, "bf16", offload_optimizer="cpu", offload_param="cpu")
    got = memory(toy(), cfg, layout, "cuda")
    assert got.device["optimizer state"] == 0 and got.device["parameters"] == 100 * 2
    assert got.host == {"optimizer state": 3000, "gradients": 1000, "parameters": 225 * 2}
    cfg = config(3, "bf16", offload_optimizer="nvme", offload_param="nvme", nvme_path="/x")
    got = memory(toy(), cfg, layout, "cuda")
    assert got.nvme == {"optimizer state": 3000, "parameters": 225 * 2} and got.host == {"gradients": 1000}


def test_fp32_offload_keeps_a_master_at_every_stage() -> None:
    got = memory(toy(), config(3, offload_optimizer="cpu"), Layout(4, 4), "cuda")
    assert got.host["optimizer state"] == (1000 + 2000) * 4 // 4


def test_activations_by_hand() -> None:
    """Two sequences; layers keep 700 and 600 bytes, a checkpointed one its input of 100, outside 50."""
    for every, kept in ((0, 50 + 700 + 600), (1, 50 + 100 + 100 + 700), (2, 50 + 100 + 600 + 700)):
        cfg = config(1)
        cfg.train.activation_checkpointing = every
        assert parts(cfg)["activations"] == 2 * kept


def test_logits_by_hand() -> None:
    cfg, positions = config(1, "bf16"), 2 * SEQ
    cfg.train.fused_loss = False
    assert parts(cfg)["logits and loss"] == positions * 5 * (2 + 4 + 4)
    cfg.train.fused_loss = True
    assert parts(cfg)["logits and loss"] == positions * 5 * (2 + 8) + positions * 20 * 2 + 5 * 20 * 4


def test_a_chunk_of_logits_has_512_positions_at_least() -> None:
    """Of a vocabulary of 10,000: not the 2 Mi elements that are enough for a small one."""
    from recipes.models.loss import CHUNK_ELEMENTS, CHUNK_POSITIONS, _chunks

    cfg = config(1, "bf16")
    shape = toy(vocab=10_000, seq_length=1024)
    rows = next(_chunks(2048, 10_000))
    assert rows == slice(0, CHUNK_POSITIONS) and CHUNK_POSITIONS * 10_000 > CHUNK_ELEMENTS
    got = memory(shape, cfg, Layout(4, 4), "cuda").device["logits and loss"]
    assert got == CHUNK_POSITIONS * 10_000 * (2 + 8) + 2048 * 20 * 2 + 10_000 * 20 * 4


def test_unknown_activations_are_not_invented() -> None:
    got = memory(toy(activations=None), config(1), Layout(1, 1), "cpu")
    assert got.device["activations"] == 0


def test_muon_keeps_one_number_for_hidden_matrices_and_two_for_the_rest() -> None:
    assert optimizer_numbers(toy(), OptimizerConfig(name="muon")) == 400 * 1 + 600 * 2


def test_persistent_parameters_are_those_below_the_threshold() -> None:
    assert [persistent_parameters(toy(), limit) for limit in (50, 51, 101, 10**6)] == [0, 100, 200, 1000]


def shape_of(kind: str, attention: str = "sdpa", packing: str = "blocks", precision: str = "fp32") -> Any:
    from recipes.models.shape import model_shape

    model = ModelConfig(type=kind, config=dict(GIVEN[kind]), attention=attention)
    return model_shape(model, DataConfig(seq_length=SEQ, packing=packing), precision)


def real_model(kind: str, attention: str = "sdpa", precision: str = "fp32") -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **GIVEN[kind]), dtype=dtype, attn_implementation=attention
    )
    return made.train()


@pytest.mark.parametrize("kind", GIVEN)
def test_parameters_gradients_and_state_are_what_torch_makes(kind: str) -> None:
    import torch

    model, shape = real_model(kind), shape_of(kind)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False).logits.sum().backward()
    got = memory(shape, config(0), Layout(1, 1), "cpu").device
    assert got["parameters"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert got["gradients"] == sum(p.grad.numel() * p.grad.element_size() for p in model.parameters())
    for name, optimizer in {
        "adamw": torch.optim.AdamW(model.parameters()),
        "adagrad": torch.optim.Adagrad(model.parameters()),
        "rmsprop": torch.optim.RMSprop(model.parameters()),
        "nadam": torch.optim.NAdam(model.parameters()),
        "radam": torch.optim.RAdam(model.parameters()),
        "adamax": torch.optim.Adamax(model.parameters()),
        "adadelta": torch.optim.Adadelta(model.parameters()),
        "asgd": torch.optim.ASGD(model.parameters()),
        "sgd": torch.optim.SGD(model.parameters()),
    }.items():
        optimizer.step()
        # Step counters and other scalars are not worth a column.
        numbers = sum(
            value.numel()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim() > 0
        )
        assert optimizer_numbers(shape, OptimizerConfig(name=name)) == numbers, name
    momentum = torch.optim.SGD(model.parameters(), momentum=0.9)
    momentum.step()
    numbers = sum(state["momentum_buffer"].numel() for state in momentum.state.values())
    assert optimizer_numbers(shape, OptimizerConfig(name="sgd", momentum=0.9)) == numbers


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("packing", ("blocks", "documents"))
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_activations_are_what_autograd_keeps(kind: str, packing: str, precision: str) -> None:
    """Within 2%: what a batch shares (cos and sin of rotary positions) is planned once for each sequence."""
    import torch
    from tiny import kept_for_backward

    batch, model = 3, real_model(kind, precision=precision)
    positions = None
    if packing == "documents":
        positions = torch.cat([torch.arange(SEQ // 3), torch.arange(SEQ - SEQ // 3)]).repeat(batch, 1)
    ids = torch.zeros(batch, SEQ, dtype=torch.long)
    measured = kept_for_backward(model, input_ids=ids, position_ids=positions, use_cache=False)
    cfg = config(0, precision, precision)
    cfg.batch.micro_size = batch
    planned = memory(shape_of(kind, packing=packing, precision=precision), cfg, Layout(1, 1), "cpu").device
    assert planned["activations"] == pytest.approx(measured, rel=0.02)


def test_eager_attention_keeps_the_scores() -> None:
    """S×S probabilities per head and layer, fp32."""
    scores = GIVEN["llama"]["num_attention_heads"] * SEQ * SEQ * 4
    eager, fused = shape_of("llama", "eager").activations, shape_of("llama").activations
    assert eager.layers[1] - fused.layers[1] > 0.8 * scores
