"""A device that has not enough memory: where the run was, what the plan had predicted, and which keys to lower."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.batch import Layout, sizes
from conf.environment import Environment
from conf.errors import Problem, RequestError
from conf.rules import check
from conf.schema import Config
from launch.planner.model_shape import ModelShape

if TYPE_CHECKING:
    from launch.runtime.engine import Engine
    from launch.runtime.request import Request
    from recipes.base import Recipe

SIGNS = ("out of memory", "can't allocate memory", "status_alloc_failed")
"""How it is called beside torch.OutOfMemoryError: by CUDA and nccl; by torch on a CPU; by cuBLAS and cuDNN."""
ROOM = 0.9
"""Share of a device that a prediction may take: the context of CUDA, nccl and gaps between blocks need the rest."""
GAPS = 0.1
"""Share of a device that lies idle between blocks, above which that is worth a word."""
NEAR = 40
"""Bytes for each parameter, optimizer and gradient included and more than twice that, below which no model is large."""
GIB = 2**30

Change = tuple[str, Config]
"""(what to write on the command line, the configuration that it gives)."""
Predict = Callable[[Config], int | None]


class DeviceMemoryError(RuntimeError):
    """A device ran out of memory. Its text is what a person reads."""


class Phase:
    """What this rank is doing, in words."""

    def __init__(self) -> None:
        self.doing = "the start"
        self.engine: Engine | None = None

    def __str__(self) -> str:
        part = self.engine.doing if self.engine is not None else ""
        return f"{self.doing} ({part})" if part else self.doing

    @property
    def evaluates(self) -> bool:
        return "evaluation" in self.doing

    @property
    def trains(self) -> bool:
        return self.doing.startswith("step")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is a device's lack of memory."""
    import torch

    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        if isinstance(seen, torch.OutOfMemoryError) or any(sign in text for sign in SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextlib.contextmanager
def explaining(phase: Phase, request: Request, recipe: Recipe, device: Any) -> Iterator[None]:
    """A lack of memory inside the block ends it with DeviceMemoryError, which says what to do."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise explained(error, phase, request, recipe, device) from error
        raise


def explained(error: BaseException, phase: Phase, request: Request, recipe: Recipe, device: Any) -> DeviceMemoryError:
    """The error that says what to do. Predicting takes some seconds; what cannot be predicted is left out."""
    capacity, state = memory_of(device)
    lines = [f"rank {request.ranks.rank}: out of memory in {phase}: {_first_line(error)}"]
    plan, predict = _planned(request, recipe)
    if plan is not None:
        parts = sorted(plan.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts if name != "total" and size)
        lines.append(f"predicted for a rank: {_gib(plan['total'])}: {shown}")
    lines.append(state)
    environment, texts = request.environment.on(request.device), "data.seq_length" not in getattr(recipe, "UNUSED", ())
    advice = [
        words if size is None else f"{words} (predicted {_gib(size)})"
        for words, size in changes(request.cfg, request.layout, environment, phase, predict, capacity, texts)
    ]
    lines.append("what helps, in this order:" if advice else "no key is left to lower: more ranks, or a smaller model")
    lines += [f"  {line}" for line in advice]
    if gaps := _gaps(device, capacity):
        lines.append(f"{_gib(gaps)} lie idle between blocks: PYTORCH_ALLOC_CONF=expandable_segments:True joins them")
    return DeviceMemoryError("\n".join(f"error: {line}" for line in lines))


def changes(
    cfg: Config, layout: Layout, environment: Environment, phase: Phase, predict: Predict, capacity: int,
    texts: bool = True,
) -> Iterator[tuple[str, int | None]]:  # fmt: skip
    """(what to change, what is then predicted) for each key that can still be lowered, what costs least first.

    predict: raises RequestError where the model forbids it. texts: rows have a length.
    """
    enough = ROOM * capacity
    now = check(cfg, layout, environment)  # of a run that goes on: its directory is no longer a new one
    for choices in _choices(cfg, layout, phase, environment.device, texts):
        sized = []
        for words, changed in choices:
            if all(problem in now for problem in check(changed, layout, environment)):
                with contextlib.suppress(RequestError):
                    sized.append((words, predict(changed)))
        if sized:  # the mildest of one kind that is predicted to fit, else the strongest
            yield next((one for one in sized if one[1] is not None and one[1] <= enough), sized[-1])


def _choices(cfg: Config, layout: Layout, phase: Phase, device: str, texts: bool) -> Iterator[list[Change]]:
    """Changes of one kind, the mildest first."""
    if phase.evaluates:
        size = cfg.eval.micro_size or sizes(cfg.batch)[1]
        yield [
            _with(cfg, f"eval.micro_size={m}", "eval", micro_size=m) for m in range(size - 1, 0, -1) if size % m == 0
        ]
        if cfg.eval.beams > 1:
            yield [_with(cfg, "eval.beams=1", "eval", beams=1)]
    if phase.trains:
        yield _micro_batches(cfg)
        if not cfg.train.fused_loss:
            yield [_with(cfg, "train.fused_loss=true", "train", fused_loss=True)]
        if cfg.train.activation_checkpointing != 1:
            yield [_with(cfg, "train.activation_checkpointing=1", "train", activation_checkpointing=1)]
    stage = cfg.zero.stage
    if layout.replicas > 1:
        yield [_zero(cfg, f"zero=stage{higher}", stage=higher) for higher in range(stage + 1, 4)]
    if device == "cuda":  # else it is the same memory
        if cfg.zero.offload_optimizer == "none" and stage < 3:
            yield [_zero(cfg, "zero=stage2_offload", stage=2, offload_optimizer="cpu")]
        if cfg.zero.offload_param == "none":
            yield [_zero(cfg, "zero=stage3_offload", stage=3, offload_optimizer="cpu", offload_param="cpu")]
    if texts and (phase.trains or phase.evaluates):
        half = cfg.data.seq_length // 2
        yield [_with(cfg, f"data.seq_length={half} (other sequences: another run)", "data", seq_length=half)]


def _micro_batches(cfg: Config) -> list[Change]:
    """Smaller micro batches, with the accumulation that leaves the global batch as it is."""
    size, micro, accumulation = sizes(cfg.batch)
    rows, found = micro * accumulation, []
    for smaller in (m for m in range(micro - 1, 0, -1) if rows % m == 0):
        words = f"batch.micro_size={smaller} batch.accumulation={rows // smaller}, the same global batch of {size}"
        found.append(_with(cfg, words, "batch", micro_size=smaller, accumulation=rows // smaller))
    return found


def _with(cfg: Config, words: str, section: str, **values: Any) -> Change:
    changed = copy.deepcopy(cfg)
    setattr(changed, section, replace(getattr(changed, section), **values))
    return words, changed


def _zero(cfg: Config, words: str, **values: Any) -> Change:
    words, changed = _with(cfg, words, "zero", **values)
    if changed.zero.offload_optimizer != "none":
        changed.optimizer.fused = False  # what composing such a request fills in
    return words, changed


def _planned(request: Request, recipe: Recipe) -> tuple[dict[str, int] | None, Predict]:
    """(bytes by part on this rank's device, the total of another configuration), as far as they can be known."""
    layout, shapes = request.layout, dict[tuple, ModelShape]()

    def parts_of(cfg: Config) -> dict[str, int]:
        from launch.planner.plan import make_plan
        from launch.runtime.pipeline import programs
        from recipes.models.configuration import check_network
        from recipes.models.shape import model_shape

        # The model, and what is asked of it.
        whole = cfg.batch.micro_size == cfg.batch.global_size
        key = (cfg.data.seq_length, cfg.train.activation_checkpointing, whole)
        if key not in shapes:
            shapes[key] = model_shape(
                cfg.model, cfg.data, cfg.precision.name, cfg.parallel, recipe.hf_class(), recipe.row_shape,
                partial(check_network, cfg=cfg),
            )  # fmt: skip
        stages = make_plan(cfg, layout, shapes[key], {}, request.device, programs)["stages"]
        return stages[layout.place(request.ranks.rank).pipeline]["bytes_per_rank"]["device"]

    def total(cfg: Config) -> int | None:
        try:
            return parts_of(cfg)["total"]
        except RequestError:
            raise
        except Exception:  # a word more than there would be without; nothing may go wrong on its account
            return None

    try:
        return parts_of(request.cfg), total
    except Exception:
        return None, lambda cfg: None


def memory_of(device: Any) -> tuple[int, str]:
    """(bytes that a device has, a line about who holds them)."""
    import torch

    if device.type != "cuda":
        whole = int(min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _limit_of_group()))
        return whole, f"this machine has {_gib(whole)} for all its ranks"
    try:
        free, whole = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        ours = torch.cuda.memory_reserved(device)
    except RuntimeError:  # the device does not answer any more
        return 0, f"{device} does not say what it has"
    name = torch.cuda.get_device_name(device)
    line = f"{name} has {_gib(whole)}, of which {_gib(free)} free; this rank held {_gib(held)} in {_gib(ours)}"
    return whole, f"{line}, {_gib(torch.cuda.max_memory_allocated(device))} at most"


def _limit_of_group() -> float:
    """Bytes that a container gives its processes."""
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path("/sys/fs/cgroup", file).read_text(encoding="utf-8"))
    return math.inf


def check_memory(request: Request, recipe: Recipe) -> None:
    """Refuse a model that is predicted to need more memory than this machine has; one rank of each machine does.

    On a CPU: there the system ends a process without a word, or makes the machine stand still. Only models that come
    near are predicted, which takes seconds. Raises RequestError (model).
    """
    import torch

    from recipes.models.build import on_meta

    ranks, cfg = request.ranks, request.cfg
    if request.device != "cpu" or ranks.local_rank:
        return
    whole, _ = memory_of(torch.device("cpu"))
    model = on_meta(recipe.hf_class(), recipe.model_config(), dtype=torch.float32, attention=cfg.model.attention)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters * NEAR * ranks.local_world < whole:
        return
    plan, predict = _planned(request, recipe)
    if plan is None or (needed := plan["total"] * ranks.local_world) <= whole:
        return
    phase, environment = Phase(), request.environment.on(request.device)
    phase.doing = "step 1"
    helps = changes(cfg, request.layout, environment, phase, predict, whole // ranks.local_world)
    enough = [words for words, size in helps if size is not None and size * ranks.local_world <= whole]
    value = cfg.model.path or cfg.model.type or ""
    rule = f"{parameters:,} parameters: {_gib(needed)} are predicted to be needed, this machine has {_gib(whole)}"
    raise RequestError(Problem("model", value, rule, enough[0] if enough else "a smaller model, or more machines"))


def _gaps(device: Any, capacity: int) -> int:
    """Bytes that torch has of the device and gives to nobody, where they are many."""
    import torch

    if device.type != "cuda" or not capacity:
        return 0
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return idle if idle > GAPS * capacity else 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
