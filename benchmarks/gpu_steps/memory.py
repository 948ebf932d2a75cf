"""Step e: what the plan predicts against what is measured."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu_steps.context import Context
from benchmarks.gpu_steps.runs import Run, device_name, join, measured, prepared

MODEL = ("model=llama_160m", "data.seq_length=1024", "data.packing=blocks", "batch.global_size=8", "precision=bf16")
REQUESTS: tuple[tuple[str, ...], ...] = (
    (),
    ("zero=stage0", "precision.accumulation_dtype=bf16"),
    ("zero=stage2",),
    ("zero=stage3",),
    ("precision=fp32",),
    ("precision=fp32", "zero=stage3"),
    ("precision=fp16",),
    ("precision=bf16_autocast",),
    ("train.activation_checkpointing=1",),
    ("train.fused_loss=false",),
    ("data.packing=documents",),
    ("batch.global_size=16", "batch.micro_size=8"),
    ("optimizer=sgd", "zero=stage2"),
    ("model=gpt2",),
)


def requests(context: Context) -> Callable[[], None]:
    """A row for each request that planner tests can read: the request, predicted and measured bytes and seconds."""
    runs: list[Run] = []
    for number, overrides in enumerate(REQUESTS):
        chosen = [*MODEL, *([] if any("micro_size" in word for word in overrides) else ["batch.micro_size=4"])]
        runs.append(prepared(context, *chosen, *overrides))
        print(number, runs[-1].request, flush=True)

    def work() -> None:
        device = join(context)
        problems = []
        for number, run in enumerate(runs):
            name = " ".join(REQUESTS[number]) or "model=llama_160m precision=bf16"
            try:
                context.row(name, device=device_name(device) or "cpu", **measured(run, device))
            except Exception as error:
                context.row(name, request=run.request, note=f"{type(error).__name__}: {error}"[:500])
                problems.append(f"{name}: {type(error).__name__}: {error}")
        if problems:
            raise RuntimeError("; ".join(problems)[-1400:])

    return work
