"""Step b: gradients of the engine's path against plain PyTorch of the same model on the same rows.

The measure is the repository's: for each parameter the L2 norm of the difference over that of the gradient, the largest
of all parameters; before clipping.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.contenders import Job, inputs, whole_model
from benchmarks.gpu_steps.context import Context
from benchmarks.gpu_steps.runs import Run, batches_of, device_name, engine_of, free, join, prepared

EXACT = 1e-5
"""fp32: sums in another order leave about 1e-6."""
TIMES_PLAIN = 2.0
"""16 bits: both round, at other places, so the bound is what plain PyTorch in that precision is away from the fp32
gradient of the same weights, with room for luck. A lost micro-batch or a wrong scale is ten times that and more."""
FULL = (
    "model=llama_60m", "model.config.hidden_size=512", "model.config.intermediate_size=1408",
    "model.config.num_hidden_layers=6", "model.config.num_attention_heads=8", "model.config.num_key_value_heads=4",
    "model.config.vocab_size=8192", "data.seq_length=512",
)  # fmt: skip
BATCH = ("batch.global_size=8", "batch.micro_size=4")
Gradients = dict[str, torch.Tensor]

CASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("stage 0", ("zero=stage0",)),
    ("stage 1", ("zero=stage1",)),
    ("stage 2", ("zero=stage2",)),
    ("stage 3", ("zero=stage3", "zero.param_persistence_threshold=0")),
    ("stage 1, unpacked rows", ("zero=stage1", "data.packing=blocks")),
    ("stage 1, plain loss", ("zero=stage1", "train.fused_loss=false")),
    ("stage 1, checkpointing", ("zero=stage1", "train.activation_checkpointing=1")),
    ("stage 3, checkpointing", ("zero=stage3", "train.activation_checkpointing=1")),
)
COMPILED = (
    ("stage 1, compiled", ("zero=stage1", "train.compile=true")),
    ("stage 3, compiled", ("zero=stage3", "train.compile=true")),
)


def compared(context: Context, precision: str, compiled: bool = False) -> Callable[[], None]:
    """All cases of a precision; raises at the end where one is beyond its bound."""
    runs: list[tuple[str, Run]] = []
    cases = COMPILED if compiled else CASES
    if context.tiny:  # a rehearsal: each stage in 16 bits, one compiled
        cases = cases[:1] if compiled else cases if precision == "fp32" else cases[:4]
    for name, overrides in cases:
        chosen = [*FULL, *BATCH, f"precision={precision}", *overrides]
        if precision == "fp16":
            chosen.append("precision.initial_scale_power=10")  # small enough for a first step
        if precision != "fp32" and "zero=stage0" in overrides:
            chosen.append(f"precision.accumulation_dtype={precision}")
        runs.append((name, prepared(context, *chosen)))

    def work() -> None:
        device = join(context)
        references: dict[str, tuple[float, Gradients, float]] = {}
        problems = []
        for name, run in runs:
            try:
                packing = run.cfg.data.packing
                if packing not in references:
                    references[packing] = reference(run, device, precision)
                loss0, gradients0, plain = references[packing]
                loss, gradients = of_engine(run, device)
                worst, where = farthest(gradients, gradients0)
                bound = EXACT if precision == "fp32" else TIMES_PLAIN * plain
                within = worst <= bound
                context.row(
                    name, precision=precision, device=device_name(device) or "cpu", largest_relative_error=worst,
                    parameter=where, plain_relative_error=plain, bound=bound, within=within,
                    loss_relative_error=abs(loss - loss0) / loss0, request=run.request,
                )  # fmt: skip
                if not within:
                    problems.append(f"{name}: {worst:.2e} at {where}, bound {bound:.2e}")
            except Exception as error:
                context.row(name, precision=precision, note=f"{type(error).__name__}: {error}"[:500])
                problems.append(f"{name}: {type(error).__name__}: {error}")
        if problems:
            raise AssertionError("; ".join(problems))

    return work


def of_engine(run: Run, device: torch.device) -> tuple[float, Gradients]:
    """(loss, gradient of each parameter) of a first step."""
    engine = engine_of(run, device)
    found: Gradients = {}

    def inspect(engine: Any) -> None:
        found.update({name: gradient.detach().clone() for name, gradient in engine.gradients()})

    try:
        result = engine.train_step(batches_of(run, 0), inspect)
        return result.loss, found
    finally:
        engine.ds.destroy()
        free(device)


def reference(run: Run, device: torch.device, precision: str) -> tuple[float, Gradients, float]:
    """(loss, gradients in fp32 arithmetic, how far plain PyTorch in `precision` is from them).

    The weights of all are those that this precision begins with.
    """
    job = Job(run.cfg, run.recipe, run.layout, device, 0, 1)
    own = whole_model(job, precision).train()
    exact = copy.deepcopy(own).float() if precision != "fp32" else own
    loss, gradients = plain_gradients(exact, run, device)
    if precision == "fp32":
        return loss, gradients, 0.0
    _, rounded = plain_gradients(own, run, device, 2.0**10 if precision == "fp16" else 1.0)
    return loss, gradients, farthest(rounded, gradients)[0]


def plain_gradients(model: Any, run: Run, device: torch.device, scale: float = 1.0) -> tuple[float, Gradients]:
    """Of the mean over all supervised tokens of the global batch; scale: of the loss, undone in fp32."""
    batches = batches_of(run, 0)
    supervised = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    total = 0.0
    summed: Gradients = {}
    for batch in batches:
        tensors = {name: torch.from_numpy(values).to(device) for name, values in batch.items()}
        logits = model(**inputs(tensors)).logits
        labels = tensors["labels"].flatten()
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=-100, reduction="sum") / supervised
        (loss * scale).backward()
        total += float(loss)
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.float() / scale
            summed[name] = summed[name] + gradient if name in summed else gradient
        model.zero_grad(set_to_none=True)
    return total, summed


def farthest(gradients: Gradients, others: Gradients) -> tuple[float, str]:
    """(largest relative error of a parameter's gradient, which parameter). Not a number counts as infinitely far."""
    if gradients.keys() != others.keys():
        raise AssertionError(f"other parameters: {sorted(gradients.keys() ^ others.keys())[:5]}")
    worst, where = 0.0, ""
    for name, gradient in gradients.items():
        other = others[name].double()
        error = float((gradient.double() - other).norm() / other.norm())
        error = error if error == error else float("inf")
        if error >= worst:
            worst, where = error, name
    return worst, where
