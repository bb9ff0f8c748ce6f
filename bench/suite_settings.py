"""What one child process is asked to measure."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from mbkern.bench.timing import Effort

LONG_ROWS, ALL, NONE = COMPILE = ("long-rows", "all", "none")  # what torch.compile is tried on


def progress(case: str, threads: int) -> None:
    """Say what is being measured, on stderr."""
    print(f"  {case}, {threads} thread{'s' * (threads > 1)}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Settings:
    """The command line's choices, and the allocator state that this process runs in."""

    allocator: str
    threads: tuple[int, ...]
    quick: bool
    repeats: int | None
    compile: str

    def effort(self, seconds: float, *, least: int = 7, most: int = 2000) -> Effort:
        """The effort for a group that deserves ``seconds`` in a full run."""
        if self.quick:
            return Effort(seconds / 8, 0.05, 3, most, self.repeats)
        return Effort(seconds, min(0.5, seconds / 4), least, most, self.repeats)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        data = json.loads(text)
        return Settings(**{**data, "threads": tuple(data["threads"])})
