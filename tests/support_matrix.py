"""Writes docs/support.md from the list of settings: python tests/support_matrix.py"""

from __future__ import annotations

from pathlib import Path

from cases import CASES
from settings import SETTINGS, Setting

PATH = Path(__file__).resolve().parents[1] / "docs" / "support.md"

HEAD = """# Where the losses work

Every line is a test (`tests/test_settings.py`), run for float32, bfloat16, float16 and float64: the
result is torch's to rounding, with torch's dtype. "Same bits": and it has the bits of a plain call.
Refused: an error with the reason, before anything is read or written. "torch": the oldest
version, of 2.6, 2.13 and 2.14, that does this; `mbkern.patched()` reaches compiled calls from 2.13
on. `make torches` runs the tests with the oldest and the newest. Made by
`python tests/support_matrix.py`.
"""


def _cell(setting: Setting) -> str:
    if setting.refusal:
        return "refused"
    return "same bits" if setting.exact else "yes"


def text() -> str:
    """The page."""
    lines = [HEAD]
    names = [case.name for case in CASES]
    for group in dict.fromkeys(setting.group for setting in SETTINGS):
        members = [setting for setting in SETTINGS if setting.group == group]
        lines += [f"## {group}", "", f"| setting | {' | '.join(names)} | torch | |"]
        lines += ["| --- |" + " --- |" * (len(names) + 2)]
        for setting in members:
            cells = " | ".join([_cell(setting)] * len(names))
            lines.append(f"| {setting.name} | {cells} | {setting.since} | {setting.note} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PATH.write_text(text())
