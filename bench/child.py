"""One suite in one allocator state: ``python child.py SUITE SETTINGS RESULT``, started by run.py.

A process of its own, because the allocator's state is that of a process: it is chosen by the
environment at the start, and every measurement changes it. Writes the groups as JSON to RESULT.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch  # before mbkern, which uses its OpenMP runtime
from suite_settings import Settings

from mbkern.bench.allocator import fill_reserve
from mbkern.bench.machine import OtherLoad


def main(suite: str, settings_json: str, result: str) -> None:
    settings = Settings.from_json(settings_json)
    torch.set_num_threads(max(settings.threads))
    fill_reserve(settings.allocator, (1 if settings.quick else 3) << 30)
    module = importlib.import_module(f"suites.{suite.replace('-', '_')}")
    load = OtherLoad()
    groups = module.run(settings)
    data = {"groups": [g.as_json() for g in groups], "other_load": load.cpus()}
    Path(result).write_text(json.dumps(data))


if __name__ == "__main__":
    main(*sys.argv[1:])
