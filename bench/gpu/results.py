"""The results file: one for a GPU and a day, to which every stage adds its part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu.machine import file_name
from gpu.stage import ROOT, Report

FOLDER = ROOT / "bench/results"
LARGEST = 200_000  # bytes; the file is to be committed


def add(stage: str, report: Report, facts: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a stage's report, in place of what the same stage wrote before."""
    path = folder / file_name(facts["gpu"], facts["date"])
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
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
