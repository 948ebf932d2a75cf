"""The typed schema: every key a user may set, its unit and its legal values.

Hydra merges the YAML groups over these dataclasses, so a wrong type or an unknown key is refused while composing.
`conf/rules.py` holds what has to be true *between* keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRECISIONS = ("fp32", "bf16", "fp16", "bf16_autocast")
TASKS = tuple(
    file.stem
    for file in sorted(Path(__file__).parents[1].glob("recipes/*.py"))
    if "\nrecipe = " in file.read_text(encoding="utf-8")
)
"""Modules of `recipes/` that name their `recipe`."""
ACCUMULATION_DTYPES = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
PACKINGS = ("documents", "blocks", "none")
PIPELINE_SCHEDULES = ("1f1b", "dualpipev")
SOURCES = ("stdlib", "text", "jsonl", "csv", "parquet", "hub")
TASK_SOURCES = (*SOURCES, "conll", "squad", "lines", "idx", "images", "digits", "line")
"""Kinds of data of all tasks; `SOURCES` are those of a language model, and of its mixtures."""
OVERLONG = ("truncate", "refuse")
BLEU_TOKENS = ("13a", "intl", "zh", "char", "none")
EMPTY = ("refuse", "skip")
TRACKERS = ("tensorboard", "wandb", "mlflow", "csv")
OFFLOADS = ("none", "cpu", "nvme")
DEVICES = ("auto", "cpu", "cuda")
BAD_STEPS = ("stop", "skip", "rewind")


@dataclass
class ModelConfig:
    """Which Hugging Face model: either built from `type` + `config`, or loaded from `path`."""

    type: str | None = None
    """`model_type` of transformers (llama, gpt2, …) for a model trained from scratch; null when `path` is given."""
    config: dict[str, Any] = field(default_factory=dict)
    """Attributes of that model's transformers config (hidden_size, num_hidden_layers, …)."""
    path: str | None = None
    """Hub name or local folder with pretrained weights (or the folder/package that holds `gguf_file`)."""
    variant: str | None = None
    """Which of several weights in `path`, as transformers has it: fp16 for model.fp16.safetensors."""
    subfolder: str | None = None
    """Folder inside `path` that holds the model."""
    gguf_file: str | None = None
    """A GGUF file inside `path`; `path=package:NAME` means the folder of an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the hub; null: its main branch."""
    tokenizer: str | None = None
    """Hub name or local folder of a tokenizer; null: that of `path`, or one trained on the data for a new model."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of `tokenizer` on the hub; null: its main branch."""
    attention: str | None = None
    """Attention implementation of transformers: sdpa, eager, flash_attention_2, …; null: the best of the family."""
    dropout: float | None = None
    """Probability of every dropout in the model (attention, hidden states, embeddings, head); null: its own config's.
    0 is faster on CPUs, in attention above all."""


@dataclass
class SourceConfig:
    """Where rows come from. One source; `data.mixture` holds several."""

    kind: str = "stdlib"
    """stdlib | text | jsonl | csv | parquet | hub (mixture: the sources of `data.mixture`); other tasks also conll |
    squad | lines | idx | images | digits | line (a straight line)."""
    path: str | None = None
    """File, folder or glob, for every kind that reads files. Relative paths are relative to the working directory."""
    eval_path: str | None = None
    """Files of the held-out split; null: `held_out` of the rows of `path` are set aside."""
    name: str | None = None
    """Hub data set name (kind=hub)."""
    subset: str | None = None
    """Configuration name of the hub data set."""
    split: str = "train"
    """Training split of the hub data set."""
    eval_split: str | None = None
    """Held-out split of the hub data set; null: `held_out` of `split` is set aside."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; null: its main branch."""
    text: str = "text"
    """Column with the text (plain rows)."""
    prompt: str | None = None
    """Column with the prompt; with `completion`, the loss is on the completion only."""
    completion: str | None = None
    """Column with the completion."""
    messages: str | None = None
    """Column with a chat (list of {role, content}, or JSON text of one); the loss is on the assistant's turns only, and
    not on those with `weight: 0` or `train: false`. `tool_calls` of messages and a column `tools` beside it reach the
    chat template."""
    delimiter: str = ","
    """Field delimiter of csv files."""
    header: list[str] | None = None
    """Column names of csv files that have no header line."""
    quoting: bool | None = None
    """Whether fields of csv files may stand in quotation marks; null: yes, but not where tabs delimit them."""
    encoding: str = "utf-8"
    """Of files with text: any that Python knows (cp1252, latin-1, utf-16, gb18030, …). A byte order mark is passed
    over; a byte that does not belong there is refused with file, line and place."""
    max_expansion: float = 200.0
    """A file (compressed, or Parquet) that holds more than 64 MiB, and more than so many times its own size, is
    refused: it was made to fill memory or disk."""
    weight: float = 1.0
    """Share of this source in a mixture, in sequences, relative to the other weights."""


@dataclass
class DataConfig(SourceConfig):
    """Rows, their tokenisation and their packing into sequences."""

    mixture: list[SourceConfig] = field(default_factory=list)
    """Several weighted sources; when not empty, the single-source keys above must keep their defaults."""
    label: str | None = None
    """Column with the class, the list of classes, the tags of the tokens (conll: its number), or the number to
    predict; null: `label`, of tokens `tags`, of conll the last one."""
    pair: str | None = None
    """Column with a second text (sequence_classification)."""
    tokens: str | None = None
    """Column with the list of tokens (token_classification; conll: its number); null: `tokens`, of conll the first."""
    question: str | None = None
    """Column with the question (question_answering); null: `question`."""
    context: str | None = None
    """Column with the text that holds the answer; null: `context`."""
    answers: str | None = None
    """Column with the answers as SQuAD has them: `{text: […], answer_start: […]}`, or `[{text: …, answer_start: …}]`;
    null: `answers`."""
    source: str | None = None
    """Column with the text to translate, or of an object of languages (`translation.en`); null: `source`."""
    target: str | None = None
    """Column with its translation; null: `target`."""
    source_prefix: str = ""
    """What stands before each source (translation): a T5's task (`translate English to French: `), a Marian's language
    (`>>fra<< `)."""
    target_path: str | None = None
    """File aligned with `path`, line by line (lines), or the labels of its images (idx)."""
    eval_target_path: str | None = None
    """The same for `eval_path`."""
    image: str | None = None
    """Column with the image (hub); null: `image`."""
    image_size: int | None = None
    """Pixels along each side that images are given for a new model whose configuration has no `image_size`
    (convolutional networks: bit, resnet, regnet). null: as the configuration, or the image processor of a pretrained
    model, says."""
    max_pixels: int = 64_000_000
    """Largest image that is decoded (images, hub), width × height; a larger one is refused."""
    features: list[str] = field(default_factory=list)
    """Columns with numbers (regression); empty: a text."""
    labels: list[str] | None = None
    """Names of the classes in the order of their numbers; null: those of a pretrained model that knows them all, else
    those of the training rows, sorted."""
    multi_label: bool = False
    """A row has any number of classes (sequence_classification): its column is a list, or names with `|` between."""
    overlong: str = "truncate"
    """What happens to a row longer than `seq_length`: truncate (and count) | refuse. Not in causal_lm, where documents
    go on in the next sequence and completions are cut and counted, nor in question_answering, which reads windows."""
    empty: str = "refuse"
    """What happens to a row whose text or label is blank (not in causal_lm, which counts them): refuse, with file and
    line | skip (and count, as far as `max_dropped` allows)."""
    max_dropped: float = 0.05
    """Largest share of the rows of a source that may be dropped (nothing in them is supervised within `seq_length`, a
    column is blank); with more the run is refused. What is dropped, cut or changed is counted by reason, said before
    the start and written to `summary.json`."""
    max_unreadable: float = 0.5
    """Largest share of the text that may be unreadable for the model: tokens that its tokenizer does not know, letters
    of scripts that a pretrained model's tokenizer takes apart, targets that no prediction can be. With more the run is
    refused; above 0.05 it is said, with an example; all of it is in `summary.json`."""
    stride: int = 64
    """Tokens that neighbouring windows of a long text share (question_answering)."""
    bucketing: bool = True
    """Rows of similar length share a batch (token_classification, translation: a micro-batch; not causal_lm, which
    packs)."""
    seq_length: int = 512
    """Tokens per sequence; in translation of source and target each."""
    packing: str = "documents"
    """documents: several per sequence, no attention across them, positions restart · blocks: one stream cut into
    fixed lengths · none: one row per sequence, padded."""
    vocab_size: int | None = None
    """Size of the tokenizer trained on the data (new models only); null: `model.config.vocab_size`, else 8192."""
    held_out: float = 0.02
    """Share of rows set aside for evaluation, 0 < held_out < 1; of stdlib and text whole files (classify_packages:
    functions), of SQuAD whole articles, of a single text its end."""
    max_files: int | None = None
    """Read at most this many files (stdlib, text), in sorted order (classify_packages: one of each package in turn);
    null: all."""
    chat_date: str = "2024-07-26"
    """What chat templates that write today's date are told it is (YYYY-MM-DD): rows do not change with the day."""
    chat_options: dict[str, Any] = field(default_factory=dict)
    """What else the chat template is told, by the names that it reads (`{enable_thinking: false}`)."""
    cache_dir: str | None = None
    """Where tokenised data is kept; null: $XDG_CACHE_HOME/deepspeed_recipes (~/.cache/deepspeed_recipes)."""


@dataclass
class BatchConfig:
    """The batch triangle: any two give the third. All in sequences, positive."""

    global_size: int | None = None
    """Sequences per optimizer step over all ranks."""
    micro_size: int | None = None
    """Sequences per forward pass of one data rank."""
    accumulation: int | None = None
    """Forward/backward passes per optimizer step."""


@dataclass
class TrainConfig:
    """How long, and with which accelerations."""

    steps: int | None = None
    """Optimizer steps; exactly one of `steps` and `epochs` is set."""
    epochs: float | None = None
    """Passes over the training sequences."""
    activation_checkpointing: int = 0
    """Recompute activations of every n-th layer in backward: 0 none, 1 all layers, 2 every second, … Not the linear
    model and convolutional networks: they have no layers that transformers knows as such."""
    fused_loss: bool = True
    """Head and cross-entropy in chunks over supervised positions only; never holds all logits."""
    compile: bool = False
    """torch.compile each layer (models as above)."""
    threads: int | None = None
    """CPU threads per rank; null: cores of this machine / ranks on it."""


@dataclass
class OptimizerConfig:
    """An optimizer of the engine. A null field is one this optimizer does not take."""

    name: str = "adamw"
    """adamw | adam | adagrad | lion | lamb | muon | sgd, and other classes of torch.optim (conf/rules_optimizer.py)."""
    lr: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled where the optimizer decouples it; not applied to biases and norms."""
    betas: list[float] | None = None
    """Decay of the running mean and of the running square of the gradient, each in [0, 1)."""
    eps: float | None = None
    """Added to the denominator of the update."""
    momentum: float | None = None
    """Decay of the running gradient (sgd, muon, rmsprop), in [0, 1)."""
    fused: bool | None = None
    """Fused kernel of torch (adamw, adam, sgd; not with an offloaded step); null: on for adamw and adam."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 switches clipping off (the norm is still measured)."""


@dataclass
class SchedulerConfig:
    """Learning rate over optimizer steps."""

    name: str = "cosine"
    """constant | linear | cosine | wsd."""
    warmup_steps: int = 0
    """Linear warm-up, optimizer steps."""
    decay_steps: int | None = None
    """Length of the final decay (wsd only), optimizer steps; null: 20% of training."""
    min_ratio: float = 0.0
    """Last learning rate as a share of the peak (linear, cosine, wsd)."""


@dataclass
class PrecisionConfig:
    """Arithmetic of parameters and activations."""

    name: str = "fp32"
    """fp32 | bf16 | fp16 | bf16_autocast."""
    accumulation_dtype: str = "fp32"
    """Gradients are accumulated in fp32 or in the `model` dtype: fp32 | bf16 | fp16."""
    loss_scale: float = 0.0
    """fp16: static loss scale; 0 = dynamic."""
    initial_scale_power: int = 16
    """fp16, dynamic: first scale is 2**this."""
    loss_scale_window: int = 1000
    """fp16, dynamic: steps without overflow before the scale doubles."""


@dataclass
class ZeroConfig:
    """What the engine shards over the data ranks: 0 nothing, 1 optimizer state, 2 + gradients, 3 + parameters."""

    stage: int = 1
    """0 | 1 | 2 | 3, see above."""
    offload_optimizer: str = "none"
    """none | cpu | nvme (nvme: stage 3 and `nvme_path`)."""
    offload_param: str = "none"
    """none | cpu | nvme (stage 3)."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk for offloaded tensors."""
    overlap_comm: bool = False
    """Reduce gradients while backward goes on (CUDA); takes a second bucket."""
    reduce_bucket_size: int = 50_000_000
    """Elements reduced at once; the engine allocates the bucket whole, however small the model."""
    allgather_bucket_size: int = 500_000_000
    """Elements gathered at once (stages 1, 2)."""
    prefetch_bucket_size: int = 50_000_000
    """Elements fetched ahead (stage 3)."""
    param_persistence_threshold: int = 100_000
    """Parameters smaller than this many elements stay whole on every rank (stage 3)."""
    hpz_partition_size: int = 1
    """ZeRO++ secondary shards within this many ranks (stage 3, CUDA)."""
    quantized_weights: bool = False
    """ZeRO++ qwZ (stage 3, CUDA)."""
    quantized_gradients: bool = False
    """ZeRO++ qgZ (stage 3, CUDA)."""


@dataclass
class ParallelConfig:
    """Degrees of parallelism; the data degree is what is left of the world."""

    tensor: int = 1
    """Ranks that share each matrix."""
    pipeline: int = 1
    """Stages that the layers are cut into."""
    sequence: int = 1
    """Ranks that share each sequence."""
    expert: int = 1
    """Ranks that share the experts of a mixture. Not in this version: 1; `tensor` cuts each expert's matrices."""
    pipeline_split: list[int] | None = None
    """Layers of each pipeline stage; null: stages of equal cost, embedding and head included."""
    schedule: str = "1f1b"
    """1f1b | dualpipev: the order of a pipeline's passes. In 1F1B a rank has one stage; in DualPipeV it has two, on the
    way out and on the way back (2 × `pipeline` stages), waits less, and needs 2 × `pipeline` micro-batches or more."""


@dataclass
class CheckpointConfig:
    """Checkpoints during training: whole ones or none, in run_dir/checkpoints."""

    every: int = 0
    """Save each n optimizer steps and after the last; 0: only when a signal asks for it (SIGTERM, SIGHUP, Ctrl-C,
    SIGUSR1)."""
    minutes: float | None = None
    """Save when this many minutes have passed since the last one, and after the last step; null: not by the clock."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: int = 0
    """How many of the best ones by `eval.metric` stay besides; a checkpoint counts with the evaluation of its step."""
    grace_s: float = 25.0
    """After SIGTERM, SIGHUP or Ctrl-C: seconds for the step and its checkpoint; then the last whole checkpoint stands.
    The launchers `deepspeed` and `torchrun` kill ranks 30 s after they passed on such a signal."""


@dataclass
class FaultsConfig:
    """What a run does when something goes wrong in it."""

    on_bad_step: str = "stop"
    """stop | skip (no update, the next batch) | rewind (to the last checkpoint, and on without these samples)."""
    spike: float | None = None
    """A loss or gradient norm this many times its median over 20 good steps is bad too; null: only inf and nan."""
    bad_steps: int = 10
    """So many bad steps in a row are passed over (rewind: in the whole run), then the run stops."""
    stall_s: float = 1800.0
    """A run in which nothing happens for this long ends, and says which rank does not go on, and where; 0: never."""


@dataclass
class EvalConfig:
    """Evaluation over the whole held-out split, each row once."""

    every: int = 0
    """Evaluate each n optimizer steps; 0: only before the first and after the last."""
    micro_size: int | None = None
    """Sequences per forward pass of one data rank; null: `batch.micro_size`."""
    metric: str | None = None
    """Metric of the task that decides which model is kept: that of the best evaluation; null: the last one."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a better `metric`; null: train to the end."""
    beams: int = 1
    """Beams of the search (translation); 1: greedy."""
    bleu_tokens: str = "13a"
    """What BLEU counts, as sacrebleu names it: 13a (words) | intl (words, more signs apart) | zh (Chinese) | char
    (characters: Japanese, Thai) | none."""
    prompt: str | None = None
    """Completed by the exported model at the end; null: no completion."""
    new_tokens: int = 48
    """Length of that completion, or the most tokens of a translation."""


@dataclass
class TrackConfig:
    """Where metrics go besides the run directory."""

    to: list[str] = field(default_factory=list)
    """tensorboard | wandb | mlflow | csv; metrics.jsonl is always written."""
    project: str = "deepspeed-recipes"
    """Project (W&B) or experiment (MLflow)."""


@dataclass
class Config:
    """One run."""

    name: str = "run"
    """Name of the run, of its folder below `runs` unless `run_dir` says otherwise."""
    task: str = "causal_lm"
    """Module of `recipes/` that trains it."""
    run_dir: str = "runs/${name}"
    """Everything the run writes; relative to the working directory."""
    overwrite: bool = False
    """Replace a run that `run_dir` already holds."""
    seed: int = 0
    """Of the new model's weights and of the order of the samples."""
    device: str = "auto"
    """auto | cpu | cuda: what this run trains on (auto: CUDA where there is a GPU)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    resume: str | None = None
    """Continue from a checkpoint: its folder, a run directory, or `auto` (the newest one of run_dir); null: do not."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw engine keys, merged last, checked against the engine's own schema."""
