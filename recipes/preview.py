"""A few training rows as the model sees them, with what is learned marked: text for a terminal or a file."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 600
"""Characters of a stretch of text that are shown at most; its middle is left out."""
SHOWN = 3
"""Rows that are shown."""
OPEN, CLOSE = "⟦", "⟧"
GREEN, PLAIN = "\033[1;32m", "\033[0m"


@dataclass(frozen=True)
class Piece:
    """A stretch of text. learned: None where it is only read; else what is learned of it, empty for its own tokens."""

    text: str
    learned: str | None = None


@dataclass(frozen=True)
class Preview:
    """One row. title: what is said of all of it."""

    title: str
    pieces: list[Piece]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], learned: Sequence[str | None]) -> list[Piece]:
    """Stretches of tokens with the same mark; those with a name are apart. ids, learned: of the same length."""
    found, at, before = [], 0, ""
    numbered = [(mark, number if mark else 0) for number, mark in enumerate(learned)]
    for (mark, _), run in groupby(numbered):
        start, at = at, at + len(list(run))
        until = _text(tokenizer, ids[:at])
        # The text of a stretch alone may lack the space before it; a character may be cut only by a stretch's border.
        text = until[len(before) :] if until.startswith(before) else _text(tokenizer, ids[start:at])
        found.append(Piece(text, mark))
        before = until
    return found


def counted(number: int, ids: Sequence[int], learned: Iterable[str | None]) -> str:
    """The title of a row."""
    count = sum(mark is not None for mark in learned)
    return f"row {number + 1}: {len(ids):,} tokens, {count:,} learned"


def rendered(rows: Sequence[Preview], colour: bool) -> str:
    """All of it as text. colour: what is learned is coloured; it stands in brackets otherwise."""
    parts = []
    for row in rows:
        text = "".join(_marked(piece, colour) for piece in row.pieces)
        parts.append(f"── {row.title}\n{text}\n")
    return "\n".join(parts)


def _marked(piece: Piece, colour: bool) -> str:
    text = _shortened(_printable(piece.text))
    if piece.learned is None:
        return text
    named = f"{text} → {_printable(piece.learned)}" if piece.learned else text
    if not colour or piece.learned:  # which token a name is of must be seen in colour, too
        named = f"{OPEN}{named}{CLOSE}"
    return f"{GREEN}{named}{PLAIN}" if colour else named


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} … ({len(text) - 2 * half:,} characters) … {text[-half:]}"


def _printable(text: str) -> str:
    """Without what would move the cursor, or change colours."""
    return "".join(
        sign if sign in "\n\t" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else sign.encode("unicode_escape").decode()
        for sign in text
    )  # fmt: skip


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode([int(one) for one in ids], clean_up_tokenization_spaces=False))
