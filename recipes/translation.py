"""From one language to another, with an encoder-decoder or a decoder; judged by what it really generates."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem, RequestError
from recipes.base import Prediction, Progress
from recipes.data.examples import Example
from recipes.data.packing import round_up
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import Source
from recipes.supervised import IGNORE, RECORDS
from recipes.text import TextTask

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


class Translation(TextTask):
    """The loss is over the tokens of the target; source and target each end with the end-of-text token."""

    KINDS = {  # noqa: RUF012 - never changed
        "stdlib": "recipes.data.docstrings:DocstringsSource",
        "lines": "recipes.data.lines:LinesSource",
        **RECORDS,
    }
    KEYS = ("source", "target", "target_path", "eval_target_path")
    UNUSED = ("data.packing", "eval.prompt")
    ARRAYS = {"input_ids": "int32", "labels": "int32", "reference": "uint8"}  # noqa: RUF012
    LENGTHS = ("input_ids", "labels")
    METRICS = {"loss": "min", "bleu": "max", "chrf": "max"}  # noqa: RUF012

    @functools.cached_property
    def form(self) -> Form:
        """How the model at hand reads a source and writes a target."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as TWO_SIDED

        from recipes.models.pretrained import pretrained_config

        model = self.cfg.model
        kind = pretrained_config(model).model_type if model.path else model.type
        return EncoderDecoder(self) if kind in TWO_SIDED else Decoder(self)

    # Data

    def columns(self) -> dict[str, str]:
        data = self.cfg.data
        return {"source": data.source or "source", "target": data.target or "target"}

    def texts(self, content: dict[str, Any]) -> Iterator[str]:
        yield content["source"]
        yield content["target"]

    def ready(self, root: Path, source: Source, fingerprint: str, progress: Progress) -> list[str]:
        return [*super().ready(root, source, fingerprint, progress), type(self.form).__name__]

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        sides = []
        for side, ids_of in (("source", self._source_ids), ("target", self.form.target_ids)):
            ids = [self._ended(one) for one in ids_of([row.content[side] for row in rows])]
            self.overlong([len(one) for one in ids], [row.where for row in rows], problems, meter)
            sides.append([self._cut(one) for one in ids])
        return [
            [
                {
                    "input_ids": np.array(source, np.int32), "labels": np.array(target, np.int32),
                    "reference": np.frombuffer(row.content["target"].encode(), np.uint8),
                }
            ]
            for row, source, target in zip(rows, *sides, strict=True)
        ]  # fmt: skip

    def _source_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, verbose=False)["input_ids"]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _cut(self, ids: list[int]) -> list[int]:
        """At most `data.seq_length` tokens, the last one among them."""
        limit = self.cfg.data.seq_length
        return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]

    # Model

    def hf_class(self) -> Any:
        return self.form.hf_class()

    def new_head(self) -> bool:
        return False

    def check_model(self) -> list[Problem]:
        return self.form.check() or super().check_model()

    def row_length(self) -> int:
        return self.form.row_length()

    def set_heads(self, config: PretrainedConfig) -> None:
        if self._folder:
            return  # a pretrained model knows its tokens
        super().set_heads(config)
        config.eos_token_id = config.bos_token_id = self.tokenizer.eos_token_id
        if config.is_encoder_decoder:
            config.decoder_start_token_id = self.tokenizer.eos_token_id
            config.forced_eos_token_id = None

    def adopt(self, model: PreTrainedModel) -> None:
        from recipes.models.loss import TokenLoss

        self.form.adopt(model)
        self._loss = TokenLoss(model, self.cfg.train.fused_loss)

    # Batches, loss and predictions

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        return self.form.collate(rows, size)

    def collate_ids(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        """The `input_ids` of rows as a micro-batch, with mask and numbers of the rows, as those of any text."""
        return super().collate(rows, size)

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        targets = int((batch["labels"] != IGNORE).sum())
        return targets, self.real_tokens(batch) + self.form.tokens_beside(targets)

    def places(self, batch: Mapping[str, np.ndarray]) -> int:
        return batch["input_ids"].size + self.form.tokens_beside(batch["labels"].size)

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        return {**{name: batch[name] for name in names if name in batch}, "use_cache": False}

    def loss(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._loss(model, self.inputs(batch), batch["labels"])

    def summed_loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError("the head is part of the loss")

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        raise NotImplementedError("texts are generated, not read from logits")

    def evaluate(self, model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        prompt = self.form.prompt(batch)
        made = getattr(model, "module", model).generate(
            **prompt, do_sample=False, use_cache=True, pad_token_id=self.pads,
            max_new_tokens=self.cfg.eval.new_tokens, num_beams=self.cfg.eval.beams,
            # Under ZeRO-3 every forward pass gathers parameters from all ranks: a rank that is done goes on with them.
            synced_gpus=self.cfg.zero.stage == 3,
        )  # fmt: skip
        return self.loss(model, batch), {"tokens": self.form.written(made, prompt).cpu().numpy()}

    def predictions(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> list[Prediction]:
        rows = np.flatnonzero(batch["id"] >= 0)
        if not len(rows):
            return []
        texts = self.tokenizer.batch_decode(outputs["tokens"][rows], skip_special_tokens=True)
        return [
            {
                "id": int(batch["id"][number]),
                "prediction": text.strip(),
                "label": self.held_out.row(int(batch["id"][number]))["reference"].tobytes().decode(),
            }
            for number, text in zip(rows, texts, strict=True)
        ]

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        from recipes.scores import translation_scores

        return translation_scores([row["prediction"] for row in predictions], [row["label"] for row in predictions])


class Form(ABC):
    """How a kind of model reads a source and writes a target."""

    def __init__(self, task: Translation):
        self.task = task

    @abstractmethod
    def hf_class(self) -> Any:
        """The Auto class of the model."""

    @abstractmethod
    def check(self) -> list[Problem]:
        """Layouts and lengths that this kind of model cannot have."""

    @abstractmethod
    def row_length(self) -> int:
        """Tokens of a row at most."""

    @abstractmethod
    def adopt(self, model: PreTrainedModel) -> None:
        """Look at the built model once; raises RequestError."""

    @abstractmethod
    def target_ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of targets."""

    @abstractmethod
    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        """A micro-batch with `labels`."""

    @abstractmethod
    def tokens_beside(self, targets: int) -> int:
        """Tokens of targets that are not among `input_ids`."""

    @abstractmethod
    def prompt(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What generation begins with."""

    @abstractmethod
    def written(self, made: torch.Tensor, prompt: Mapping[str, Any]) -> torch.Tensor:
        """The tokens that are the model's own, of those that generation returned."""


class EncoderDecoder(Form):
    """The encoder reads the source; the decoder begins with a token of its own."""

    def hf_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def check(self) -> list[Problem]:
        stages = self.task.cfg.parallel.pipeline
        if stages == 1:
            return []
        rule = "an encoder-decoder has no pipeline: every layer of its decoder looks at the last one of its encoder"
        return [Problem("parallel.pipeline", str(stages), rule, "parallel.pipeline=1 (data)")]

    def row_length(self) -> int:
        return self.task.cfg.data.seq_length

    def adopt(self, model: PreTrainedModel) -> None:
        pass

    def target_ids(self, texts: list[str]) -> list[list[int]]:
        return self.task.tokenizer(text_target=texts, verbose=False)["input_ids"]

    @functools.cached_property
    def _start(self) -> int:
        return int(self.task.model_config().decoder_start_token_id)

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        width = round_up(max((len(row["labels"]) for row in rows), default=1))
        labels = np.full((size, width), IGNORE, np.int64)
        given = np.full((size, width), self.task.pads, np.int64)
        given[:, 0] = self._start
        for number, row in enumerate(rows):
            target = row["labels"]
            labels[number, : len(target)] = target
            given[number, 1 : len(target)] = target[:-1]
        return {**self.task.collate_ids(rows, size), "labels": labels, "decoder_input_ids": given}

    def tokens_beside(self, targets: int) -> int:
        return targets

    def prompt(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def written(self, made: torch.Tensor, prompt: Mapping[str, Any]) -> torch.Tensor:
        return made


class Decoder(Form):
    """The source is a prompt, its end-of-text token the sign to begin; the loss is over the target alone."""

    def hf_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def check(self) -> list[Problem]:
        cfg = self.task.cfg
        if cfg.parallel.pipeline > 1:
            rule = "texts are generated by whole models: each token goes through all stages before the next one"
            nearest = "parallel.pipeline=1, or task=causal_lm with data.prompt and data.completion"
            return [Problem("parallel.pipeline", str(cfg.parallel.pipeline), rule, nearest)]
        positions = getattr(self.task.model_config().get_text_config(), "max_position_embeddings", None)
        if positions and self.row_length() > positions:
            rule = f"source and target follow each other in the model's {positions} positions"
            return [Problem("data.seq_length", str(cfg.data.seq_length), rule, f"data.seq_length={positions // 2}")]
        return []

    def row_length(self) -> int:
        cfg = self.task.cfg
        return cfg.data.seq_length + max(cfg.data.seq_length, cfg.eval.new_tokens)

    def adopt(self, model: PreTrainedModel) -> None:
        from recipes.models.attention import check_causal

        if problems := check_causal(model, next(model.parameters()).device):
            raise RequestError(problems)

    def target_ids(self, texts: list[str]) -> list[list[int]]:
        return self.task.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        given = [
            {**row, "input_ids": np.concatenate([row["input_ids"], row["labels"][:-1]])} for row in rows
        ]  # each position's label is the token after it: the last one of a target is no input
        batch = self.task.collate_ids(given, size)
        labels = np.full(batch["input_ids"].shape, IGNORE, np.int64)
        sources = np.ones(size, np.int64)
        for number, row in enumerate(rows):
            sources[number] = len(row["input_ids"])
            labels[number, sources[number] - 1 :][: len(row["labels"])] = row["labels"]
        return {**batch, "labels": labels, "source_length": sources}

    def tokens_beside(self, targets: int) -> int:
        return 0

    def prompt(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The sources, flush right: what follows a source's last token is the target."""
        import torch

        lengths = batch["source_length"][:, None]
        width = int(lengths.max())
        places = torch.arange(width, device=lengths.device) - (width - lengths)
        mask = places >= 0
        ids = batch["input_ids"].gather(1, places.clamp(min=0))
        return {
            "input_ids": ids.masked_fill(~mask, self.task.pads), "attention_mask": mask.long(),
            "eos_token_id": self.task.tokenizer.eos_token_id,
        }  # fmt: skip

    def written(self, made: torch.Tensor, prompt: Mapping[str, Any]) -> torch.Tensor:
        return made[:, prompt["input_ids"].shape[1] :]


recipe = Translation
