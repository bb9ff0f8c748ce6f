"""JSON lines: one row for each case and provider, with its raw samples and the machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

MEASURED, WRONG, SKIPPED, FAILED = "measured", "wrong", "skipped", "failed"
ALL = "(all)"  # as a provider: of all providers of a case; as a case: of a whole suite

Key = tuple[str, ...]


@dataclass
class Row:
    """One provider of one case, as a line of a file has it.

    Attributes:
        suite, case, shape, dtype, direction: what was computed.
        provider, device, isa, threads, allocator, cache: how.
        status: measured, wrong, skipped or failed; ``reason`` says why there is no number.
        median_s, interval_s, q1_s, q3_s, outliers: of the samples: seconds a call, and the 95 %
            interval of the median (of fewer than six samples: all of them).
        samples_s: raw, in the order of the rounds.
        host_s: on a GPU, the host's median time for a call.
        calls: calls in one sample.
        bytes: that a call must move at least; ``bandwidth_share`` is how near that comes to the
            bare pass that was measured beside it.
        flops: of the matrix products in a call.
        error_vs_fp64, tolerance: the largest error, relative to the largest exact value.
        peak_bytes: memory above the inputs during a call.
        faults: pages that a call was given by the kernel, the median.
        limit: whether it is a limit of the machine.
        baseline: the provider that others are compared with.
        size, axis: what it is plotted over.
        run: of one command; ``pair``: rows of two files with one ``pair`` took turns.
        blocks: of ``bench ab``: samples of each process, in order.
        environment: the machine, the software, the load before and after.
        extra: particular to a suite.
    """

    suite: str
    case: str
    shape: list[int]
    dtype: str
    direction: str
    provider: str
    device: str
    isa: str
    threads: int
    allocator: str = "default"
    cache: str = "warm"
    status: str = MEASURED
    reason: str = ""
    median_s: float | None = None
    interval_s: list[float] | None = None
    q1_s: float | None = None
    q3_s: float | None = None
    outliers: int = 0
    samples_s: list[float] = field(default_factory=list)
    host_s: float | None = None
    calls: int = 1
    bytes: int = 0
    bandwidth_share: float | None = None
    flops: int = 0
    error_vs_fp64: float | None = None
    tolerance: float | None = None
    peak_bytes: int | None = None
    faults: float | None = None
    limit: bool = False
    baseline: str = ""
    size: float = 0.0
    axis: str = ""
    run: str = ""
    pair: str = ""
    blocks: list[int] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> Key:
        """What rows of one run that were measured side by side have in common."""
        return (
            self.suite, self.case, self.dtype, self.direction, self.device, str(self.threads),
            self.allocator, self.cache,
        )  # fmt: skip

    @property
    def key(self) -> Key:
        """What identifies the row from run to run."""
        return (*self.group, self.provider)

    @property
    def unusual(self) -> str:
        """The device and the state of the caches where these are not the usual, after commas."""
        device = f", {self.device}" * (self.device != "cpu")
        return device + f", {self.cache} caches" * (self.cache != "warm")

    @property
    def ranked(self) -> bool:
        """Whether its time may be compared with others."""
        return self.status == MEASURED and bool(self.samples_s)

    def to_json(self) -> str:
        """One line; samples with six digits, which is finer than the clock."""
        data = asdict(self)
        data["samples_s"] = [float(f"{sample:.6g}") for sample in self.samples_s]
        return json.dumps(data, allow_nan=True)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Row:
        """The inverse; fields that this version does not know are ignored.

        Raises TypeError where a field is missing or of another type, AttributeError for no object.
        """
        row = Row(**{k: v for k, v in data.items() if k in Row.__dataclass_fields__})
        for known in fields(row):
            value = getattr(row, known.name)
            if not _is_of(value, str(known.type)):
                raise TypeError(f"{known.name} is {value!r}")
        if row.interval_s is not None and len(row.interval_s) != 2:
            raise TypeError(f"interval_s is {row.interval_s!r}")
        return row


def _is_of(value: Any, type_name: str) -> bool:
    """Whether a value read from JSON is what a field's type says: ``list[float] | None``."""
    if type_name.endswith(" | None"):
        return value is None or _is_of(value, type_name.removesuffix(" | None"))
    if type_name.startswith("list["):
        inner = type_name.removeprefix("list[").removesuffix("]")
        return isinstance(value, list) and all(_is_of(entry, inner) for entry in value)
    if type_name in ("int", "float"):  # a suite of one's own may count bytes in either
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, {"str": str, "bool": bool}.get(type_name, dict))


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file; what is there stays. A last line that was cut off is ended first."""
    text = "".join(row.to_json() + "\n" for row in rows)
    if path.is_file() and path.stat().st_size:  # a pipe, as of /dev/stdout, cannot be read
        with path.open("rb") as file:
            file.seek(-1, 2)
            text = "\n" * (file.read(1) != b"\n") + text
    with path.open("ab") as file:
        file.write(text.encode())


def load(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a file, and a warning for every line that is none.

    Raises OSError if it cannot be read. A line that was cut off, as by a full disk or a kill, costs
    that row only.
    """
    rows: list[Row] = []
    warnings: list[str] = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_json(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            warnings.append(f"{path}, line {number}: not a row ({error}); left out")
    return rows, warnings


def latest(rows: Sequence[Row]) -> dict[Key, Row]:
    """Rows by their key, in the order of the file; of one key the last.

    A case that failed as a whole takes the place of what it once was, and the other way round. What
    a later run did not measure (``torch.compile`` without ``--compile``) stays as it was.
    """
    found: dict[Key, Row] = {}
    for row in rows:
        if row.status == SKIPPED and row.key in found and found[row.key].samples_s:
            continue
        replaced = [row.key, (*row.group, ALL)]
        if row.provider == ALL:
            replaced += [key for key in found if key[:-1] == row.group]
        for key in replaced:
            found.pop(key, None)
        found[row.key] = row
    return found


def grouped(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    """Rows that were measured side by side: of one run."""
    groups: dict[Key, list[Row]] = {}
    for row in latest(rows).values():
        groups.setdefault((row.run, *row.group), []).append(row)
    return groups
