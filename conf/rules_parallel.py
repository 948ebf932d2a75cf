"""Rules on tensor, pipeline and sequence parallelism that need no look at the model.

What the model itself does not allow (heads, layers, a family without a plan) is in recipes/models/layouts.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from conf.batch import Layout, resolve_batch, sizes
from conf.environment import Environment
from conf.errors import Problem, RequestError
from conf.rules_values import changed, shown
from conf.rules_zero import PLUS
from conf.schema import Config

WHOLE_MATRIX_OPTIMIZERS = {
    "muon": "orthogonalises whole matrices",
    "lamb": "scales each update by the norm of the whole parameter",
    "adafactor": "keeps sums over whole rows and columns",
}
"""Optimizers whose update of an element depends on others: on a tensor rank's share it would be another update."""


def pipeline_stage(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """The pipeline engine takes ZeRO 0 and 1 (DeepSpeed 0.19.8: pipe/engine.py asserts it late)."""
    if cfg.parallel.pipeline > 1 and cfg.zero.stage > 1:
        rule = f"a pipeline (parallel.pipeline={cfg.parallel.pipeline}) needs ZeRO stage 0 or 1"
        yield Problem("zero.stage", str(cfg.zero.stage), rule, "zero=stage1, or parallel.pipeline=1")


def pipeline_split(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """A split names a number of layers for each stage."""
    split, stages = cfg.parallel.pipeline_split, layout.stages
    if split is None:
        return
    value = shown(split)
    nearest = "parallel.pipeline_split=null (stages of equal cost)"
    if len(split) > 1 and layout.world % len(split) == 0 and len(split) != stages == layout.pipeline:
        nearest = f"parallel.pipeline={len(split)}, or {nearest}"
    if layout.pipeline == 1:
        yield Problem("parallel.pipeline_split", value, "there is one stage only (parallel.pipeline=1)", nearest)
    elif len(split) != stages:
        rule = f"has {len(split)} stage{'s' * (len(split) != 1)}, the pipeline {stages}{_folded(layout)}"
        yield Problem("parallel.pipeline_split", value, rule, nearest)
    elif min(split) < 1:
        yield Problem("parallel.pipeline_split", value, "each stage has at least one layer", nearest)


def _folded(layout: Layout) -> str:
    return f": two on each of {layout.pipeline} ranks (parallel.schedule=dualpipev)" * (layout.stages > layout.pipeline)


def schedule(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """DualPipeV is of use in a pipeline only, and with enough micro-batches (DeepSpeed 0.19.8: runtime/pipe)."""
    name, least = cfg.parallel.schedule, layout.stages
    if name != "dualpipev":
        return
    if layout.pipeline == 1:
        yield Problem("parallel.schedule", name, "there is no pipeline to order", "parallel.pipeline=2")
        return
    try:
        size, micro, steps = sizes(resolve_batch(cfg.batch, layout))
    except RequestError:
        return  # said by conf/compose.py
    if steps < least:
        smaller = next((m for m in range(micro, 0, -1) if size % (m * layout.data * least) == 0), None)
        more = f"batch.global_size={micro * layout.data * least} batch.micro_size={micro} batch.accumulation={least}"
        if smaller:
            more = f"batch.micro_size={smaller} batch.accumulation={size // (smaller * layout.data)}"
        rule = f"needs two micro-batches for each rank of the pipeline, {least}; batch.accumulation={steps}"
        yield Problem("parallel.schedule", name, rule, f"{more}, or parallel.schedule=1f1b")


def sequence_length(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Every sequence rank has equally many tokens."""
    ranks, length = cfg.parallel.sequence, cfg.data.seq_length
    if ranks > 1 and length % ranks:
        rule = f"must be a multiple of the {ranks} sequence ranks"
        yield Problem("data.seq_length", str(length), rule, f"data.seq_length={max(1, length // ranks) * ranks}")


def sequence_attention(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Attention that takes masks of whole sequences from outside: neither a family's eager one nor flash attention."""
    kind = cfg.model.attention
    if cfg.parallel.sequence > 1 and kind not in (None, *WRAPPED):
        rule = f"sequence parallelism wraps {', '.join(WRAPPED)}"
        yield Problem("model.attention", kind, rule, "model.attention=sdpa")


def optimizer(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Tensor ranks update their shares on their own: only optimizers that work element by element."""
    name = cfg.optimizer.name.lower()
    if cfg.parallel.tensor > 1 and (why := WHOLE_MATRIX_OPTIMIZERS.get(name)):
        rule = f"{why}, and a tensor rank has only a share (parallel.tensor={cfg.parallel.tensor})"
        yield Problem("optimizer.name", name, rule, "optimizer=adamw, or parallel.tensor=1")


def norm_of_shares(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """0.19.8 clips by a norm of one tensor rank's shares, or with tied copies twice (fp16/unfused_optimizer.py).

    It asks gradients for the marks that parameters have. bf16 under a pipeline has another optimizer around it.
    """
    parallel, precision = cfg.parallel, cfg.precision.name
    divided = {
        "fp16": max(parallel.tensor, parallel.pipeline) > 1,
        "bf16": parallel.tensor > 1 and parallel.pipeline == 1,
    }
    if cfg.zero.stage == 0 and divided.get(precision, False):
        axis = "tensor" if parallel.tensor > 1 else "pipeline"
        rule = f"in {precision} the engine clips by the gradient norm of one rank of parallel.{axis} at ZeRO stage 0"
        yield Problem("zero.stage", "0", rule, "zero=stage1, or precision=fp32")


def expert(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Experts are not dealt out: the engine would put its own modules in the place of the family's."""
    degree = cfg.parallel.expert
    if degree != 1:
        rule = (
            "DeepSpeed 0.19.8 deals out experts by replacing the family's modules and names by its own; experts stay "
            "with their model here, and tensor ranks cut each expert's matrices"
        )
        yield Problem("parallel.expert", str(degree), rule, "parallel.expert=1")


def untested(cfg: Config, layout: Layout, env: Environment) -> Iterator[Problem]:
    """Combinations that no test has shown to give the right gradients."""
    parallel = cfg.parallel
    if cfg.train.compile and max(parallel.tensor, parallel.sequence, parallel.pipeline) > 1:
        rule = "compiled layers are not tested with tensor, pipeline or sequence parallelism"
        yield Problem("train.compile", "true", rule, "train.compile=false")
    if parallel.tensor > 1 or parallel.pipeline > 1:
        for field in PLUS:
            if changed(cfg.zero, field):
                rule = "ZeRO++ is not tested with tensor or pipeline parallelism"
                yield Problem(f"zero.{field}", shown(getattr(cfg.zero, field)), rule, f"zero=stage{cfg.zero.stage}")
    if parallel.pipeline > 1 and cfg.zero.offload_optimizer != "none":
        rule = "an offloaded step is not tested with a pipeline"
        yield Problem("zero.offload_optimizer", cfg.zero.offload_optimizer, rule, "zero=stage1")


WRAPPED = ("sdpa",)
"""Flash attention finds packed documents by the positions that it is given, which are a rank's part of the sequence."""

RULES = (
    pipeline_stage,
    pipeline_split,
    schedule,
    sequence_length,
    sequence_attention,
    optimizer,
    norm_of_shares,
    expert,
    untested,
)
