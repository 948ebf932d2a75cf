"""One step function for all layouts: the real engine against plain PyTorch, for any tiny model."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tiny import VOCABULARY, TinyCausalLM, plain_model, tiny_config

from conf.batch import Layout
from conf.schema import Config, ModelConfig, OptimizerConfig

GLOBAL, STEPS = 8, 5
LR, MOMENTUM = 0.3, 0.9
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    },
    "smollm2": {
        "type": "llama", "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 64, "tie_word_embeddings": True,
    },
    "gpt2": {"type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen3": {
        "type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": True,
    },
    "mixtral": {
        "type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Llama with grouped heads, untied; nine heads over three, tied; GPT-2; Qwen3 with its head norms; a mixture."""


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    model: str
    stage: int = 1
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    accumulation: int = 1
    checkpointing: int = 0
    packed: bool = True
    precision: str = "fp32"
    accumulation_dtype: str = "fp32"
    schedule: str = "1f1b"

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline * self.sequence


def configuration(case: Case) -> tuple[Config, Layout]:
    cfg = tiny_config(GLOBAL // case.accumulation // case.data, case.accumulation, case.data)
    options = {"vocab_size": VOCABULARY, **MODELS[case.model]} if case.model in MODELS else json.loads(case.model)
    cfg.model = ModelConfig(type=options.pop("type"), config=options)
    # Not Adam: it hides a gradient scaled by a constant, and makes a full step of the rounding in one near zero.
    cfg.optimizer = OptimizerConfig(name="sgd", lr=LR, momentum=MOMENTUM, weight_decay=0.1, gradient_clipping=0.5)
    cfg.zero.stage, cfg.zero.param_persistence_threshold = case.stage, 0
    cfg.train.activation_checkpointing = case.checkpointing
    cfg.precision.name, cfg.precision.accumulation_dtype = case.precision, case.accumulation_dtype
    cfg.data.packing = "documents" if case.packed else "none"
    cfg.parallel.tensor, cfg.parallel.pipeline, cfg.parallel.sequence = case.tensor, case.pipeline, case.sequence
    cfg.parallel.schedule = case.schedule
    return cfg, Layout.of(case.world, cfg.parallel)


def train(rank: int, world: int, cases: list[Case], steps: int = STEPS) -> list[Any]:
    """For each case: [(loss, norm, {name: gradient})] of this rank's stage, or the refusal."""
    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import held_out_batches, training_batches
    from launch.runtime.staged import make_engine

    results: list[Any] = []
    for case in cases:
        cfg, layout = configuration(case)
        recipe = TinyCausalLM(cfg)
        recipe.prepare()
        engine = make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), torch.device("cpu"), steps)
        place = layout.place(rank)
        rows = []
        for step in range(steps):
            gradients: dict[str, Any] = {}

            def inspect(e, into=gradients, show=place.data == place.tensor == place.sequence == 0):
                into.update({name: g.clone().numpy() if show else None for name, g in e.gradients()})

            result = engine.train_step(training_batches(step, place.data, recipe, cfg, layout), inspect)
            shown = {name: g for name, g in gradients.items() if g is not None}
            rows.append((with_routers(engine, result.loss, result.router_aux_loss), result.grad_norm, shown))
        metrics = engine.evaluate(held_out_batches(place.data, recipe, cfg, layout)).metrics
        held_out = with_routers(engine, metrics["loss"], metrics.get("router_aux_loss"))
        results.append((rows, held_out))
        engine.ds.destroy()
    return results


def with_routers(engine: Any, loss: float, router_aux_loss: float | None) -> float:
    """What is minimised: the loss, and the routers' where it counts."""
    assert (router_aux_loss is None) == (engine.router is None)
    return loss if router_aux_loss is None else loss + router_aux_loss * engine.router.coefficient


@functools.cache
def reference(model: str, packed: bool, steps: int = STEPS) -> tuple[list[Any], float]:
    """The same in plain PyTorch: one process, one batch, mean over supervised tokens."""
    cfg, _ = configuration(Case(model, packed=packed))
    recipe = TinyCausalLM(cfg)
    recipe.prepare()
    network = plain_model(recipe)
    groups = [
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)

    def loss_of(rows: list[dict]) -> torch.Tensor:
        if not packed or network.config.to_dict().get("output_router_logits"):
            # One by one: rows of unequal lengths have no padding then, and transformers' own function of the routers
            # sees one row.
            supervised = sum(int((row["labels"] != -100).sum()) for row in rows)
            return sum((summed(row) for row in rows), torch.zeros(())) / supervised
        ids, labels, positions = (
            torch.tensor(np.stack([r[k] for r in rows])) for k in ("input_ids", "labels", "position_ids")
        )
        logits = network(input_ids=ids, position_ids=positions, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def summed(row: dict) -> torch.Tensor:
        positions = torch.tensor(row["position_ids"])[None] if packed else None
        out = network(input_ids=torch.tensor(row["input_ids"])[None], position_ids=positions, use_cache=False)
        labels = torch.tensor(row["labels"])
        loss = torch.nn.functional.cross_entropy(out.logits[0], labels, reduction="sum")
        if (balance := getattr(out, "aux_loss", None)) is None:
            return loss
        factor = getattr(network, "router_aux_loss_coef", None) or network.aux_loss_coef
        return loss + factor * balance * (labels != -100).sum()

    done = []
    for step in range(steps):
        loss = loss_of([recipe.train.row(i) for i in range(step * GLOBAL, (step + 1) * GLOBAL)])
        loss.backward()
        gradients = {name: p.grad.clone().numpy() for name, p in network.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        done.append((loss.item(), norm.item(), gradients))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held_out = loss_of([recipe.held_out.row(i) for i in range(len(recipe.held_out))]).item()
    return done, held_out


def errors(case: Case, ranks: list[Any], steps: int = STEPS, blame: dict[str, float] | None = None) -> dict[str, float]:
    """Largest relative errors over all steps: loss, norm, the gradient of one parameter (L2), held-out loss.

    `blame` gets the largest error of each parameter's gradient.
    """
    expected, held_out0 = reference(case.model, case.packed, steps)
    worst = dict.fromkeys(("loss", "norm", "gradient", "held_out"), 0.0)
    for rows, held_out in ranks:
        worst["held_out"] = max(worst["held_out"], abs(held_out - held_out0) / held_out0)
        for (loss, norm, _), (loss0, norm0, _) in zip(rows, expected, strict=True):
            worst["loss"] = max(worst["loss"], abs(loss - loss0) / loss0)
            worst["norm"] = max(worst["norm"], abs(norm - norm0) / norm0)
    for step, (_, _, gradients0) in enumerate(expected):
        seen: dict[str, Any] = {}
        for rows, _ in ranks:
            for name, gradient in rows[step][2].items():
                if name in seen:  # a tied embedding is on two stages: bit for bit the same
                    assert np.array_equal(seen[name], gradient), f"step {step}: the copies of {name} differ"
                seen[name] = gradient
        assert seen.keys() == gradients0.keys(), sorted(seen.keys() ^ gradients0.keys())
        # Relative to the parameter's gradient; one that is all rounding (a key bias) is measured against the largest.
        floor = 1e-5 * max(np.linalg.norm(g) for g in gradients0.values())
        for name, gradient in seen.items():
            scale = max(np.linalg.norm(gradients0[name]), floor)
            error = float(np.linalg.norm(gradient - gradients0[name]) / scale)
            worst["gradient"] = max(worst["gradient"], error)
            if blame is not None:
                blame[name] = max(blame.get(name, 0.0), error)
    return worst


AXES: dict[str, tuple[Any, ...]] = {
    "model": tuple(MODELS),
    "stage": (0, 1, 2, 3),
    "data": (1, 2),
    "tensor": (1, 2),
    "pipeline": (1, 2, 4),
    "sequence": (1, 2),
    "accumulation": (1, 4),
    "checkpointing": (0, 1),
    "packed": (False, True),
}
"""The matrix: every legal combination of these, on at most RANKS ranks."""
RANKS = 8


def legal(case: Case) -> bool:
    """What the rules let pass; a test holds it against them."""
    fits = case.world <= RANKS and (case.pipeline == 1 or case.stage < 2)
    heads_divide = case.model != "smollm2" or case.tensor == case.sequence == 1  # nine heads over three
    return fits and heads_divide


def matrix() -> list[Case]:
    """All of it."""
    cases = (Case(**dict(zip(AXES, values, strict=True))) for values in itertools.product(*AXES.values()))
    return [case for case in cases if legal(case)]


def pairs(case: Case) -> set[tuple[str, Any, str, Any]]:
    """The pairs of values of two axes that a case has."""
    values = [(axis, getattr(case, axis)) for axis in AXES]
    return {(*one, *other) for one, other in itertools.combinations(values, 2)}


def covering(cases: list[Case]) -> list[Case]:
    """A subset in which every pair of values that occurs in `cases` occurs; greedy, few ranks first."""
    left = set().union(*map(pairs, cases))
    with_pairs = [(case, pairs(case)) for case in cases]
    chosen = []
    while left:
        case, _ = max(with_pairs, key=lambda entry: (len(entry[1] & left), -entry[0].world))
        chosen.append(case)
        left -= pairs(case)
    return chosen
