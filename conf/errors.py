"""How a wrong request is reported: every problem at once, each with key, value, rule and nearest legal choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One violated rule.

    key: what the user wrote or must write (`batch.micro_size`, or `FILE:LINE` for data).
    value: the offending value as the user would write it; empty when there is none.
    rule: one sentence, what must hold.
    nearest: what to write instead; empty when nothing is near.
    """

    key: str
    value: str
    rule: str
    nearest: str = ""

    def __str__(self) -> str:
        head = f"{self.key}={self.value}" if self.value != "" else self.key
        return f"{head}: {self.rule}" + (f"\n      try: {self.nearest}" if self.nearest else "")


class RequestError(Exception):
    """The request is wrong (exit code 2). Carries all the problems, not the first one."""

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(self.render())

    def render(self) -> str:
        """The text for stderr: starts with `error:`, one entry per problem."""
        if len(self.problems) == 1:
            return f"error: {self.problems[0]}"
        lines = [f"error: {len(self.problems)} problems with this request"]
        return "\n".join(lines + [f"  {n}. {p}" for n, p in enumerate(self.problems, 1)])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word nearest to `word`, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else ""
