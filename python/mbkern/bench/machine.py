"""The machine that the numbers hold for, and whether it was quiet."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import mbkern
from mbkern import _C
from mbkern.bench import gpu

BUSY = 0.10  # CPUs taken by others, on average, above which a run is called noisy

_SYSTEM = Path("/sys")


def describe() -> dict[str, Any]:
    """CPU, memory, software, and the settings that change speed."""
    build = _C.build_info()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "governor": _read("devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "huge pages": _choice("kernel/mm/transparent_hugepage/enabled"),
        "huge pages, defrag": _choice("kernel/mm/transparent_hugepage/defrag"),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "isa": f"{_C.isa()} of {', '.join(_C.isas())}",
        "openmp": _C.has_openmp(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mbkern": mbkern.__version__,
        "mbkern built from": f"{build['git'] or 'unknown'} by {build['compiler']}",
        "numerics": mbkern.NUMERICS_VERSION,
        "commit": _commit(),
        **gpu.describe(),
    }


def cpu_model() -> str:
    """The processor as the kernel names it; where a hypervisor hides which, with its numbers."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""

    def field(names: str) -> str:
        match = re.search(rf"^(?:{names})\s*:\s*(.+)$", text, re.MULTILINE)
        return match[1].strip() if match else ""

    name = field("model name|Model") or platform.machine()
    family, model = field("cpu family"), field("model")
    hidden = family and model and not re.search(r"\d", name)
    return f"{name}, family {family} model {model}" if hidden else name


def _caches() -> str:
    sizes = {}
    for index in sorted((_SYSTEM / "devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            sizes[f"L{level}"] = size
    return ", ".join(f"{level} {size}" for level, size in sizes.items()) or "unknown"


def _read(name: str) -> str:
    try:
        return (_SYSTEM / name).read_text().strip()
    except OSError:
        return ""


def _choice(name: str) -> str:
    """The choice made in a line such as ``always [madvise] never``."""
    match = re.search(r"\[(.+)\]", _read(name))
    return match[1] if match else "unknown"


def _commit() -> str:
    """Of the checkout that this is run in, if it is one, with "-dirty" for changed files."""
    if not Path("csrc/bindings.cpp").exists():
        return "unknown"
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def conditions() -> dict[str, Any]:
    """What changes from case to case: the load, and a GPU's clocks, power and throttle reasons."""
    return {"load": load_average(), **(gpu.sensors() if torch.cuda.is_available() else {})}


def last_level_cache() -> int:
    """Bytes of the largest cache of a CPU; 32 MiB where the kernel does not tell."""
    sizes = [part.split()[1] for part in _caches().split(", ") if " " in part]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [int(s[:-1]) * units[s[-1]] for s in sizes if s[-1] in units and s[:-1].isdigit()]
    return max(found, default=32 << 20)


def load_average() -> float:
    """Runnable tasks, averaged over a minute."""
    return round(os.getloadavg()[0], 2)


class OtherLoad:
    """CPUs that others (or the hypervisor) took, on average, since this object was made.

    ``processes`` are no others: workers of this one that still run.
    """

    def __init__(self, processes: Sequence[int] = ()) -> None:
        self._processes = processes
        self._time, self._busy = time.monotonic(), _busy_seconds()
        self._own = _own_seconds(processes)

    def cpus(self) -> float | None:
        """None where the kernel does not tell."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        elapsed = max(time.monotonic() - self._time, 0.1)
        others = (busy - self._busy) - (_own_seconds(self._processes) - self._own)
        return round(max(others, 0.0) / elapsed, 3)


def _busy_seconds() -> float | None:
    """Seconds that all CPUs together were neither idle nor waiting, stolen time included."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, *rest = map(int, line[1:9])
    return float(user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _own_seconds(processes: Sequence[int] = ()) -> float:
    return sum(map(_seconds_of, processes)) + sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _seconds_of(process: int) -> float:
    """Of a process that runs, with its own children; 0 where the kernel does not tell."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0.0
    user, system, *children = map(int, text.rpartition(")")[2].split()[11:15])
    return float(user + system + sum(children)) / os.sysconf("SC_CLK_TCK")
