"""What recipes of labelled texts share: the tokenizer, ids of texts, batches as wide as their longest row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from conf.errors import Problem, RequestError
from recipes.base import Progress
from recipes.data.changes import CUT
from recipes.data.examples import Example
from recipes.data.packing import MULTIPLE, round_up
from recipes.data.readable import Reading
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import Source
from recipes.data.tokenizer import id_count, without_begin
from recipes.preview import Preview, counted, pieces
from recipes.supervised import Supervised

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


SEGMENTS = "token_type_ids"


class TextTask(Supervised):
    """Examples with `input_ids`; a micro-batch is padded to the longest of its rows, rounded up to a multiple of 8."""

    PADDED: ClassVar[Mapping[str, int]] = {}
    """Arrays of one value per token besides the inputs, and what they are padded with."""
    ARRAYS = {"input_ids": "int32", "token_type_ids": "int8"}  # noqa: RUF012 - never changed
    LENGTHS: ClassVar[tuple[str, ...]] = ("input_ids",)
    ENDS: ClassVar[bool] = True
    """Whether a text needs a token at its ends that is none of its own."""
    TWO_SIDED: ClassVar[bool] = False
    """Whether encoder-decoders have this task."""
    tokenizer: PreTrainedTokenizerBase

    @abstractmethod
    def texts(self, content: dict[str, Any]) -> Iterator[str]:
        """The texts of a row, for training a tokenizer on them."""

    def ready(self, root: Path, source: Source, fingerprint: str, progress: Progress) -> list[str]:
        from recipes.data.cache import trained_tokenizer
        from recipes.data.tokenizer import DEFAULT_VOCABULARY, add_ends, load_tokenizer, tokenizer_digest

        model, data = self.cfg.model, self.cfg.data
        if model.tokenizer:
            self.tokenizer = load_tokenizer(model.tokenizer, revision=model.tokenizer_revision)
        elif self._folder:
            self.tokenizer = load_tokenizer(str(self._folder), key="model.path")
        else:

            def texts() -> Iterator[str]:
                problems, meter = Problems(), Meter(source.size())
                for row in source.read(problems, meter):
                    if not row.held_out:
                        yield from self.texts(row.content)
                meter.done = meter.total
                progress(*source.read_so_far(meter, "training the tokenizer on"))
                problems.raise_any()

            size = data.vocab_size or model.config.get("vocab_size", DEFAULT_VOCABULARY)
            self.tokenizer = trained_tokenizer(root, [fingerprint], texts, size)
        self._add_segments()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.ENDS and not self.finished:  # a finished model has been trained with what its tokenizer gives
            add_ends(self.tokenizer)
        return [tokenizer_digest(self.tokenizer)]

    def reading(self) -> Reading:
        return Reading(self.tokenizer, own=not (self.cfg.model.tokenizer or self._folder))

    def measure(self, reading: Reading, row: Row, examples: list[Example]) -> None:
        texts = list(self.texts(row.content))
        reading.texts(row.where, texts)
        for example in examples:
            reading.ids(row.where, example["input_ids"], texts)

    def _add_segments(self) -> None:
        """Have the tokenizer say which of two texts a token is of, where the model has been trained with that.

        transformers 5.23: tokenizers of some families (ALBERT, RemBERT, BigBird) know it, and do not say it unasked.
        """
        from recipes.models.pretrained import pretrained_config

        asked = self.tokenizer.model_input_names
        if SEGMENTS in asked or not self._folder:
            return
        segments = getattr(pretrained_config(self.cfg.model, self._folder), "type_vocab_size", 0)
        if segments > 1 and any(self.tokenizer("a", "b", return_token_type_ids=True)[SEGMENTS]):
            self.tokenizer.model_input_names = [*asked, SEGMENTS]
            self.tokenizer.init_kwargs["model_input_names"] = self.tokenizer.model_input_names  # is saved with it

    @property
    def pads(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def ids(self, texts: Sequence[str], pairs: Sequence[str] | None = None, whole: bool = False) -> Any:
        """What the tokenizer makes of texts (and second texts), with its special tokens, cut to `data.seq_length`.

        whole: not cut.

        """
        options: Any = {"truncation": True, "max_length": self.cfg.data.seq_length} if not whole else {"verbose": False}
        first = without_begin(self.tokenizer, texts)
        given = (first, list(pairs)) if pairs is not None else (first,)
        return self.tokenizer(*given, **options)

    def encoded(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[Example]:
        """`input_ids` and `token_type_ids` of the text of each row, and of its `pair` where rows have one."""
        texts = [row.content["text"] for row in rows]
        pairs = [row.content["pair"] for row in rows] if "pair" in rows[0].content else None
        found = self.ids(texts, pairs)
        limit = self.cfg.data.seq_length
        if full := [number for number, ids in enumerate(found["input_ids"]) if len(ids) >= limit]:
            whole = self.ids([texts[n] for n in full], [pairs[n] for n in full] if pairs else None, whole=True)
            lengths = [len(ids) for ids in whole["input_ids"]]
            self.overlong(lengths, [rows[n].where for n in full], problems, meter)
        kinds = found.get("token_type_ids") or [[0] * len(ids) for ids in found["input_ids"]]
        return [
            {"input_ids": np.array(ids, np.int32), "token_type_ids": np.array(kind, np.int8)}
            for ids, kind in zip(found["input_ids"], kinds, strict=True)
        ]

    def overlong(
        self, lengths: Sequence[int], wheres: Sequence[str], problems: Problems, meter: Meter, what: str = "rows"
    ) -> None:
        """Rows (or what of them) longer than `data.seq_length`: counted, or refused as configured."""
        limit = self.cfg.data.seq_length
        for length, where in zip(lengths, wheres, strict=True):
            if length <= limit:
                continue
            if self.cfg.data.overlong == "refuse":
                rule = f"longer than data.seq_length={limit}"
                nearest = f"data.overlong=truncate, or data.seq_length={-(-length // 8) * 8}"
                problems.add(Problem(where, f"{length} tokens", rule, nearest))
            else:
                meter.note(CUT, f"{what} truncated to data.seq_length", where, length)

    def scratch_defaults(self) -> dict[str, Any]:
        return {"vocab_size": id_count(self.tokenizer)}

    def set_heads(self, config: PretrainedConfig) -> None:
        super().set_heads(config)
        config.get_text_config().pad_token_id = config.pad_token_id = self.pads

    def check_model(self) -> list[Problem]:
        from recipes.models.configuration import check_text

        problems = super().check_model()
        config = self.model_config()
        if config.is_encoder_decoder and not self.TWO_SIDED:
            rule = f"{config.model_type} is an encoder-decoder; {self.cfg.task} takes encoders and decoders"
            where = "model.path" if self.cfg.model.path else "model.type"
            shown = str(self.cfg.model.path or self.cfg.model.type)
            return [Problem(where, shown, rule, "model=bert_4m, or task=translation")]
        return problems or check_text(self.model_config(), self.tokenizer, self.row_length(), self.cfg.model.path)

    def row_length(self) -> int:
        """Tokens of a row at most."""
        return self.cfg.data.seq_length

    def row_shape(self, config: PretrainedConfig) -> tuple[int, ...]:
        return (self.row_length(),)

    def width(self, batch: Mapping[str, np.ndarray]) -> int:
        return batch["input_ids"].shape[-1]

    def widen(self, batch: dict[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
        filled = {"input_ids": self.pads, "attention_mask": 0, "token_type_ids": 0, **self.PADDED}
        wider = dict(batch)
        for name, value in filled.items():
            if name in batch:
                rows = batch[name]
                more = [(0, 0)] * (rows.ndim - 1) + [(0, width - rows.shape[-1])]
                wider[name] = np.pad(rows, more, constant_values=value)
        return wider

    def padded(self, longest: int) -> int:
        """Tokens of the rows of a micro-batch; no more than the model may have positions for."""
        return min(round_up(longest), max(longest, self.row_length()))

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        width = self.padded(max((len(row["input_ids"]) for row in rows), default=1))
        batch: dict[str, np.ndarray] = {}
        names = ["input_ids", *self.PADDED]
        if SEGMENTS in self.tokenizer.model_input_names:
            names.append(SEGMENTS)
        for name in names:
            values = np.full((size, width), {"input_ids": self.pads, **self.PADDED}.get(name, 0), np.int64)
            for number, row in enumerate(rows):
                values[number, : len(row[name])] = row[name]
            batch[name] = values
        lengths = np.array([len(row["input_ids"]) for row in rows] + [1] * (size - len(rows)))
        # A row that fills the batch up sees its first token: a softmax over nothing is not a number.
        batch["attention_mask"] = (np.arange(width) < lengths[:, None]).astype(np.int64)
        batch["id"] = np.array([int(row["id"]) for row in rows] + [-1] * (size - len(rows)))
        return batch | self.collate_labels(rows, size)

    def collate_labels(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        """The labels of a micro-batch that are not one per token."""
        return {}

    def adopt(self, model: PreTrainedModel) -> None:
        """Raises RequestError where what the model says of the shortest held-out row depends on padding."""
        import torch

        from recipes.models.attention import check_right_padding

        shortest = int(self.lengths(self.held_out)[0].argmin())
        narrow = self.collate([self.held_out.row(shortest)], 1)
        width = self.width(narrow) + MULTIPLE
        if width > self.row_length() or self.cfg.parallel.pipeline > 1:  # all rows are as long; a stage has no outputs
            return
        device, outputs = next(model.parameters()).device, []
        for batch in (narrow, self.widen(narrow, width)):
            with torch.no_grad():
                found = self.call(model, {name: torch.as_tensor(each, device=device) for name, each in batch.items()})
            outputs.append(found[0].float())
        if problems := check_right_padding(model, *outputs):
            raise RequestError(problems)

    def real_tokens(self, batch: Mapping[str, np.ndarray]) -> int:
        """Tokens that are not padding, of rows that are rows."""
        return int(batch["attention_mask"][batch["id"] >= 0].sum())

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: batch[name] for name in names if name in batch}

    def previews(self, count: int) -> list[Preview]:
        found = []
        for number in range(min(count, len(self.train))):
            row = self.train.row(number)
            ids, marks = self.marked(row)
            title = counted(number, ids, marks)
            if all(mark is None for mark in marks):
                title = f"row {number + 1}: {len(ids):,} tokens"
            target = self.target_of(row)
            found.append(
                Preview(f"{title}; learned: {target}" if target else title, pieces(self.tokenizer, ids, marks))
            )
        return found

    def marked(self, row: Example) -> tuple[Sequence[int], list[str | None]]:
        """(token ids of an example, what is learned of each; None: it is read)."""
        return row["input_ids"].tolist(), [None] * len(row["input_ids"])

    def target_of(self, row: Example) -> str:
        """What is learned of an example that is none of its tokens."""
        return ""

    def save_processor(self, folder: Path) -> None:
        from recipes.data.tokenizer import save_tokenizer

        save_tokenizer(self.tokenizer, folder)
