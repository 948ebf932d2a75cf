"""Tags without a download: the tokens of the standard library's statements and their exact lexical classes."""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Iterator

from recipes.data.changes import DROPPED, PASSED_OVER
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import StdlibSource, held_out_files

TAGS = ("COMMENT", "KEYWORD", "NAME", "NUMBER", "OPERATOR", "STRING")
LONGEST = 40
"""Characters that are kept of a token: a docstring would fill a sequence with a single tag."""
FEWEST = 3
"""Tokens of the shortest row: `pass`, a docstring, a comment on a line of its own have nothing to tell apart."""
Statement = tuple[int, list[str], list[str]]
"""(number of its first line counted from 1, tokens, tags)."""

_CLASSES = {"COMMENT": "COMMENT", "NUMBER": "NUMBER", "OP": "OPERATOR", "STRING": "STRING"}
_LINE_ENDS = (tokenize.NEWLINE, tokenize.NL)


class LexicalSource(StdlibSource):
    """Logical lines of the standard library, content `{"tokens": [str], "tags": [str]}`, each tag one of TAGS.

    Held out by file, as the text of `StdlibSource` is. Every tag is right: it is Python's own tokenizer that gives it.
    """

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        files = self.files(False)
        set_aside = held_out_files([name for name, _ in files], self.held_out)
        for name, path in files:
            text = self._read_file(path, problems, meter)
            meter.done += path.stat().st_size
            if text is None:
                continue
            try:
                found = list(statements(text))  # all of a file or nothing: it may turn out broken at its end
            except (SyntaxError, tokenize.TokenError):
                meter.note(DROPPED, "files that do not tokenise", str(path))
                continue
            if not found:
                meter.note(PASSED_OVER, "empty files", str(path))
            for line, tokens, tags in found:
                if len(tokens) < FEWEST:
                    meter.note(PASSED_OVER, f"lines with fewer than {FEWEST} tokens", f"{path}:{line}")
                else:
                    yield Row(f"{path}:{line}", name in set_aside, {"tokens": tokens, "tags": tags})


def statements(text: str) -> Iterator[Statement]:
    """The logical lines of a Python source, a comment on a line of its own being one; tokens as `lexical_class` has it.

    Raises SyntaxError or tokenize.TokenError for a text that is no Python.
    """
    first, depth = 0, 0
    tokens: list[str] = []
    tags: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _LINE_ENDS and depth == 0:  # in brackets a line ends, the statement does not
            if tokens:
                yield first, tokens, tags
            first, tokens, tags = 0, [], []
            continue
        if token.type == tokenize.ERRORTOKEN:  # what Python 3.11 says instead of raising
            raise SyntaxError(f"line {token.start[0]} has no token at {token.string!r}")
        tag = lexical_class(token)
        if tag is None:
            continue
        if tag == "OPERATOR":
            depth += (token.string in "([{") - (token.string in ")]}")
        first = first or token.start[0]
        tokens.append(token.string[:LONGEST])
        tags.append(tag)


def lexical_class(token: tokenize.TokenInfo) -> str | None:
    """One of TAGS; None for line ends, indentation, the encoding, the end of the file, and blank pieces of f-strings.

    Soft keywords (`match`, `type`) are names. From Python 3.12 on an f-string arrives in pieces: its literal parts and
    quotes are strings, what stands in its braces has the classes it has anywhere.
    """
    kind = tokenize.tok_name[token.type]
    if kind == "NAME":
        return "KEYWORD" if keyword.iskeyword(token.string) else "NAME"
    if kind.startswith(("FSTRING_", "TSTRING_")):
        return "STRING" if token.string.strip() else None
    return _CLASSES.get(kind)
