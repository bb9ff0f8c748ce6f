"""The results file: one for a GPU and a day, to which every stage adds its part."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu.machine import file_name
from gpu.stage import ROOT, Report

FOLDER = ROOT / "bench/results"
LARGEST = 300_000  # bytes; the file is to be committed


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: stages that run side by side add to one file."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def add(stage: str, report: Report, facts: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a stage's report, in place of what the same stage wrote before."""
    path = folder / file_name(facts["gpu"], facts["date"])
    with _alone(folder):
        _add(path, stage, report, facts)
    return path


def _add(path: Path, stage: str, report: Report, facts: dict[str, Any]) -> None:
    document = json.loads(path.read_text()) if path.exists() else {"gpu": facts["gpu"]}
    document.setdefault("stages", {})[stage] = {
        "verdict": report.verdict,
        "reason": report.reason,
        "machine": facts,
        **report.details,
    }
    text = json.dumps(document, indent=1) + "\n"
    if len(text) > LARGEST:
        raise ValueError(f"{path.name} would have {len(text)} bytes; at most {LARGEST} are kept")
    path.write_text(text)
