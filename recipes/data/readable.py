"""How much of the text a model cannot read, measured when it is encoded: said above 5%, refused above
`data.max_unreadable`.

Three things are measured, each as a share of what there is of its kind:

unknown      tokens that stand for text the tokenizer does not know
apart        letters of scripts that the tokenizer takes apart into single letters or bytes. Two things have to be so:
             words of that script, as the data have them, need about a token for each letter, and the vocabulary has
             next to no pieces of it. So neither code and numbers (other letters than those of words do not count, and
             theirs are of a script that the vocabulary knows) nor rare words, nor scripts that are written letter by
             letter by nature (Han in a Chinese vocabulary) look foreign. All information arrives, so a new model may
             learn it; a pretrained one has not, and is refused.
unreachable  targets that no prediction can be: answers that are no span of tokens, translations that the tokenizer
             cannot write
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem
from recipes.data.changes import place_of, where
from recipes.data.tokenizer import BYTE, SPACE, is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN, APART, UNREACHABLE = "unknown", "apart", "unreachable"
SAID = 0.05
"""Share from which on it is said."""
SAMPLE, OF_ROW = 400, 8
"""Words of each script that are looked at, and how many of one row."""
LETTERS = re.compile(r"[^\W\d_]{2,}")
PER_LETTER, BYTES_PER_LETTER = 0.75, 1.05
"""Tokens for each letter from which on a script is taken apart: known languages need 0.2 to 0.6. Where single bytes are
tokens, a letter that is one token is read."""
LOGOGRAPHIC, KANA = 1000, ("HIRAGANA", "KATAKANA")
"""Single signs of a script in a vocabulary from which on it is written in them."""
SHOWN = 40
"""Characters of an example."""


@dataclass
class Share:
    """One measure. first: where the first row is of which more than 5% counts. example: from there."""

    what: str
    kind: str
    count: int = 0
    of: int = 0
    first: str = ""
    example: str = ""

    def add(self, count: int, of: int, row: str, example: str) -> None:
        """What was found in one row, or a part of one."""
        self.count, self.of = self.count + count, self.of + of
        if count and not self.first and count > SAID * of:
            self.first, self.example = row, _short(example)


class Reading:
    """Measures rows one by one. own: the tokenizer was trained on them, so that nothing in them is foreign to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own: bool):
        self.tokenizer, self.own = tokenizer, own
        self._shares: dict[str, Share] = {}
        self._scripts: dict[str, Share] = {}
        self._words: dict[str, list[str]] = {}
        self._unknown = unknown_id(tokenizer)
        special = np.zeros(len(tokenizer) + 1, bool)
        special[[one for one in tokenizer.all_special_ids if one is not None and one < len(special)]] = True
        if self._unknown is not None:
            special[self._unknown] = False
        self._special = special

    def texts(self, row: str, texts: Iterable[str]) -> None:
        """The texts of a row. row: where it stands."""
        if self.own:
            return
        for text in texts:
            counts = Counter[str]()
            for sign, count in Counter(text).items():
                if script := script_of(sign):
                    counts[script] += count
            total = counts.total()
            for script, count in counts.items():
                share = self._scripts.setdefault(script, Share("", APART))
                share.count += count
                if not share.first and count > SAID * total:
                    share.first, share.example = row, _short(text)
            self._sample(text, counts)

    def ids(self, row: str, ids: np.ndarray, texts: Iterable[str], what: str = "tokens") -> None:
        """Tokens of a row, (T,) ints. what: of which kind. texts: an example is taken from them."""
        if self._unknown is None or not len(ids):
            return
        count = int((ids == self._unknown).sum())
        of = int(len(ids) - self._special[np.minimum(ids, len(self._special) - 1)].sum())
        share = self._shares.setdefault(what, Share(f"{what} that are unknown to the tokenizer", UNKNOWN))
        share.add(count, of, row, next(iter(texts), "") if count and not share.first else "")

    def targets(self, row: str, what: str, count: int, of: int, example: str) -> None:
        """Of `of` targets of a row, `count` can be no prediction."""
        self._shares.setdefault(what, Share(what, UNREACHABLE)).add(count, of, row, example)

    def recorded(self, origins: Sequence[str]) -> list[dict[str, Any]]:
        """Each measure with something to it as JSON values for the cache. origins: as of `Source.origins`."""
        shares = [share for share in [*self._shares.values(), *self._apart()] if share.count]
        return [
            {
                "what": share.what, "kind": share.kind, "count": share.count, "of": share.of,
                "first": place_of(share.first, origins), "example": share.example,
            }
            for share in shares
        ]  # fmt: skip

    def _sample(self, text: str, counts: Mapping[str, int]) -> None:
        """Keep a few words of scripts of which there are not enough yet."""
        wanted = {script for script in counts if len(self._words.setdefault(script, [])) < SAMPLE}
        found = Counter[str]()
        for run in LETTERS.finditer(text) if wanted else ():
            for script, letters in itertools.groupby(run.group(), key=script_of):
                word = "".join(letters)
                if script in wanted and len(word) > 1:
                    self._words[script].append(word)
                    found[script] += 1
                    if found[script] >= OF_ROW:
                        wanted.discard(script)
            if not wanted:
                return

    def _apart(self) -> Iterator[Share]:
        """The letters of all scripts that are taken apart, as one measure; of those that are lost, as another."""
        total = sum(share.count for share in self._scripts.values())
        per_letter = {script: self._per_letter(script) for script in self._scripts}
        limit = BYTES_PER_LETTER if self._has_bytes else PER_LETTER
        suspects = [script for script, each in per_letter.items() if each is not None and (each >= limit or each == 0)]
        foreign = [script for script in suspects if not knows(self.tokenizer, script)]
        foreign.sort(key=lambda script: -self._scripts[script].count)
        for lost, kind, what in ((True, UNKNOWN, "leaves out"), (False, APART, "takes apart")):
            scripts = [script for script in foreign if (per_letter[script] == 0) == lost]
            named = [f"{script.capitalize()} ({per_letter[script]:.1f} tokens a letter)" for script in scripts[:4]]
            whole = Share(f"letters of scripts that the tokenizer {what}: {', '.join(named)}", kind, of=total)
            for script in scripts:
                share = self._scripts[script]
                whole.count += share.count
                if share.first and not whole.first:
                    whole.first, whole.example = share.first, share.example
            yield whole

    def _per_letter(self, script: str) -> float | None:
        """Tokens for each letter of words of this script; None where there are too few to say. 0: they are lost."""
        words = self._words.get(script, [])
        letters = sum(map(len, words))
        if letters < 8:
            return None
        options = {"add_special_tokens": False, "verbose": False}
        found = self.tokenizer(words, **options)["input_ids"]  # type: ignore[arg-type]
        return sum(map(len, found)) / letters

    @functools.cached_property
    def _has_bytes(self) -> bool:
        return is_byte_level(self.tokenizer) or "<0xE4>" in self.tokenizer.get_vocab()


@functools.cache
def script_of(sign: str) -> str:
    """The first word of a letter's name in Unicode (LATIN, CYRILLIC, CJK, …); empty for what is no letter."""
    sign = unicodedata.normalize("NFKC", sign)[:1]  # of letters in circles, of full width, in bold: the letter
    return unicodedata.name(sign, "").partition(" ")[0] if sign.isalpha() else ""


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token for what a tokenizer does not know; None where it knows everything.

    GPT-2's names its end of text, which it never writes for a text.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    name = tokenizer.unk_token or getattr(model, "unk_token", None)
    number = tokenizer.get_vocab().get(name) if name else None
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    return None if number in ends else number


def knows(tokenizer: PreTrainedTokenizerBase, script: str) -> bool:
    """Whether a vocabulary has been made for texts of this script: many pieces of several letters, or of one each.

    Also where it has hardly any pieces of several letters: of characters or bytes, it takes every script apart.
    """
    several, single = _pieces(tokenizer)
    size = len(tokenizer)
    if several.total() < size // 10 or several[script] >= max(10, size // 500):
        return True
    return single[script] >= LOGOGRAPHIC or (script in KANA and single["CJK"] >= LOGOGRAPHIC)


def _pieces(tokenizer: PreTrainedTokenizerBase) -> tuple[Counter[str], Counter[str]]:
    """Script → pieces of a vocabulary that have several letters of it, or one."""
    several, single = Counter[str](), Counter[str]()
    as_bytes = is_byte_level(tokenizer)
    special = set(tokenizer.all_special_tokens)
    for name in tokenizer.get_vocab():
        if name in special or BYTE.fullmatch(name):
            continue
        text = tokenizer.convert_tokens_to_string([name]) if as_bytes else name.replace(SPACE, "").replace("##", "")
        scripts = [script for script in map(script_of, text) if script]
        if len(set(scripts)) == 1:
            (several if len(scripts) > 1 else single)[scripts[0]] += 1
    return several, single


def reported(
    shares: Iterable[Mapping[str, Any]], key: str, source: str, origins: Sequence[str]
) -> list[dict[str, Any]]:
    """Those of one source for summary.json: the places are names again. key: of the source in the configuration."""
    return [{"source": source, "key": key, **share, "first": where(share["first"], origins)} for share in shares]


def lines(shares: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each share that is large enough to be said."""
    return [f"unreadable: {_said(share)}" for share in shares if share["count"] > SAID * share["of"]]


def check_readable(shares: Iterable[Mapping[str, Any]], limit: float, pretrained: bool) -> list[Problem]:
    """More is unreadable than `data.max_unreadable`. shares: as of `reported`. pretrained: the model brings weights."""
    problems = []
    for share in shares:
        if share["count"] <= limit * share["of"] or (share["kind"] == APART and not pretrained):
            continue
        rule = f"{_said(share)}; more than data.max_unreadable={limit:g}"
        fitting = {
            UNKNOWN: "a model whose tokenizer knows these texts",
            APART: "a model that was trained on texts like these",
            UNREACHABLE: "a tokenizer that can write these targets, or other rows",
        }[share["kind"]]
        enough = -(-share["count"] * 1000 // share["of"]) / 1000
        problems.append(Problem(share["key"], share["source"], rule, f"{fitting}, or data.max_unreadable={enough:g}"))
    return problems


def _said(share: Mapping[str, Any]) -> str:
    of, first = share["of"], f"; first: {share['first']}" if share["first"] else ""
    example = f", {share['example']!r}" if share["example"] else ""
    return f"{share['count'] / of:.1%} of {of:,}: {share['what']}{first}{example}"


def _short(text: str) -> str:
    text = " ".join(text[: 4 * SHOWN].split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
