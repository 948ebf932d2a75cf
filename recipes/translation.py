"""From one language to another, with an encoder-decoder; judged by what it really generates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem
from recipes.base import Prediction
from recipes.data.examples import Example
from recipes.data.packing import MULTIPLE
from recipes.data.rows import Meter, Problems, Row
from recipes.supervised import IGNORE, RECORDS
from recipes.text import TextTask

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class Translation(TextTask):
    """The loss is over the tokens of the target; source and target each end with the end-of-text token."""

    KINDS = {  # noqa: RUF012 - never changed
        "stdlib": "recipes.data.docstrings:DocstringsSource",
        "lines": "recipes.data.lines:LinesSource",
        **RECORDS,
    }
    KEYS = ("source", "target", "target_path", "eval_target_path")
    ARRAYS = {"input_ids": "int32", "labels": "int32", "reference": "uint8"}  # noqa: RUF012
    METRICS = {"loss": "min", "bleu": "max", "chrf": "max"}  # noqa: RUF012

    def columns(self) -> dict[str, str]:
        data = self.cfg.data
        return {"source": data.source or "source", "target": data.target or "target"}

    def is_empty(self, content: dict[str, Any]) -> bool:
        return not content["source"].strip() or not content["target"].strip()

    def texts(self, content: dict[str, Any]) -> Iterator[str]:
        yield content["source"]
        yield content["target"]

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        sides = []
        for side in ("source", "target"):
            texts = [row.content[side] for row in rows]
            options = {"text_target": texts} if side == "target" else {"text": texts}
            whole = self.tokenizer(**options, verbose=False)["input_ids"]
            sides.append([self._ended(ids) for ids in whole])
            self.overlong([len(ids) for ids in sides[-1]], [row.where for row in rows], problems, meter)
        limit = self.cfg.data.seq_length
        return [
            [
                {
                    "input_ids": np.array(source[:limit], np.int32), "labels": np.array(target[:limit], np.int32),
                    "reference": np.frombuffer(row.content["target"].encode(), np.uint8),
                }
            ]
            for row, source, target in zip(rows, *sides, strict=True)
        ]  # fmt: skip

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def hf_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def new_head(self) -> bool:
        return False

    def check_model(self) -> list[Problem]:
        config = self.model_config()
        if not config.is_encoder_decoder:
            rule = f"translation trains encoder-decoders, {config.model_type} is none"
            nearest = "task=causal_lm with data.prompt and data.completion, or model.type=bart, t5, marian"
            return [Problem("model", config.model_type, rule, nearest)]
        if self.cfg.parallel.pipeline > 1:
            rule = "an encoder-decoder has no pipeline: every layer of its decoder looks at the last one of its encoder"
            return [Problem("parallel.pipeline", str(self.cfg.parallel.pipeline), rule, "parallel.pipeline=1 (data)")]
        return super().check_model()

    def set_heads(self, config: PretrainedConfig) -> None:
        if self._folder:
            return  # a pretrained model knows its tokens
        super().set_heads(config)
        config.eos_token_id = config.forced_eos_token_id = self.tokenizer.eos_token_id
        config.bos_token_id = config.decoder_start_token_id = self.tokenizer.eos_token_id
        config.forced_eos_token_id = None

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        batch = super().collate(rows, size)
        longest = max((len(row["labels"]) for row in rows), default=1)
        width = -(-longest // MULTIPLE) * MULTIPLE
        labels = np.full((size, width), IGNORE, np.int64)
        given = np.full((size, width), self.pads, np.int64)
        given[:, 0] = self._start
        for number, row in enumerate(rows):
            target = row["labels"]
            labels[number, : len(target)] = target
            given[number, 1 : len(target)] = target[:-1]
        return {**batch, "labels": labels, "decoder_input_ids": given}

    @property
    def _start(self) -> int:
        if not hasattr(self, "_first_token"):
            self._first_token = int(self.model_config().decoder_start_token_id)
        return self._first_token

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        targets = int((batch["labels"] != IGNORE).sum())
        return targets, targets + self.real_tokens(batch)

    def places(self, batch: Mapping[str, np.ndarray]) -> int:
        return batch["input_ids"].size + batch["labels"].size

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        return {**{name: batch[name] for name in names}, "use_cache": False}

    def summed_loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn import functional as F

        logits = outputs.logits.float().flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum")

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {}

    def evaluate(self, model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        loss, _ = super().evaluate(model, batch)
        network = getattr(model, "module", model)
        made = network.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, use_cache=True,
            max_new_tokens=self.cfg.eval.new_tokens, num_beams=self.cfg.eval.beams,
            # Under ZeRO-3 every forward pass gathers parameters from all ranks: a rank that is done goes on with them.
            synced_gpus=self.cfg.zero.stage == 3,
        )  # fmt: skip
        return loss, {"tokens": made.cpu().numpy()}

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


recipe = Translation
