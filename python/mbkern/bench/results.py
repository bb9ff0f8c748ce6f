"""What a measurement is: ways side by side, and the samples of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mbkern.bench.statistics import Ratio, paired, summarise


@dataclass
class Entry:
    """One way to compute the thing, and one sample a round.

    Attributes:
        name: what the tables and goals call it.
        samples: raw samples in the group's unit, in the order of the rounds.
        error: largest error against fp64, relative to the largest exact value.
        correct: whether that error is within the tolerance; if not, the entry is not ranked.
        faults: median of the pages that the kernel had to supply during the timed part.
        note: why there are no samples, or what else the reader must know.
        failed: whether it raised; then ``note`` says what.
        host: on a GPU, the host's time of each sample, in the same unit.
    """

    name: str
    samples: list[float] = field(default_factory=list)
    error: float | None = None
    correct: bool = True
    faults: float | None = None
    note: str = ""
    failed: bool = False
    host: list[float] = field(default_factory=list)

    @property
    def ranked(self) -> bool:
        """Whether its samples may be compared with others."""
        return self.correct and not self.failed

    def take(self, timed: Entry) -> None:
        """Take over what was timed of this way, and why it ended, if it raised meanwhile."""
        self.samples, self.host, self.faults = timed.samples, timed.host, timed.faults
        if timed.failed:
            self.failed, self.note = True, timed.note

    def fail(self, failure: BaseException) -> None:
        """Keep what was raised, in one line."""
        lines = str(failure).strip().splitlines() or [""]
        self.failed, self.note = True, f"{type(failure).__name__}: {lines[0][:120]}".rstrip(": ")


@dataclass
class Group:
    """Ways that were measured side by side in one process; samples with one index are one round."""

    suite: str
    case: str
    threads: int
    allocator: str
    unit: str
    baseline: str
    entries: list[Entry]
    columns: int = 0
    dtype: str = "float32"

    def entry(self, name: str) -> Entry | None:
        """The entry of that name, if there is one."""
        return next((e for e in self.entries if e.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """The group with its raw samples and the summary of each entry."""
        data = asdict(self)
        for entry, raw in zip(self.entries, data["entries"], strict=True):
            raw["summary"] = asdict(summarise(entry.samples)) if entry.samples else None
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Group:
        """The inverse of :meth:`as_json`."""
        entries = [
            Entry(**{key: value for key, value in e.items() if key != "summary"})
            for e in data["entries"]
        ]
        return Group(**{**data, "entries": entries})


def paired_ratio(group: Group, numerator: str, denominator: str) -> Ratio | None:
    """Ratio of two entries, round by round; None if one is absent, skipped, wrong or has raised."""
    above, below = group.entry(numerator), group.entry(denominator)
    if above is None or below is None or not (above.ranked and below.ranked):
        return None
    return paired(above.samples, below.samples)
