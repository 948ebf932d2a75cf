"""Causal language models: pretraining from scratch and fine-tuning, on plain text, completions or chats."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from conf.batch import sizes
from conf.errors import Problem, RequestError
from recipes.base import PICKED, Prediction, Progress, Recipe
from recipes.data.packing import collate, empty_row
from recipes.data.tokenizer import id_count
from recipes.preview import Preview, counted, pieces

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

NATS_PER_BIT = math.log(2)


class CausalLM(Recipe):
    """Predict the next token; the loss is over the supervised tokens only."""

    METRICS: ClassVar[Mapping[str, str]] = {"loss": "min", "perplexity": "min", "bits_per_byte": "min"}
    PICKS = True

    def check(self) -> list[Problem]:
        from recipes.data.sources import check
        from recipes.supervised import OF_ALL, OF_LANGUAGE_MODELS, foreign_keys

        return [*foreign_keys(self.cfg, OF_LANGUAGE_MODELS, OF_ALL), *check(self.cfg.data)]

    def prepare(self, progress: Progress | None = None) -> None:
        from recipes.data.cache import prepare
        from recipes.data.order import check_size
        from recipes.data.readable import check_readable
        from recipes.data.sources import open_sources
        from recipes.data.tokenizer import DEFAULT_VOCABULARY, load_tokenizer
        from recipes.models.pretrained import local_folder

        model, data = self.cfg.model, self.cfg.data
        sources = open_sources(data) if not self.finished else []
        try:
            both = [problem for source in sources if (problem := source.in_both_splits(sources))]
        except OSError as error:
            raise RequestError(
                Problem(str(error.filename or "data"), "", f"cannot be read ({error.strerror})")
            ) from error
        if both:
            raise RequestError(both)
        self._folder = local_folder(model, progress) if model.path else None
        tokenizer = None
        if model.tokenizer:
            tokenizer = load_tokenizer(model.tokenizer, revision=model.tokenizer_revision)
        elif self._folder:
            tokenizer = load_tokenizer(str(self._folder), key="model.path")
        prepared = prepare(
            data,
            tokenizer,
            seed=self.cfg.seed,
            vocab_size=data.vocab_size or model.config.get("vocab_size", DEFAULT_VOCABULARY),
            progress=progress,
        )
        self.tokenizer, self.train, self.held_out = prepared.tokenizer, prepared.dataset(), prepared.held_out
        self.report = prepared.report
        unread = (
            [] if self.finished else check_readable(self.report["unreadable"], data.max_unreadable, bool(model.path))
        )
        if problems := unread + self._check_model() + check_size(len(self.train), sizes(self.cfg.batch)[0]):
            raise RequestError(problems)

    def _check_model(self) -> list[Problem]:
        """What only the model's own configuration can tell: whether it can be built, its vocabulary, its positions."""
        from recipes.models.configuration import check_buildable, check_text

        config = self.model_config()
        problems = check_buildable(self.hf_class(), config, self.cfg, weights=self._folder, notes=self.notes)
        return problems + check_text(config, self.tokenizer, self.cfg.data.seq_length, self.cfg.model.path)

    def said(self) -> str | None:
        from recipes.data import changes, readable

        said = changes.lines(self.report["changes"]) + readable.lines(self.report["unreadable"])
        return "\n".join([*self.notes, *said]) or None

    def model_config(self) -> PretrainedConfig:
        from recipes.models.configuration import scratch_config, set_dropout
        from recipes.models.pretrained import pretrained_config

        if self._folder:
            return pretrained_config(self.cfg.model, self._folder)
        special = {f"{kind}_token_id": getattr(self.tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        assert self.cfg.model.type is not None  # a rule: one of type and path is given
        config = {"vocab_size": id_count(self.tokenizer), **self.cfg.model.config, **special}
        return set_dropout(scratch_config(self.cfg.model.type, config), self.cfg.model.dropout)

    def hf_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def weights(self) -> Path | None:
        return self._folder

    def adopt(self, model: PreTrainedModel) -> None:
        from recipes.models.attention import check_causal, keeps_documents_apart
        from recipes.models.loss import TokenLoss

        device = next(model.parameters()).device
        if problems := check_causal(model, device):
            raise RequestError(problems)
        self._loss = TokenLoss(model, self.cfg.train.fused_loss)
        if self.cfg.data.packing == "documents" and not keeps_documents_apart(model, device):
            raise RequestError(
                Problem(
                    "data.packing",
                    "documents",
                    f"{type(model).__name__} lets packed documents see each other (it does not mask by position_ids)",
                    "data.packing=none (one row per sequence) or data.packing=blocks (attention across documents)",
                )
            )

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        length = len(rows[0]["input_ids"]) if rows else self.cfg.data.seq_length
        filled = [*rows, *(empty_row(length) for _ in range(size - len(rows)))]
        batch = collate(filled, self.tokenizer.pad_token_id or 0)
        positions = batch.pop("position_ids")
        # No attention_mask: transformers keeps documents apart by where position_ids restart. Where none does, the
        # default positions are the same, and attention is plainly causal, without a mask.
        if self.cfg.data.packing == "documents" and (positions != np.arange(positions.shape[1])).any():
            batch["position_ids"] = positions
        return batch

    def widen(self, batch: dict[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
        size, present = batch["input_ids"].shape
        padding = empty_row(width - present, self.tokenizer.pad_token_id or 0)
        return {
            name: np.concatenate([values, np.broadcast_to(padding[name], (size, width - present))], axis=1)
            for name, values in batch.items()
        }

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        from recipes.models.loss import IGNORE

        return int((batch["labels"] != IGNORE).sum()), int(batch["attended"].sum())

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        names = ("input_ids", "position_ids", "attention_mask")
        given = {**{name: batch[name] for name in names if name in batch}, "use_cache": False}
        # The routers are listened to, whole or in parts: what the family's own forward would make of them goes unused.
        return {**given, "output_router_logits": False} if self.balances_routers() else given

    @functools.cached_property
    def _balances_routers(self) -> bool:
        from recipes.models.router_loss import asked_for

        # A finished model may be of a family whose routers are not known to come out right.
        return not self.finished and asked_for(self.model_config().get_text_config())

    def balances_routers(self) -> bool:
        return self._balances_routers

    def rows(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        from recipes.models.loss import IGNORE

        return batch["attended"], (batch["labels"] != IGNORE).sum(dim=1)

    def loss(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._loss(model, self.inputs(batch), batch["labels"], batch.get(PICKED))

    def metrics(self, loss: float, supervised: int, predictions: Sequence[Prediction] = ()) -> dict[str, float]:
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if size := self._held_out_bytes:
            found["bits_per_byte"] = loss * supervised / NATS_PER_BIT / size
        return found

    @functools.cached_property
    def _held_out_bytes(self) -> int:
        """Bytes of text of the supervised held-out tokens, which compare models of any vocabulary; 0 if unknown."""
        from recipes.data.tokenizer import token_bytes

        sizes = token_bytes(self.tokenizer)
        if sizes is None:
            return 0
        labels = (self.held_out.row(number)["labels"] for number in range(len(self.held_out)))
        return sum(int(sizes[row[(row >= 0) & (row < len(sizes))]].sum()) for row in labels)

    def previews(self, count: int) -> list[Preview]:
        from recipes.models.loss import IGNORE

        found: list[Preview] = []
        for index in range(len(self.train)):
            row = self.train.row(index)
            ids, positions = row["input_ids"][row["attended"]], row["position_ids"][row["attended"]]
            # Labels are those of the next token; the first token of a document is none.
            learned = np.concatenate([[False], row["labels"][row["attended"]][:-1] != IGNORE])
            starts = np.flatnonzero(positions == 0) if self.cfg.data.packing == "documents" else np.array([0])
            for start, stop in itertools.pairwise([*starts, len(ids)]):
                if len(found) == count:
                    return found
                marks = ["" if one else None for one in learned[start:stop]]
                title = counted(len(found), ids[start:stop], marks)
                found.append(Preview(title, pieces(self.tokenizer, ids[start:stop], marks)))
        return found

    def save_processor(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def sample(self, folder: Path) -> str | None:
        if self.cfg.eval.prompt is None:
            return None
        import torch

        from recipes import hub
        from recipes.models.writing import SAMPLING

        tokenizer = hub.tokenizer(folder)
        model = hub.model(self.hf_class(), folder).eval()
        inputs = tokenizer(self.cfg.eval.prompt, return_tensors="pt", return_token_type_ids=False)
        torch.manual_seed(self.cfg.seed)
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=self.cfg.eval.new_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                tokenizer=tokenizer,  # for a model's `stop_strings`
                **SAMPLING,
            )
        return str(tokenizer.decode(out[0], skip_special_tokens=True))


recipe = CausalLM
