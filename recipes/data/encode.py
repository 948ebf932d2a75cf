"""From rows to token ids and the mask of supervised tokens.

Plain text: the tokenizer's own special tokens, the text, one end token; every token is supervised.
Prompt and completion: encoded apart, because generation starts from a prompt that was encoded alone, so the boundary is
exact; completion and end token are supervised. Chat: the tokenizer's template; the assistant's turns are supervised
(`chats.py`).
Special tokens written out in a text are read as such, which is how rows formatted by hand mark their turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem, RequestError
from conf.schema import DataConfig
from recipes.data.chats import ChatError, Chats, Segments, unread_option
from recipes.data.rows import Meter, Problems, Row
from recipes.data.tokenizer import without_begin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 17
"""Longest text encoded at once, characters: bounds memory (about 100 bytes per token) and lets a single large file
use all cores. A longer one is cut after a lone line break, where byte-level tokenizers cut anyway."""
LONE_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")
Encoded = tuple[np.ndarray, np.ndarray]
"""(token ids (length,) int64, supervised (length,) bool)."""


class Encoder:
    """Encodes batches of rows of one kind with all cores (fast tokenizers encode a batch in parallel).

    date, options, nulls: as of `Chats`. Raises RequestError when the tokenizer cannot encode such rows: no end token,
    no chat template, or options that it does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: dict[str, str],
        key: str,
        date: str = DataConfig.chat_date,
        options: Mapping[str, Any] = MappingProxyType({}),
        nulls: bool = False,
    ):
        self.tokenizer, self.kind = tokenizer, next(iter(columns))
        if self.kind == "messages" and not tokenizer.chat_template:
            rule = "this tokenizer has no chat template, so a list of messages cannot be written as text"
            nearest = f"{key}.prompt=COLUMN {key}.completion=COLUMN, or a tokenizer with a template"
            raise RequestError(Problem(f"{key}.messages", columns["messages"], rule, nearest))
        if self.kind != "messages" and tokenizer.eos_token_id is None:
            rule = "the tokenizer has no end-of-text token (eos_token), which ends each document"
            raise RequestError(Problem("model.tokenizer", tokenizer.name_or_path, rule, "one with an eos_token"))
        self.prefixes = _adds_prefix(tokenizer)
        if self.kind == "messages":
            if problem := unread_option(tokenizer, options):
                raise RequestError(problem)
            self.chats = Chats(tokenizer, datetime.fromisoformat(date), options, nulls)

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Encoded]]:
        """What each row is learned from: one document, of chats none or several (`chats.py`).

        Chats that cannot be learned go to `problems`, what becomes of the others to `meter`.
        """
        if not rows:
            return []
        if self.kind == "messages":
            return self._chats(rows, problems, meter)
        if self.kind == "prompt":
            return [[one] for one in self._completions([row.content for row in rows])]
        return [[one] for one in self._texts([row.content["text"] for row in rows])]

    def _texts(self, texts: list[str]) -> list[Encoded]:
        end, texts = self.tokenizer.eos_token_id, without_begin(self.tokenizer, texts)
        heads, rests, owner = [], [], []
        for number, text in enumerate(texts):
            head, *rest = [text] if self.prefixes else cut(text)
            heads.append(head)
            rests += rest
            owner += [number] * len(rest)
        parts = [[strip_end(ids, end, 1)] for ids in self._ids(heads, special=True)]
        for number, ids in zip(owner, self._ids(rests, special=False), strict=True):
            parts[number].append(ids)
        documents = [np.concatenate([*map(_array, part), [end]]).astype(np.int64) for part in parts]
        return [(ids, np.ones(len(ids), bool)) for ids in documents]

    def _completions(self, contents: list[dict[str, Any]]) -> list[Encoded]:
        end = self.tokenizer.eos_token_id
        texts = without_begin(self.tokenizer, [row["prompt"] for row in contents])
        prompts = [strip_end(ids, end, 1) for ids in self._ids(texts, special=True)]
        if self.prefixes:
            completions = self._behind([row["completion"] for row in contents])
        else:
            completions = self._ids([row["completion"] for row in contents], special=False)
        encoded = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = np.concatenate([_array(prompt), _array(strip_end(completion, end)), [end]]).astype(np.int64)
            encoded.append((ids, np.arange(len(ids)) >= len(prompt)))
        return encoded

    def _behind(self, texts: list[str]) -> list[list[int]]:
        """Texts for a tokenizer that puts a space before whatever it encodes: encoded behind a line break, which is
        then taken off, so that no space appears between a text and what stands before it."""
        mark = self._ids(["\n"], special=False)[0]
        marked, alone = self._ids(["\n" + text for text in texts], special=False), self._ids(texts, special=False)
        pairs = zip(marked, alone, strict=True)
        return [ids[len(mark) :] if ids[: len(mark)] == mark else other for ids, other in pairs]

    def _chats(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Encoded]]:
        """The texts of each chat, whose parts are encoded apart: generation starts from a prompt encoded alone, so the
        boundary is exact."""
        texts: list[list[Segments]] = []
        for row, (found, changes) in zip(rows, self.chats.written(rows), strict=True):
            texts.append([] if isinstance(found, ChatError) else found)
            if isinstance(found, ChatError):
                problems.add(Problem(row.where, "", str(found), found.nearest))
            for change in changes:
                meter.note(change.effect, change.what, change.first)
        if self.prefixes and self.tokenizer.is_fast:
            return [[self._by_offsets(one) for one in each] for each in texts]
        ids = iter(self._ids([part for each in texts for one in each for part, _ in one], special=False))
        return [[_joined([(next(ids), learned) for _, learned in one]) for one in each] for each in texts]

    def _by_offsets(self, chat: Segments) -> Encoded:
        """For a tokenizer that puts a space before whatever it encodes: the whole chat is encoded, and each token is of
        the part where it ends. Where one lies across the border of two, they are encoded apart after all."""
        whole = self.tokenizer("".join(text for text, _ in chat), add_special_tokens=False, return_offsets_mapping=True)
        begins, ends = np.array(whole["offset_mapping"], np.int64).reshape(-1, 2).T
        borders = np.cumsum([len(text) for text, _ in chat])
        part = np.searchsorted(borders, ends)
        if (np.searchsorted(borders, begins, side="right") < part).any():
            first, *rest = (text for text, _ in chat)
            parts = [*self._ids([first], special=False), *self._behind(rest)]
            return _joined([(ids, learned) for ids, (_, learned) in zip(parts, chat, strict=True)])
        return _array(whole["input_ids"]), np.array([learned for _, learned in chat])[part]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: texts longer than the model's positions are cut later, there is nothing to warn about
        options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, return_token_type_ids=False, **options)["input_ids"]


def cut(text: str) -> list[str]:
    """Pieces of at least PIECE characters, cut after a lone line break; joined they are the text."""
    pieces, start = [], 0
    while len(text) - start > 2 * PIECE:
        found = LONE_LINE_BREAK.search(text, start + PIECE)
        if found is None:
            break
        pieces.append(text[start : found.end()])
        start = found.end()
    return [*pieces, text[start:]]


def strip_end(ids: list[int], end: int, keep: int = 0) -> list[int]:
    """Without the end token that some tokenizers add themselves, so that each document has one.

    keep: tokens at the start that stay, for a begin token that is the end token too.
    """
    return ids[:-1] if len(ids) > keep and ids[-1] == end else ids


def _adds_prefix(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether encoding a text alone puts a space before it (SentencePiece models do), so that parts do not join."""
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a\n", "b")]
    return tokenizer.decode(parts[0] + parts[1]) != "a\nb"


def _joined(parts: Sequence[tuple[list[int], bool]]) -> Encoded:
    """One document of parts (ids, whether they are supervised)."""
    supervised = np.concatenate([np.full(len(ids), learned) for ids, learned in parts])
    return np.concatenate([_array(ids) for ids, _ in parts]), supervised


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int64)
