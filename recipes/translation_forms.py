"""The two kinds of model that translate, an encoder-decoder and a decoder: what a row is to each, and a batch."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem, RequestError
from recipes.supervised import IGNORE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from recipes.translation import Translation


class Form(ABC):
    """How a kind of model reads a source and writes a target."""

    def __init__(self, task: Translation):
        self.task = task

    @abstractmethod
    def hf_class(self) -> Any:
        """The Auto class of the model."""

    @abstractmethod
    def check(self) -> list[Problem]:
        """Lengths that this model cannot have."""

    @abstractmethod
    def row_length(self) -> int:
        """Tokens of a row at most."""

    @abstractmethod
    def lengths(self, sources: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
        """(N,) for each array of a row that is padded by itself."""

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
        config, wanted = self.task.model_config(), self.task.cfg.eval.new_tokens
        names = ("max_decoder_position_embeddings", "max_position_embeddings")
        has = next((known for name in names if (known := getattr(config, name, None))), None)
        if has and wanted > has:
            rule = f"the decoder has {has} positions"
            return [Problem("eval.new_tokens", str(wanted), rule, f"eval.new_tokens={has}")]
        return []

    def row_length(self) -> int:
        return self.task.cfg.data.seq_length

    def lengths(self, sources: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
        return [sources, targets]

    def adopt(self, model: PreTrainedModel) -> None:
        pass

    def target_ids(self, texts: list[str]) -> list[list[int]]:
        return self.task.tokenizer(text_target=texts, verbose=False)["input_ids"]

    @functools.cached_property
    def _start(self) -> int:
        return int(self.task.model_config().decoder_start_token_id)

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        width = self.task.padded(max((len(row["labels"]) for row in rows), default=1))
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
        positions = getattr(self.task.model_config().get_text_config(), "max_position_embeddings", None)
        if positions and self.row_length() > positions:
            rule = f"source and target follow each other in the model's {positions} positions"
            return [Problem("data.seq_length", str(cfg.data.seq_length), rule, f"data.seq_length={positions // 2}")]
        return []

    def row_length(self) -> int:
        cfg = self.task.cfg
        return cfg.data.seq_length + max(cfg.data.seq_length, cfg.eval.new_tokens)

    def lengths(self, sources: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
        return [sources + targets]

    def adopt(self, model: PreTrainedModel) -> None:
        from recipes.models.attention import check_causal, check_padding

        device = next(model.parameters()).device
        if problems := check_causal(model, device) or check_padding(model, device):
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
