"""What a sub-step is given, in its own process."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_steps.journal import append

VARIABLE = "GPU_SUB_STEP"
"""Where the process finds it: JSON."""


@dataclass(frozen=True)
class Context:
    """step, name: of the sub-step. device: cpu | cuda. size: full | tiny. data: folder of data sets, or empty.

    journal: the file of rows. scratch: a folder of this sub-step's own. out: of the benchmark, for at most a picture.
    """

    step: str
    name: str
    device: str
    size: str
    data: str
    journal: str
    scratch: str
    out: str

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def folder(self) -> Path:
        return Path(self.scratch)

    def row(self, part: str, **figures: Any) -> None:
        """Write down figures; units are in their names."""
        append(Path(self.journal), {"step": self.step, "name": self.name, "part": part, **figures})
        print(part, figures, flush=True)

    def to_environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @staticmethod
    def from_environment() -> Context:
        return Context(**json.loads(os.environ[VARIABLE]))
