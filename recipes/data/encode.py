"""From rows to token ids and the mask of supervised tokens.

Plain text: the tokenizer's own special tokens, the text, one end token; every token is supervised.
Prompt and completion: encoded apart, because generation starts from a prompt that was encoded alone, so the boundary is
exact; completion and end token are supervised. Chat: the tokenizer's template; the assistant's turns are supervised.
Special tokens written out in a text are read as such, which is how rows formatted by hand mark their turns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem, RequestError
from recipes.data.rows import Problems, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 17
"""Longest text encoded at once, characters: bounds memory (about 100 bytes per token) and lets a single large file
use all cores. A longer one is cut after a lone line break, where byte-level tokenizers cut anyway."""
LONE_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Encoded = tuple[np.ndarray, np.ndarray]
"""(token ids (length,) int64, supervised (length,) bool)."""


class Encoder:
    """Encodes batches of rows of one kind with all cores (fast tokenizers encode a batch in parallel).

    Raises RequestError when the tokenizer cannot encode such rows: no end token, no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: dict[str, str], key: str):
        self.tokenizer, self.kind = tokenizer, next(iter(columns))
        if self.kind == "messages" and not tokenizer.chat_template:
            rule = "this tokenizer has no chat template, so a list of messages cannot be written as text"
            nearest = f"{key}.prompt=COLUMN {key}.completion=COLUMN, or a tokenizer with a template"
            raise RequestError(Problem(f"{key}.messages", columns["messages"], rule, nearest))
        if self.kind != "messages" and tokenizer.eos_token_id is None:
            rule = "the tokenizer has no end-of-text token (eos_token), which ends each document"
            raise RequestError(Problem("model.tokenizer", tokenizer.name_or_path, rule, "one with an eos_token"))
        self.prefixes = _adds_prefix(tokenizer)

    def encode(self, rows: Sequence[Row], problems: Problems) -> list[Encoded]:
        """Tokens of each row; chats that the template refuses go to `problems`."""
        if not rows:
            return []
        if self.kind == "messages":
            encoded = [self._chat(row, problems) for row in rows]
            return self._tokenise_segments([chat for chat in encoded if chat is not None])
        if self.kind == "prompt":
            return self._completions([row.content for row in rows])
        return self._texts([row.content["text"] for row in rows])

    def _texts(self, texts: list[str]) -> list[Encoded]:
        end = self.tokenizer.eos_token_id
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
        prompts = [strip_end(ids, end, 1) for ids in self._ids([row["prompt"] for row in contents], special=True)]
        if self.prefixes:
            completions = self._continuations(contents)
        else:
            completions = self._ids([row["completion"] for row in contents], special=False)
        encoded = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = np.concatenate([_array(prompt), _array(strip_end(completion, end)), [end]]).astype(np.int64)
            encoded.append((ids, np.arange(len(ids)) >= len(prompt)))
        return encoded

    def _continuations(self, contents: list[dict[str, Any]]) -> list[list[int]]:
        """Completions for a tokenizer that puts a space before whatever it encodes: encoded behind a line break,
        which is then taken off, so that no space appears between prompt and completion."""
        mark = self._ids(["\n"], special=False)[0]
        marked = self._ids(["\n" + row["completion"] for row in contents], special=False)
        alone = self._ids([row["completion"] for row in contents], special=False)
        pairs = zip(marked, alone, strict=True)
        return [ids[len(mark) :] if ids[: len(mark)] == mark else other for ids, other in pairs]

    def _chat(self, row: Row, problems: Problems) -> list[tuple[str, bool]] | Encoded | None:
        """Segments (text, supervised) of a rendered chat, or its tokens when the template marks the turns."""
        import jinja2

        messages = row.content["messages"]
        try:
            if GENERATION_MARK.search(_template(self.tokenizer)):
                options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
                chat: Any = self.tokenizer.apply_chat_template(messages, **options)
                return np.array(chat["input_ids"], np.int64), np.array(chat["assistant_masks"], bool)
            segments = split_turns(self.tokenizer, messages)
        except (jinja2.TemplateError, TypeError) as error:
            problems.add(Problem(row.where, "", f"the chat template refuses this chat: {error}"))
            return None
        if segments is None:
            rule = "the assistant's turns cannot be told from the rest: the template writes earlier turns differently"
            nearest = "prompt and completion columns, or a template with {% generation %} marks"
            problems.add(Problem(row.where, "", rule, nearest))
        return segments

    def _tokenise_segments(self, chats: list[list[tuple[str, bool]] | Encoded]) -> list[Encoded]:
        """Segments are encoded apart: generation starts from a prompt encoded alone, so the boundary is exact.

        Where that would put spaces between them, the whole chat is encoded and each token goes where its end lies.
        """
        if self.prefixes and self.tokenizer.is_fast:
            return [chat if isinstance(chat, tuple) else self._by_offsets(chat) for chat in chats]
        texts = [text for chat in chats if isinstance(chat, list) for text, _ in chat]
        ids = iter(self._ids(texts, special=False))
        done: list[Encoded] = []
        for chat in chats:
            if isinstance(chat, tuple):
                done.append(chat)
                continue
            parts = [(_array(next(ids)), supervised) for _, supervised in chat]
            tokens = np.concatenate([part for part, _ in parts])
            done.append((tokens, np.concatenate([np.full(len(part), supervised) for part, supervised in parts])))
        return done

    def _by_offsets(self, chat: list[tuple[str, bool]]) -> Encoded:
        whole = self.tokenizer("".join(text for text, _ in chat), add_special_tokens=False, return_offsets_mapping=True)
        ends = np.array([end for _, end in whole["offset_mapping"]])
        segment = np.searchsorted(np.cumsum([len(text) for text, _ in chat]), ends)
        return _array(whole["input_ids"]), np.array([supervised for _, supervised in chat])[segment]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: texts longer than the model's positions are cut later, there is nothing to warn about
        options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, return_token_type_ids=False, **options)["input_ids"]


def split_turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[tuple[str, bool]] | None:
    """The rendered chat in segments (text, supervised); supervised are the assistant's turns up to their end token.

    A turn begins where the chat before it, rendered with the generation prompt, ends. It ends where the chat up to
    and with it ends, or, in templates that write the last turn differently, at its end token. None when it has no
    such place.
    """

    def render(count: int, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    whole = render(len(messages), False)
    end = tokenizer.eos_token or ""
    segments, at = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(number, True) if number else ""
        after = render(number + 1, False)
        if not whole.startswith(before) or len(before) < at:
            return None
        start = len(before)
        if whole.startswith(after) and len(after) > start:
            turn = whole[start : len(after)]
            stop = start + turn.rfind(end) + len(end) if end and end in turn else len(after)
        elif end and end in whole[start:]:
            stop = whole.index(end, start) + len(end)
        else:
            return None
        segments += [(whole[at:start], False), (whole[start:stop], True)]
        at = stop
    segments.append((whole[at:], False))
    return [(text, supervised) for text, supervised in segments if text]


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


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.get_chat_template()


def _adds_prefix(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether encoding a text alone puts a space before it (SentencePiece models do), so that parts do not join."""
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a\n", "b")]
    return tokenizer.decode(parts[0] + parts[1]) != "a\nb"


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int64)
