"""How a script of several processes ends its process group: as the loops of the examples do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "loops"))

from processes import leave  # noqa: F401
