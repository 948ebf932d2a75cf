"""The loops that overhead.py compares: same rows, same initial weights, same steps.

Each calls `pause` once when it is built and then after every optimizer step, and returns how to get the loss of the
trained model on a micro-batch.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from conf.batch import Layout
from conf.schema import Config, ParallelConfig
from recipes.base import Recipe

Loss = Callable[[Any], float]
"""Mean loss of a trained model on a micro-batch; all ranks call it together."""


@dataclass
class Job:
    """What a loop is given: everything but how to train."""

    cfg: Config
    recipe: Recipe
    layout: Layout
    device: Any
    rank: int
    steps: int


class Pause:
    """Lets a loop go on only when it is its turn; the loop calls it when it is built and after every step."""

    def __init__(self, pipe: Connection, device: Any):
        self._pipe, self._device = pipe, device
        self._left, self._started = 1, time.perf_counter()

    def __call__(self) -> None:
        import torch

        self._left -= 1
        if self._left:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._pipe.send(time.perf_counter() - self._started)
        self._left = self._pipe.recv()
        self._started = time.perf_counter()


class OneBatch:
    """Just the held-out rows that fill one micro-batch of training's shape on every rank."""

    def __init__(self, rows: Any, size: int):
        self._rows, self._size = rows, size

    def __len__(self) -> int:
        return self._size

    def row(self, index: int) -> dict[str, Any]:
        return self._rows.row(index % len(self._rows))


class HalfSupervised:
    """Rows whose first half supervises nothing."""

    def __init__(self, rows: Any):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        row = dict(self._rows.row(index))
        row["labels"] = row["labels"].copy()
        row["labels"][: len(row["labels"]) // 2] = -100
        return row


def ours(job: Job, pause: Callable[[], None]) -> Loss:
    """launch/runtime as `launch/train.py` runs it, metrics.jsonl included; evaluation is kept out of the turns."""
    from launch.runtime import loop
    from launch.runtime.ds_config import ds_config
    from launch.runtime.metrics import MetricsLog
    from launch.runtime.staged import make_engine

    job.recipe.held_out = OneBatch(job.recipe.held_out, job.cfg.batch.micro_size * job.layout.data)
    engine_config = ds_config(job.cfg, job.layout, job.device.type)
    engine = make_engine(job.recipe, job.cfg, job.layout, engine_config, job.device, job.steps)
    metrics = MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl", []) if job.rank == 0 else None

    def log(row: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.log(row)
        if "split" not in row or row["step"] == 0:
            pause()

    loop.run(engine, job.recipe, job.cfg, job.layout, job.rank, job.steps, log)
    return lambda batch: engine.evaluate(iter([batch])).metrics["loss"]


def by_hand(job: Job, pause: Callable[[], None]) -> Loss:
    """What one writes without a framework: DDP, autocast below fp32, cross-entropy of all logits, AdamW, clipping."""
    import torch
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    from launch.runtime.engine import parameter_groups
    from launch.runtime.loop import training_batches

    cfg = job.cfg
    raw = whole_model(job, "fp32").train()
    model = DistributedDataParallel(raw, gradient_as_bucket_view=True) if job.layout.data > 1 else raw
    optimizer = torch.optim.AdamW(
        parameter_groups(raw, cfg.optimizer.weight_decay),
        lr=cfg.optimizer.lr,
        betas=tuple(cfg.optimizer.betas),
        eps=cfg.optimizer.eps,
        fused=cfg.optimizer.fused or None,
    )
    pause()
    for step in range(job.steps):
        for index, batch in enumerate(training_batches(step, job.rank, job.recipe, cfg, job.layout)):
            tensors = {name: torch.from_numpy(values).to(job.device) for name, values in batch.items()}
            last = index == cfg.batch.accumulation - 1
            with contextlib.nullcontext() if last or model is raw else model.no_sync():
                with torch.autocast(job.device.type, torch.bfloat16, enabled=cfg.precision.name != "fp32"):
                    logits = model(**inputs(tensors)).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), tensors["labels"].flatten())
                (loss / cfg.batch.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.optimizer.gradient_clipping or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        pause()
    return loss_of(raw, job)


def by_hand_pipeline(job: Job, pause: Callable[[], None]) -> Loss:
    """What DeepSpeed's tutorial shows: a PipelineModule of the model's layers, cut by parameters, mean losses.

    For a Llama with an untied head, on unpacked sequences: more would need more code.
    """
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule
    from torch import nn
    from torch.nn import functional as F

    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import training_batches

    cfg, causal = job.cfg, whole_model(job, job.cfg.precision.name)
    model = causal.model

    class Layer(nn.Module):
        def __init__(self, index: int):
            super().__init__()
            self.layer, self.rotary = model.layers[index], model.rotary_emb

        def forward(self, hidden: Any) -> Any:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            return self.layer(hidden, position_embeddings=self.rotary(hidden, positions), position_ids=positions)

    layers = [
        model.embed_tokens,
        *(Layer(index) for index in range(len(model.layers))),
        nn.Sequential(model.norm, causal.lm_head),
    ]

    def loss_fn(logits: Any, labels: Any) -> Any:
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    module = PipelineModule(layers, num_stages=job.layout.pipeline, loss_fn=loss_fn, partition_method="parameters")
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=ds_config(cfg, job.layout, job.device.type)
    )

    def pairs(batches: Any) -> Any:
        for batch in batches:
            yield torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["labels"])

    pause()
    for step in range(job.steps):
        engine.train_batch(pairs(training_batches(step, 0, job.recipe, cfg, job.layout)))
        pause()
    return lambda batch: float(engine.eval_batch(pairs([batch]), num_micro_batches=1))


def autotp(job: Job, pause: Callable[[], None]) -> Loss:
    """DeepSpeed's own automatic tensor parallelism."""
    import deepspeed
    import torch
    from torch.nn import functional as F

    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import training_batches

    cfg = job.cfg
    config = ds_config(cfg, job.layout, job.device.type) | {"tensor_parallel": {"autotp_size": job.layout.tensor}}
    del config["train_batch_size"]  # deepspeed 0.19.8 computes it from all ranks, the tensor ranks included
    model = deepspeed.tp_model_init(whole_model(job, "fp32"), tp_size=job.layout.tensor, dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)

    def loss(batch: Any) -> Any:
        tensors = {name: torch.from_numpy(values).to(job.device) for name, values in batch.items()}
        return F.cross_entropy(engine(**inputs(tensors)).logits.float().flatten(0, 1), tensors["labels"].flatten())

    pause()
    for step in range(job.steps):
        for batch in training_batches(step, 0, job.recipe, cfg, job.layout):
            engine.backward(loss(batch))
            engine.step()
        pause()

    def evaluate(batch: Any) -> float:
        with torch.no_grad():
            return float(loss(batch))

    return evaluate


def trainer(job: Job, pause: Callable[[], None]) -> Loss:
    """transformers.Trainer on the engine, with our engine configuration; no logging, saving or evaluation."""
    import torch
    import transformers

    from launch.runtime.ds_config import ds_config

    cfg, recipe = job.cfg, job.recipe

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return job.steps * cfg.batch.global_size

        def __getitem__(self, index: int) -> Any:
            return recipe.train.row(index)

    def collate(rows: list[Any]) -> dict[str, Any]:
        tensors = {name: torch.from_numpy(values) for name, values in recipe.collate(rows, len(rows)).items()}
        # Our labels are shifted already.
        return {**inputs(tensors), "labels": tensors["labels"], "shift_labels": tensors["labels"]}

    class Pause(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pause()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pause()

    optimizer = cfg.optimizer
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        deepspeed=ds_config(cfg, job.layout, job.device.type),
        max_steps=job.steps,
        per_device_train_batch_size=cfg.batch.micro_size,
        gradient_accumulation_steps=cfg.batch.accumulation,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant",
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.gradient_clipping,
        bf16=cfg.precision.name == "bf16",
        fp16=cfg.precision.name == "fp16",
        use_cpu=job.device.type == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    loop = transformers.Trainer(whole_model(job, cfg.precision.name), arguments, collate, Rows(), callbacks=[Pause()])
    loop.train()
    return loss_of(loop.model_wrapped, job)


def whole_model(job: Job, precision: str) -> Any:
    """The same initial weights for everyone, unsharded."""
    from launch.runtime.build import build
    from launch.runtime.topology import topology

    plain = replace(
        job.cfg,
        zero=replace(job.cfg.zero, stage=0),
        precision=replace(job.cfg.precision, name=precision),
        parallel=ParallelConfig(),
    )
    return build(job.recipe, plain, {}, job.device, topology(Layout(1, 1), 0))[0].model.to(job.device)


def inputs(tensors: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs: packed documents are told apart by their positions."""
    positions = {"position_ids": tensors["position_ids"]} if "position_ids" in tensors else {}
    return {"input_ids": tensors["input_ids"], **positions, "use_cache": False}


def held_out_batch(job: Job, rows: Any) -> Any:
    """One micro-batch of held-out rows: its loss is equal for all who did the same work."""
    size = job.cfg.batch.micro_size
    return job.recipe.collate([rows.row(i % len(rows)) for i in range(size)], size)


def loss_of(model: Callable[..., Any], job: Job) -> Loss:
    """Mean loss of a whole model."""
    import torch
    from torch.nn import functional as F

    def evaluate(batch: Any) -> float:
        tensors = {name: torch.from_numpy(values).to(job.device) for name, values in batch.items()}
        with torch.no_grad():
            logits = model(**inputs(tensors)).logits
        return float(F.cross_entropy(logits.float().flatten(0, 1), tensors["labels"].flatten()))

    return evaluate


LOOPS: dict[str, Callable[[Job, Callable[[], None]], Loss]] = {
    "ours": ours, "by_hand": by_hand, "trainer": trainer, "by_hand_pipeline": by_hand_pipeline, "autotp": autotp,
}  # fmt: skip
