"""Each rule: a request that breaks it, and its legal neighbour."""

from __future__ import annotations

import copy
import json
import os
from operator import attrgetter
from pathlib import Path

import pytest
from conf_cases import (
    BARE,
    CPU,
    CPU_AIO,
    CPU_FP16,
    CPU_NO_CACHE,
    GPU,
    GPU_BARE,
    NO_WANDB,
    problems_of,
    quick,
    unchecked,
    write,
)

from conf.batch import Layout
from conf.rules import RULES, check

LAYOUT = Layout(world=2, data=2)

ADAGRAD = ("optimizer=adagrad",)
ONE = "[{kind: stdlib}]"
TWO = "[{kind: stdlib}, {kind: stdlib, weight: 2}]"
PP = "parallel=pipeline"
JSONL = ("data=jsonl", "data.path=rows.jsonl")
PRETRAINED = ("model=pretrained", "model.path=./whole")

# (what breaks it, the key it names, its legal neighbour, the machine)
CASES = [
    # rules_values
    (["data.seq_length=1"], "data.seq_length", ["data.seq_length=2"], CPU),
    (["train.steps=-3"], "train.steps", ["train.steps=25"], CPU),
    (["train.steps=null", "train.epochs=0"], "train.epochs", ["train.steps=null", "train.epochs=0.5"], CPU),
    (["optimizer.lr=nan"], "optimizer.lr", ["optimizer.lr=0.1"], CPU),
    (["batch.micro_size=0"], "batch.micro_size", ["batch.micro_size=1"], CPU),
    (["device=gpu"], "device", ["device=cpu"], CPU),
    (["data=mixture", "data.mixture=[{kind: foo}, {}]"], "data.mixture[0].kind", ["data.mixture=[{}, {}]"], CPU),
    (["optimizer.betas=[0.9]"], "optimizer.betas", ["optimizer.betas=[0.9,0.999]"], CPU),
    (["data.mixture=[{weight: 0}, {}]"], "data.mixture[0].weight", [f"data.mixture={TWO}"], CPU),
    (["track.to=[tensorbord]"], "track.to", ["track.to=[tensorboard,csv]"], CPU),
    (["name=../../x"], "name", ["name=x/y"], CPU),
    (["name=."], "name", ["name=.x"], CPU),
    (["name=/tmp/x"], "name", ["run_dir=/tmp/deepspeed_recipes/x"], CPU),
    ([f"name={201 * 'x'}"], "name", [f"name={200 * 'x'}"], CPU),
    # rules_run
    (["train.steps=null"], "train.steps", ["train.steps=100"], CPU),
    (["train.epochs=1", "train.steps=200"], "train.epochs", ["train.epochs=1", "train.steps=null"], CPU),
    (["scheduler.warmup_steps=111"], "scheduler.warmup_steps", ["scheduler.warmup_steps=110"], CPU),
    (["scheduler.decay_steps=9"], "scheduler.decay_steps", ["scheduler=wsd", "scheduler.decay_steps=9"], CPU),
    (["scheduler=wsd", "scheduler.decay_steps=101"], "scheduler.decay_steps",
     ["scheduler=wsd", "scheduler.decay_steps=100"], CPU),
    (["scheduler=wsd", "scheduler.warmup_steps=89"], "scheduler.decay_steps",
     ["scheduler=wsd", "scheduler.warmup_steps=88"], CPU),
    (["scheduler=constant", "scheduler.min_ratio=0.1"], "scheduler.min_ratio",
     ["scheduler=linear", "scheduler.min_ratio=0.1"], CPU),
    (["device=cuda"], "device", ["device=cpu"], CPU),
    (["train.compile=true"], "train.compile", ["train.compile=false"], BARE),
    (["train.compile=true"], "train.compile", ["train.compile=false"], GPU_BARE),
    (["eval.prompt=null", "eval.new_tokens=9"], "eval.new_tokens", ["eval.new_tokens=9"], CPU),
    (["checkpoint.keep=3"], "checkpoint.keep", ["checkpoint.keep=3", "checkpoint.every=5"], CPU),
    (["checkpoint.every=9", "optimizer=lamb", "zero=stage0"], "checkpoint.every", ["checkpoint.every=9"], GPU),
    (["resume=auto", "optimizer=lamb", "zero=stage0"], "resume", ["resume=auto"], GPU),
    (["checkpoint.every=9", "zero=stage3_nvme", "zero.nvme_path=."], "checkpoint.every",
     ["checkpoint.every=9", "zero=stage3_offload"], CPU_AIO),
    (["checkpoint.every=9", "zero=stage3_plus", "zero.hpz_partition_size=4"], "checkpoint.every",
     ["checkpoint.every=9", "zero=stage3"], GPU),
    (["resume=auto", "overwrite=true"], "overwrite", ["resume=auto"], CPU),
    (["checkpoint.keep_best=1", "checkpoint.every=5"], "checkpoint.keep_best",
     ["checkpoint.keep_best=1", "checkpoint.every=5", "eval.every=5", "eval.metric=loss"], CPU),
    (["checkpoint.minutes=0"], "checkpoint.minutes", ["checkpoint.minutes=10"], CPU),
    (["faults.on_bad_step=skipp"], "faults.on_bad_step", ["faults.on_bad_step=skip"], CPU),
    (["faults.on_bad_step=rewind"], "faults.on_bad_step", ["faults.on_bad_step=rewind", "checkpoint.minutes=10"], CPU),
    (["faults.bad_steps=3"], "faults.bad_steps", ["faults.bad_steps=3", "faults.on_bad_step=skip"], CPU),
    (["faults.spike=1"], "faults.spike", ["faults.spike=2"], CPU),
    (["optimizer=muon", "optimizer.gradient_clipping=1.0"], "optimizer.gradient_clipping",
     ["optimizer=muon", "optimizer.gradient_clipping=1.0", "zero=stage0"], CPU),
    (["optimizer=adagrad"], "optimizer.name", ["optimizer=adagrad", "zero=stage0"], CPU),
    (["model.config.use_cache=true"], "model.config.use_cache", [], CPU),
    (["model.config.eos_token_id=5"], "model.config.eos_token_id", [], CPU),
    (["track=wandb"], "track.to", ["track=csv"], NO_WANDB),
    (["track.project=x"], "track.project", ["track.project=x", "track=wandb"], CPU),
    # rules_optimizer
    (["optimizer.name=OneBitAdam"], "optimizer.name", ["optimizer.name=AdamW"], CPU),
    (["optimizer.name=zerooneadam"], "optimizer.name", ["optimizer.name=adam"], CPU),
    (["optimizer.name=adamm"], "optimizer.name", ["optimizer.name=nadam"], CPU),
    (["optimizer.name=lbfgs"], "optimizer.name", ["optimizer.name=radam"], CPU),
    (["optimizer.momentum=0.9"], "optimizer.momentum", ["optimizer=sgd", "optimizer.momentum=0.8"], CPU),
    (["optimizer=sgd", "optimizer.betas=[0.9,0.9]"], "optimizer.betas", ["optimizer=sgd"], CPU),
    (["optimizer=adagrad", "optimizer.fused=true"], "optimizer.fused", ["optimizer.fused=true"], CPU),
    (["optimizer.betas=null"], "optimizer.betas", ["optimizer=sgd"], CPU),
    (["optimizer.fused=true", "zero=stage2_offload"], "optimizer.fused", ["zero=stage2_offload"], CPU),
    (["optimizer=lion"], "optimizer.name", ["optimizer=lion", "zero=stage2_offload"], CPU),
    (["optimizer=lamb", "zero=stage0"], "optimizer.name", ["optimizer=adam", "zero=stage0"], CPU),
    (["optimizer=lamb"], "optimizer.name", ["optimizer=lamb", "zero=stage0"], GPU),
    (["optimizer=lion"], "optimizer.name", ["optimizer=adamw"], GPU_BARE),
    (["optimizer=lamb", "zero=stage0", "precision=fp16", "precision.accumulation_dtype=fp16", "precision.loss_scale=8"],
     "precision.loss_scale",
     ["optimizer=lamb", "zero=stage0", "precision=fp16", "precision.accumulation_dtype=fp16"], GPU),
    (["optimizer=muon", "zero=stage3_plus", "zero.hpz_partition_size=1"], "zero.quantized_gradients",
     ["optimizer=muon", "zero=stage3"], GPU),
    (["precision=fp16"], "precision", ["precision=bf16"], CPU),
    (["precision=fp16", "device=cpu"], "precision", ["precision=fp16"], GPU),
    (["precision.loss_scale=8"], "precision.loss_scale", ["precision=fp16", "precision.loss_scale=8"], CPU_FP16),
    (["precision=fp16", "precision.loss_scale=8", "precision.loss_scale_window=9"], "precision.loss_scale_window",
     ["precision=fp16", "precision.loss_scale_window=9"], CPU_FP16),
    (["precision=bf16", "zero=stage0"], "precision.accumulation_dtype",
     ["precision=bf16", "zero=stage0", "precision.accumulation_dtype=bf16"], CPU),
    (["precision.accumulation_dtype=bf16"], "precision.accumulation_dtype",
     ["precision=bf16", "precision.accumulation_dtype=bf16"], CPU),
    (["precision=bf16", "precision.accumulation_dtype=fp16"], "precision.accumulation_dtype", ["precision=bf16"], CPU),
    # rules_parallel, of norms
    (["precision=bf16", "zero=stage0", "precision.accumulation_dtype=bf16", "parallel=tensor"], "zero.stage",
     ["precision=bf16", "zero=stage1", "parallel=tensor"], CPU),
    (["precision=fp16", "zero=stage0", "precision.accumulation_dtype=fp16", PP], "zero.stage",
     ["precision=bf16", "zero=stage0", "precision.accumulation_dtype=bf16", PP], CPU_FP16),
    # rules_zero
    (["zero=stage3_plus"], "zero.quantized_weights",
     ["zero=stage3", "zero.hpz_partition_size=2"], GPU_BARE),
    (["zero=stage0", "zero.overlap_comm=true"], "zero.overlap_comm", ["zero.overlap_comm=true"], CPU),
    (["zero=stage3", "zero.allgather_bucket_size=9"], "zero.allgather_bucket_size",
     ["zero=stage2", "zero.allgather_bucket_size=9"], CPU),
    (["zero=stage2", "zero.prefetch_bucket_size=9"], "zero.prefetch_bucket_size",
     ["zero=stage3", "zero.prefetch_bucket_size=9"], CPU),
    (["zero=stage0", "zero.offload_optimizer=cpu"], "zero.offload_optimizer", ["zero.offload_optimizer=cpu"], CPU),
    (["zero=stage2", "zero.offload_param=cpu"], "zero.offload_param", ["zero=stage3", "zero.offload_param=cpu"], CPU),
    (["zero=stage2", "zero.offload_optimizer=nvme", "zero.nvme_path=."], "zero.offload_optimizer",
     ["zero=stage3_nvme", "zero.nvme_path=."], CPU_AIO),
    (["zero=stage2_offload", "optimizer=sgd"], "optimizer.name", ["zero=stage2_offload", *ADAGRAD], CPU),
    (["zero=stage2_offload"], "zero.offload_optimizer", ["zero=stage2"], BARE),
    (["zero=stage2_offload"], "zero.offload_optimizer", ["zero=stage2"], CPU_NO_CACHE),
    (["zero=stage3_nvme"], "zero.nvme_path", ["zero=stage3_nvme", "zero.nvme_path=."], CPU_AIO),
    (["zero=stage3_nvme", "zero.nvme_path=nowhere"], "zero.nvme_path", ["zero=stage3_nvme", "zero.nvme_path=."],
     CPU_AIO),
    (["zero=stage3_nvme", "zero.nvme_path=."], "zero.offload_optimizer", ["zero=stage3_offload"], CPU),
    (["zero=stage3", "zero.nvme_path=."], "zero.nvme_path", ["zero=stage3"], CPU_AIO),
    (["zero=stage3_plus", "zero.hpz_partition_size=2"], "zero.hpz_partition_size", ["zero=stage3"], CPU),
    (["zero=stage3_plus"], "zero.hpz_partition_size", ["zero=stage3_plus", "zero.hpz_partition_size=2"], GPU),
    (["zero=stage2", "zero.quantized_weights=true"], "zero.quantized_weights",
     ["zero=stage3", "zero.quantized_weights=true"], GPU),
    # rules_parallel
    (["parallel.pipeline=2", "zero=stage2"], "zero.stage", ["parallel.pipeline=2"], CPU),
    (["parallel.pipeline_split=[1,3]"], "parallel.pipeline_split", [PP, "parallel.pipeline_split=[1,3]"], CPU),
    ([PP, "parallel.pipeline_split=[1,2,1]"], "parallel.pipeline_split", [PP, "parallel.pipeline_split=[1,3]"], CPU),
    ([PP, "parallel.pipeline_split=[0,4]"], "parallel.pipeline_split", [PP, "parallel.pipeline_split=[2,2]"], CPU),
    (["parallel.schedule=dualpipev"], "parallel.schedule", [PP, "parallel.schedule=dualpipev"], CPU),
    ([PP, "parallel.schedule=dualpipev", "batch.micro_size=16"], "parallel.schedule",
     [PP, "parallel.schedule=dualpipev", "batch.micro_size=8"], CPU),
    ([PP, "parallel.schedule=dualpipev", "parallel.pipeline_split=[2,2]"], "parallel.pipeline_split",
     [PP, "parallel.schedule=dualpipev", "parallel.pipeline_split=[1,1,1,1]"], CPU),
    ([PP, "parallel.schedule=zigzag"], "parallel.schedule", [PP, "parallel.schedule=1f1b"], CPU),
    (["parallel=sequence", "data.seq_length=255"], "data.seq_length", ["parallel=sequence"], CPU),
    (["parallel=sequence", "model.attention=eager"], "model.attention",
     ["parallel=sequence", "model.attention=sdpa"], CPU),
    (["parallel=tensor", "optimizer=muon", "optimizer.gradient_clipping=0"], "optimizer.name", ["parallel=tensor"],
     CPU),
    ([PP, "train.compile=true"], "train.compile", ["train.compile=true"], CPU),
    ([PP, "zero.offload_optimizer=cpu"], "zero.offload_optimizer", ["zero=stage2", "zero.offload_optimizer=cpu"], CPU),
    (["parallel=tensor", "zero=stage3", "zero.quantized_weights=true"], "zero.quantized_weights",
     ["parallel=tensor", "zero=stage3"], GPU),
    (["parallel.expert=2"], "parallel.expert", ["parallel.expert=1"], CPU),
    (["parallel.tensor=3"], "parallel.tensor", [], CPU),
    (["eval.metric=loss"], "eval.metric", ["eval.metric=loss", "eval.every=5"], CPU),
    (["eval.metric=loss", "eval.every=50", "train.steps=50"], "eval.every",
     ["eval.metric=loss", "eval.every=25", "train.steps=50"], CPU),
    (["eval.patience=2", "eval.every=5"], "eval.patience", ["eval.metric=loss", "eval.patience=2", "eval.every=5"],
     CPU),
    (["eval.beams=4"], "eval.beams", ["eval.beams=1"], CPU),
    # rules_data
    (["data=text"], "data.path", ["data=text", "data.path=notes.txt"], CPU),
    (["data=hub"], "data.name", ["data=hub", "data.name=x"], CPU),
    (["data=mixture", "data.mixture=[{kind: text}, {}]"], "data.mixture[0].path",
     ["data=mixture", "data.mixture=[{kind: text, path: notes.txt}, {}]"], CPU),
    (["data.path=notes.txt"], "data.path", ["data=text", "data.path=notes.txt"], CPU),
    (["data=text", "data.path=notes.txt", "data.text=body"], "data.text", [*JSONL, "data.text=body"], CPU),
    ([*JSONL, "data.encoding=latin-99"], "data.encoding", [*JSONL, "data.encoding=latin-1"], CPU),
    ([*JSONL, "data.encoding=utf7"], "data.encoding", [*JSONL, "data.encoding=utf-16"], CPU),
    (["data.encoding=cp1252"], "data.encoding", [*JSONL, "data.encoding=cp1252"], CPU),
    ([*JSONL, "data.delimiter=';'"], "data.delimiter", ["data=csv", "data.path=notes.txt", "data.delimiter=';'"], CPU),
    ([*JSONL, "data.subset=x"], "data.subset", ["data=hub", "data.name=x", "data.subset=x"], CPU),
    (["data=mixture"], "data.mixture", ["data=mixture", f"data.mixture={TWO}"], CPU),
    (["data=mixture", f"data.mixture={ONE}"], "data.mixture", [f"data.mixture={TWO}"], CPU),
    ([f"data.mixture={TWO}", "data.name=x"], "data.name", [f"data.mixture={TWO}"], CPU),
    (["data.weight=2"], "data.weight", ["data.weight=1"], CPU),
    ([*JSONL, "data.prompt=q"], "data.completion", [*JSONL, "data.prompt=q", "data.completion=a"], CPU),
    ([*JSONL, "data.prompt=q", "data.completion=a", "data.messages=m"], "data.messages", [*JSONL, "data.messages=m"],
     CPU),
    ([*JSONL, "data.messages=m", "data.chat_date=today"], "data.chat_date",
     [*JSONL, "data.messages=m", "data.chat_date=2026-11-27"], CPU),
    ([*JSONL, "data.chat_date=2026-11-27"], "data.chat_date", [*JSONL, "data.chat_date=2024-07-26"], CPU),
    ([*JSONL, "data.chat_options={thinking: false}"], "data.chat_options",
     [*JSONL, "data.messages=m", "data.chat_options={thinking: false}"], CPU),
    (["data.max_unreadable=1.5"], "data.max_unreadable", ["data.max_unreadable=1"], CPU),
    ([*JSONL, "data.messages=m", "data.text=t"], "data.text", [*JSONL, "data.text=t"], CPU),
    ([*JSONL, "data.eval_path=rows.jsonl", "data.held_out=0.1"], "data.held_out", [*JSONL, "data.held_out=0.1"], CPU),
    ([*JSONL, "data.max_files=3"], "data.max_files", ["data.max_files=3"], CPU),
    (["data=text", "data.path=nots.txt"], "data.path", ["data=text", "data.path=./notes.txt"], CPU),
    (["data=text", "data.path='*.md'"], "data.path", ["data=text", "data.path='*.txt'"], CPU),
    ([*JSONL, "data.eval_path=rows.json"], "data.eval_path", [*JSONL, "data.eval_path=rows.jsonl"], CPU),
    (["data.seq_length=1025"], "data.seq_length", ["data.seq_length=1024"], CPU),
    (["model=gpt2_tiny", "data.seq_length=257"], "data.seq_length", ["model=gpt2_tiny"], CPU),
    (["data.vocab_size=4097"], "data.vocab_size", ["data.vocab_size=4096"], CPU),
    (["data.vocab_size=500", "model.tokenizer=x"], "data.vocab_size", ["model.tokenizer=x"], CPU),
    # rules_model
    (["model=pretrained"], "model.path", [*PRETRAINED], CPU),
    (["model.path=./whole"], "model.type", [*PRETRAINED], CPU),
    ([*PRETRAINED, "model.config.hidden_size=3"], "model.config", [*PRETRAINED], CPU),
    (["model.gguf_file=x.gguf"], "model.gguf_file",
     ["model=pretrained", "model.path=./ggufs", "model.gguf_file=a.gguf"], CPU),
    (["model.config.num_hidden_layers=0"], "model.config.num_hidden_layers", ["model.config.num_hidden_layers=1"], CPU),
    (["model.config.hidden_size=big"], "model.config.hidden_size", ["model.config.hidden_size=512"], CPU),
    (["model.config.num_attention_heads=7"], "model.config.num_attention_heads",
     ["model.config.num_attention_heads=16"], CPU),
    (["model.config.auto_map={a: b}"], "model.config.auto_map", ["model.config.attention_bias=true"], CPU),
    (["model.config._target_=os.system"], "model.config._target_", ["model.config.hidden_act=gelu"], CPU),
    (["model.attention=sdap"], "model.attention", ["model.attention=sdpa"], CPU),
    (["model.attention=flash_attention_2"], "model.attention", ["model.attention=eager"], CPU),
    (["model.attention=flash_attention_3"], "model.attention", ["model.attention=sdpa"], GPU),
    (["model.attention=flash_attention_2"], "model.attention", ["model.attention=flex_attention"], GPU),
    (["model=pretrained", "model.path=./hole"], "model.path", [*PRETRAINED], CPU),
    (
        ["model=pretrained", "model.path=./empty", "model.revision=v1"],
        "model.revision",
        ["model=pretrained", "model.path=owner/name", "model.revision=v1"],
        CPU,
    ),
    (["model.revision=v1"], "model.revision", ["model=pretrained", "model.path=owner/name", "model.revision=v1"], CPU),
    (
        ["model.tokenizer=./empty", "model.tokenizer_revision=v1"],
        "model.tokenizer_revision",
        ["model.tokenizer=owner/name", "model.tokenizer_revision=v1"],
        CPU,
    ),
    (
        ["data=hub", "data.name=./empty", "data.revision=v1"],
        "data.revision",
        ["data=hub", "data.name=owner/name", "data.revision=v1"],
        CPU,
    ),
    (["data.revision=v1"], "data.revision", ["data=hub", "data.name=owner/name", "data.revision=v1"], CPU),
    (["model=pretrained", "model.path=./empty"], "model.path", ["model=pretrained", "model.path=owner/name"], CPU),
    (["model=pretrained", "model.path=./pickled"], "model.path", [*PRETRAINED], CPU),
    (["model=pretrained", "model.path=./bare"], "model.path", [*PRETRAINED], CPU),
    (["model=pretrained", "model.path=notes.txt"], "model.path", [*PRETRAINED], CPU),
    (["model=pretrained", "model.path=./ggufs"], "model.path",
     ["model=pretrained", "model.path=./ggufs", "model.gguf_file=a.gguf"], CPU),
    (["model=pretrained", "model.path=./ggufs", "model.gguf_file=b.gguf"], "model.gguf_file",
     ["model=pretrained", "model.path=./ggufs", "model.gguf_file=a.gguf"], CPU),
    (["model=pretrained", "model.path=package:no_such_thing"], "model.path", [*PRETRAINED], CPU),
    # rules_engine
    (["deepspeed.gradient_cliping=1"], "deepspeed.gradient_cliping", ["optimizer.gradient_clipping=0.5"], CPU),
    (["deepspeed.bf16.enabled=true", "precision=bf16_autocast"], "deepspeed.bf16", ["precision=bf16_autocast"], CPU),
    (["deepspeed.fp16.hysteresis=3"], "deepspeed.fp16.hysteresis",
     ["precision=fp16", "deepspeed.fp16.hysteresis=3"], CPU_FP16),
    (["deepspeed.aio.queue_depth=3"], "deepspeed.aio.queue_depth",
     ["zero=stage3_nvme", "zero.nvme_path=.", "deepspeed.aio.queue_depth=3"], CPU_AIO),
    (["deepspeed.zero_optimization.stage3_max_live_parameters=9"],
     "deepspeed.zero_optimization.stage3_max_live_parameters",
     ["zero=stage3", "deepspeed.zero_optimization.stage3_max_live_parameters=9"], CPU),
    (["zero=stage3", "deepspeed.zero_optimization.zero_quantized_nontrainable_weights=true"],
     "deepspeed.zero_optimization.zero_quantized_nontrainable_weights", ["zero=stage3"], CPU),
    (["zero=stage2_offload", "deepspeed.zero_optimization.offload_optimizer.ratio=0.5"],
     "deepspeed.zero_optimization.offload_optimizer.ratio",
     ["zero=stage3_offload", "deepspeed.zero_optimization.offload_optimizer.ratio=0.5"], CPU),
    (["zero=stage3_offload", "deepspeed.zero_optimization.offload_optimizer.super_offload=true"],
     "deepspeed.zero_optimization.offload_optimizer.super_offload", ["zero=stage3_offload"], CPU),
    (["zero=stage3", "optimizer=muon", "deepspeed.zero_optimization.reduce_scatter=true"],
     "deepspeed.zero_optimization.reduce_scatter", ["zero=stage3", "optimizer=muon"], CPU),
    (["precision=bf16", "deepspeed.bf16.bf16_optimizer_states=true"], "deepspeed.bf16.bf16_optimizer_states",
     ["precision=bf16", "deepspeed.bf16={bf16_optimizer_states: true, bf16_master_weights_and_grads: true}"], CPU),
    (["precision=bf16", "deepspeed.bf16.bf16_master_weights_and_grads=true"],
     "deepspeed.bf16.bf16_master_weights_and_grads",
     ["precision=bf16", "zero=stage2_offload", "deepspeed.bf16.bf16_master_weights_and_grads=true"], CPU),
]  # fmt: skip


# (key, illegal value, legal value): what one key alone may hold
VALUES = [
    ("task", "causal", "causal_lm"),
    ("seed", -1, 0),
    ("seed", 2**32, 2**32 - 1),
    ("data.seq_length", 1, 2),
    ("data.held_out", 1.0, 0.5),
    ("data.held_out", 0.0, 0.001),
    ("data.max_files", 0, 2),
    ("data.vocab_size", 100, 4096),
    ("data.packing", "doc", "blocks"),
    ("data.kind", "sdtlib", "stdlib"),
    ("train.steps", 0, 25),
    ("train.activation_checkpointing", -1, 2),
    ("train.threads", 0, 1),
    ("optimizer.lr", 0.0, 1e-9),
    ("optimizer.lr", -1e-3, 1.0),
    ("optimizer.lr", float("inf"), 0.5),
    ("optimizer.weight_decay", -0.1, 0.0),
    ("optimizer.eps", 0.0, 1e-12),
    ("optimizer.betas", [0.9, 1.0], [0.0, 0.999]),
    ("optimizer.gradient_clipping", -1.0, 0.0),
    ("scheduler.name", "cosin", "linear"),
    ("scheduler.min_ratio", 1.5, 1.0),
    ("scheduler.warmup_steps", -1, 0),
    ("scheduler.decay_steps", 0, None),
    ("precision.name", "fp64", "bf16"),
    ("precision.accumulation_dtype", "tf32", "fp32"),
    ("zero.stage", 4, 3),
    ("zero.reduce_bucket_size", 0, 1),
    ("zero.offload_optimizer", "disk", "cpu"),
    ("eval.every", -1, 0),
    ("eval.micro_size", 0, 1),
    ("eval.new_tokens", 0, 1),
    ("track.to", ["csv", "csv"], ["csv"]),
]


@pytest.mark.parametrize(("key", "wrong", "legal"), VALUES, ids=[f"{key}={wrong}" for key, wrong, _ in VALUES])
def test_the_values_of_one_key(key, wrong, legal, quickstart):
    section, name = key.rpartition(".")[::2]
    owner = attrgetter(section)(quickstart) if section else quickstart
    for value, expected in ((wrong, True), (legal, False)):
        setattr(owner, name, value)
        found = [problem for problem in check(quickstart, LAYOUT, CPU) if problem.key == key]
        assert bool(found) == expected, found
        assert all(problem.nearest for problem in found)


@pytest.fixture(scope="module")
def composed():
    return unchecked(quick())


@pytest.fixture
def quickstart(composed):
    return copy.deepcopy(composed)


@pytest.fixture
def files(empty_directory):
    """The files that the cases name."""
    write("notes.txt", "one\ntwo\n")
    write("rows.jsonl", json.dumps({"text": "a"}) + "\n")
    write("whole/config.json", "{}")
    write("pickled/config.json", "{}")
    write("pickled/pytorch_model.bin")
    for folder in ("whole", "bare"):
        (Path(folder)).mkdir(exist_ok=True)
        Path(folder, "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    write("empty/config.json", "{}")
    write("ggufs/a.gguf")


@pytest.mark.parametrize(("wrong", "key", "legal", "env"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_a_rule_and_its_legal_neighbour(files, wrong, key, legal, env):
    broken = problems_of(quick(*wrong), env=env)
    assert key in [part.partition("=")[0] for problem in broken for part in problem.key.split()], broken
    assert all(problem.rule and problem.nearest for problem in broken), broken
    assert problems_of(quick(*legal), env=env) == []


def test_every_rule_has_a_case(files):
    """A new rule without a case in CASES (or in the tests of run directories) fails here."""
    from conf import rules_run

    elsewhere = {rules_run.run_dir}
    seen = set()
    for wrong, _, _, env in CASES:
        config = unchecked(quick(*wrong))
        seen |= {rule for rule in RULES if any(rule(config, LAYOUT, env.on(config.device)))}
    assert {rule.__name__ for rule in RULES} - {rule.__name__ for rule in seen | elsewhere} == set()


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        (["data=text", "data.path=nots.txt"], "data.path=notes.txt"),
        (["model=pretrained", "model.path=./hole"], "model.path=whole"),
        (["model=pretrained", "model.path=./ggufs"], "model.gguf_file=a.gguf"),
        (["model=pretrained", "model.path=package:hidra"], "model.path=package:hydra"),
        (["device=gpu"], "device=cpu"),
        (["optimizer.name=adamwz"], "optimizer.name=adamw"),
    ],
)
def test_what_is_near(files, wrong, nearest):
    assert [problem.nearest for problem in problems_of(quick(*wrong))] == [nearest]


class TestRunDirectory:
    """A run directory is never overwritten unasked, and never mixed with other things."""

    def keys(self, *overrides: str) -> list[str]:
        return [problem.key for problem in problems_of(quick(*overrides))]

    def test_finished(self):
        write("runs/quickstart/summary.json")
        (problem,) = problems_of(quick())
        assert (problem.key, "finished" in problem.rule) == ("run_dir", True)
        assert problem.nearest == "run_dir=runs/quickstart-2, or overwrite=true"
        assert self.keys("overwrite=true") == []
        assert self.keys("run_dir=runs/quickstart-2") == []
        assert self.keys("name=other") == []

    def test_unfinished(self):
        write("runs/quickstart/metrics.jsonl")
        (problem,) = problems_of(quick())
        assert "unfinished" in problem.rule
        assert self.keys("overwrite=true") == []

    def test_a_start_that_failed_leaves_nothing_in_the_way(self):
        write("runs/quickstart/config.yaml")
        write("runs/quickstart/logs/rank0.log")
        assert self.keys() == []

    def test_foreign(self):
        write("project/main.py")
        write("project/model/weights.txt")
        (problem,) = problems_of(quick("run_dir=project"))
        assert "main.py" in problem.rule
        assert self.keys("run_dir=project", "overwrite=true") == ["run_dir"]
        assert self.keys("run_dir=project/run") == []

    def test_a_file(self):
        write("taken")
        assert self.keys("run_dir=taken") == ["run_dir"]
        assert self.keys("run_dir=taken/run") == ["run_dir"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_read_only(self):
        os.mkdir("locked", mode=0o555)
        assert self.keys("run_dir=locked/run") == ["run_dir"]

    def test_not_writable(self, monkeypatch):
        """The same as far as it shows to root: the answer of the system is the rule's."""
        monkeypatch.setattr("conf.rules_run.os.access", lambda path, mode: False)
        assert self.keys() == ["run_dir"]


def test_optimizers_of_torch():
    """The table of fields against the signatures of torch.optim (which the engine calls them with)."""
    torch = pytest.importorskip("torch")
    import inspect

    from conf.rules_optimizer import OPTIMIZERS, REMOVED, UNFIT

    names = [name for name in dir(torch.optim) if inspect.isclass(getattr(torch.optim, name))]
    classes = {name.lower(): getattr(torch.optim, name) for name in names}
    for name, fields in OPTIMIZERS.items():
        if name in ("lion", "lamb", "muon"):  # the engine's own
            continue
        taken = inspect.signature(classes[name]).parameters
        assert {"lr", "weight_decay"} <= set(taken), name
        assert set(fields) <= set(taken), name
        missing = {"betas", "momentum"} & set(taken) - set(fields)
        assert not missing, (name, missing)
    known = set(OPTIMIZERS) | set(UNFIT) | {"optimizer"}
    assert set(classes) - known == set(), "a new class of torch.optim: add it to OPTIMIZERS or UNFIT"
    assert not set(REMOVED) & set(OPTIMIZERS)
