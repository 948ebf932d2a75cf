"""The bubble of a pipeline: how long its stages wait for each other; and how many micro-batches are under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from conf.batch import Layout

Instruction = tuple[str, int, int]
"""(what, stage, micro-batch): forward and backward compute; send_/recv_activation and send_/recv_grad queue a message
from or to that stage; commit, with any numbers, sends and receives what is queued and waits for it."""
Programs = Callable[[Layout, int], Sequence[Sequence[Instruction]]]
"""What each rank of a folded pipeline does in a step of so many micro-batches (launch.runtime.pipeline.programs)."""

BACKWARD = 2.0
"""Time of a backward pass over that of a forward pass: two products of matrices where there was one."""


def bubble(costs: Sequence[float], micro_batches: int) -> float:
    """Mean idle share (0 to 1) of the stages in a step of 1F1B (Narayanan et al. 2019).

    costs: of one micro-batch on each stage. With equal stages it is (p-1)/(m+p-1); with unequal ones all wait for the
    slowest: the step takes (m-1) of its passes, and the passes of one micro-batch through all stages.
    """
    step = (micro_batches - 1) * max(costs) + sum(costs)
    return 1.0 - micro_batches * sum(costs) / (len(costs) * step) if step else 0.0


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at once: it is that many ahead of its first backward pass."""
    return min(micro_batches, stages - stage)


def simulated_bubble(
    programs: Sequence[Sequence[Instruction]], costs: Sequence[float], backward: float = BACKWARD
) -> float:
    """Mean idle share of the ranks that run `programs`, when messages take no time and commits wait for each other.

    costs: of one micro-batch on each stage.
    """
    arrived: dict[tuple[str, int, int], float] = {}
    ranks = [_Rank(program, costs, backward, arrived) for program in programs]
    while any([rank.advance() for rank in ranks]):  # a list: every rank goes as far as it can
        pass
    assert all(rank.done for rank in ranks), "the programs wait for each other"
    end = max(rank.time for rank in ranks)
    return 1.0 - sum(rank.busy for rank in ranks) / (len(ranks) * end)


class _Rank:
    """One rank on its way through its program."""

    def __init__(
        self, program: Sequence[Instruction], costs: Sequence[float], backward: float,
        arrived: dict[tuple[str, int, int], float],
    ):  # fmt: skip
        self._program, self._costs = program, costs
        self._share = {"forward": 1 / (1 + backward), "backward": backward / (1 + backward)}
        self._arrived = arrived
        self._next = 0
        self._queued: list[tuple[str, int, int]] = []
        self.time = self.busy = 0.0

    @property
    def done(self) -> bool:
        return self._next == len(self._program)

    def advance(self) -> bool:
        """Run until a commit waits for somebody who is not there yet; whether anything was run."""
        started = self._next
        while not self.done:
            what, stage, micro_batch = self._program[self._next]
            if what in self._share:
                spent = self._costs[stage] * self._share[what]
                self.time, self.busy = self.time + spent, self.busy + spent
            elif what != "commit":
                self._queued.append((what, stage, micro_batch))
            elif not self._commit():
                break
            self._next += 1
        return self._next > started

    def _commit(self) -> bool:
        for message in self._queued:
            self._arrived.setdefault(message, self.time)
        others = [self._arrived.get(_other_end(message)) for message in self._queued]
        if None in others:
            return False
        self.time = max([self.time, *(moment for moment in others if moment is not None)])
        self._queued = []
        return True


def _other_end(message: tuple[str, int, int]) -> tuple[str, int, int]:
    what, stage, micro_batch = message
    way, thing = what.split("_")
    onward = 1 if thing == "activation" else -1
    if way == "send":
        return f"recv_{thing}", stage + onward, micro_batch
    return f"send_{thing}", stage - onward, micro_batch


def simulated_in_flight(program: Iterable[Instruction], shares: dict[int, float]) -> float:
    """The most that a rank holds at once, as a number of micro-batches: each stage of it counts for its share."""
    held = most = 0.0
    for what, stage, _ in program:
        held += {"forward": shares[stage], "backward": -shares[stage]}.get(what, 0.0) if stage in shares else 0.0
        most = max(most, held)
    return most
