"""Which sub-steps there are, in the order in which they are run.

The letters are those of the table in benchmarks/README.md. What is quick or decides about the rest comes first, so that
little time still has something of each letter: the long sequence, the compilers and the large checkpoint come last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LOOPS = ("by_hand", "trainer", "ours")
ROUNDS = (1, 2)
LENGTHS = (2048, 4096)


@dataclass(frozen=True)
class SubStep:
    """call: `module:function` below benchmarks.gpu_steps, called with `arguments`. limit_s: of wall time, once its
    imports are done. beside: runs while the others do, and those that name it in `after` wait for it. repeats: another
    one does the same with other sizes, so that a rehearsal leaves it out."""

    step: str
    name: str
    call: str
    limit_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    beside: bool = False
    repeats: bool = False
    after: str = ""

    @property
    def key(self) -> str:
        return f"{self.step}.{self.name}"


def _contest(length: int) -> list[SubStep]:
    """Three loops in turns, another one first in the second round."""
    found = []
    for number in ROUNDS:
        order = LOOPS[number - 1 :] + LOOPS[: number - 1]
        for loop in order:
            arguments = {"loop": loop, "length": length, "number": number}
            repeats = number > 1 or length > LENGTHS[0]
            name = f"{length}.{loop}.{number}"
            found.append(SubStep("c", name, "throughput:turn", 75, arguments, repeats=repeats))
    return found


def _changed(name: str, limit_s: float = 60, after: str = "") -> SubStep:
    return SubStep("d", name, "throughput:changed", limit_s, {"change": name}, after=after)


SUB_STEPS: tuple[SubStep, ...] = (
    SubStep("f", "kernels", "costs:kernels", 240, beside=True),
    SubStep("a", "ceilings", "ceilings:ceilings", 60),
    SubStep("b", "fp32", "gradients:compared", 60, {"precision": "fp32"}),
    SubStep("b", "bf16", "gradients:compared", 60, {"precision": "bf16"}),
    SubStep("b", "fp16", "gradients:compared", 60, {"precision": "fp16"}),
    *_contest(LENGTHS[0]),
    SubStep("g", "quickstart", "commands:quickstart", 120),
    SubStep("h", "killed", "commands:killed", 120),
    _changed("packed_sdpa"),
    _changed("packed_flex", 90),
    _changed("packed_varlen"),
    _changed("packed_flash_2"),
    _changed("packed_flash_3"),
    _changed("plain_loss"),
    _changed("liger_loss"),
    _changed("engine_adam", 120, "f.kernels"),
    SubStep("e", "requests", "memory:requests", 100),
    *_contest(LENGTHS[1]),
    SubStep("f", "offload", "costs:offload", 120, after="f.kernels"),
    SubStep("b", "compile", "gradients:compared", 90, {"precision": "fp32", "compiled": True}),
    _changed("compile", 120),
    SubStep("f", "save", "costs:save", 120),
    SubStep("g", "sst2", "commands:sst2", 240),
)  # fmt: skip


def chosen(words: list[str], rehearsal: bool = False) -> list[SubStep]:
    """Those whose letter, name or beginning of a name (`c.2048`) is among the words; without any all.

    rehearsal: without those that repeat another one, unless they are named.
    """
    if not words:
        return [s for s in SUB_STEPS if not (rehearsal and s.repeats)]
    return [s for s in SUB_STEPS if any(s.key == word or s.key.startswith(f"{word}.") for word in words)]
