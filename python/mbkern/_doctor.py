"""``python -m mbkern doctor``: what is installed, what will be used, and what to do about it.

Each section is a function that returns facts, and adds to ``advice`` what is wrong and its cure.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
from pathlib import Path

import numpy as np
import torch

from mbkern import _C, _launch
from mbkern._version import NUMERICS_VERSION, __version__

Facts = dict[str, "str | int | list[str]"]

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_ENABLED = {
    "always": "used everywhere",
    "madvise": "used where asked for, as mbkern does for large outputs",
    "never": "switched off",
}
_DEFRAG = {
    "always": "made at the first touch, if need be by waiting",
    "defer": "made later, in the background",
    "defer+madvise": "made at the first touch where asked for, elsewhere in the background",
    "madvise": "made at the first touch where asked for",
    "never": "taken only if one is free",
}


def _versions(advice: list[str]) -> Facts:
    build = _C.build_info()
    if build["version"] != __version__:
        advice.append(f"The extension is of version {build['version']}: reinstall mbkern.")
    return {
        "mbkern": __version__,
        "numerics": NUMERICS_VERSION,
        "commit": build["git"] or "unknown",
        "compiler": build["compiler"],
        "torch": torch.__version__,
        "tensors read": "through torch's exchange table"
        if _launch.has_exchange_table
        else "through attributes (no exchange table in this torch): 2 us a call slower",
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _isa(advice: list[str]) -> Facts:
    available, asked = _C.isas(), os.environ.get("MBKERN_ISA")
    try:
        used = _C.isa()
    except ValueError:
        advice.append(
            f"Every call on the CPU is refused, as there is no instruction set {asked!r} here:"
            " unset MBKERN_ISA."
        )
        return {"used": "none", "because": f"MBKERN_ISA={asked}", "available": available}
    if used != available[0]:
        advice.append(f"{available[0]} gives the same results faster: unset MBKERN_ISA.")
    return {
        "used": used,
        "because": f"MBKERN_ISA={asked}" if asked else "best available",
        "available": available,
    }


def _threads(advice: list[str]) -> Facts:
    openmp, runtimes = _C.has_openmp(), openmp_runtimes(Path("/proc/self/maps").read_text())
    used, cpus = torch.get_num_threads() if openmp else 1, len(os.sched_getaffinity(0))
    if not openmp:
        advice.append(
            "CPU kernels run on one thread: import torch before mbkern. If that does not"
            " help, this torch has no OpenMP: install another."
        )
    if len(runtimes) > 1:
        advice.append(
            "Two OpenMP runtimes compete for the CPUs: import torch first, and remove"
            " the package that brings the other one."
        )
    if used > cpus:
        advice.append(f"{used} threads share {cpus} CPUs: lower OMP_NUM_THREADS.")
    return {
        "used": used,
        "cpus": cpus,
        "openmp": "GOMP_parallel found" if openmp else "GOMP_parallel not found",
        "runtimes": runtimes,
    }


def openmp_runtimes(maps: str) -> list[str]:
    """The OpenMP runtimes named in the text of a ``/proc/<pid>/maps``, each once."""
    files = re.findall(r"/.*/lib(?:gomp|omp|iomp5)\b.*\.so.*", maps)
    return list(dict.fromkeys(files))


def _huge_pages(advice: list[str]) -> Facts:
    enabled = _choice(_HUGE_PAGES / "enabled")
    if enabled == "never":
        advice.append(
            "Large outputs are slower without huge pages; as root:"
            f" echo madvise > {_HUGE_PAGES / 'enabled'}"
        )
    defrag = _choice(_HUGE_PAGES / "defrag")
    return {
        "enabled": f"{enabled}: {_ENABLED.get(enabled, '?')}",
        "defrag": f"{defrag}: {_DEFRAG.get(defrag, '?')}",
    }


def _choice(file: Path) -> str:
    """The choice made in a line such as ``always [madvise] never``."""
    try:
        text = file.read_text()
    except OSError:
        text = ""
    match = re.search(r"\[(.+)\]", text)
    return match[1] if match else "unknown"


def _cuda(advice: list[str]) -> Facts:
    build, driver = _C.build_info(), driver_version()
    archs, toolkit = build["cuda_archs"], build["cuda_toolkit"]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(i) for i in range(gpus)]
    if found and not archs:
        advice.append(
            "There is a GPU, but no CUDA in this build: reinstall with MBKERN_CUDA=ON,"
            " which says what is missing."
        )
    if not found and Path("/dev/nvidia0").exists():
        advice.append(
            "There is an NVIDIA device, but torch sees none: look at the driver, at"
            " CUDA_VISIBLE_DEVICES, and whether torch is a CUDA build."
        )
    for gpu in found if archs else []:
        if not runs_on(archs, (gpu.major, gpu.minor)):
            sm = f"{gpu.major}{gpu.minor}"
            advice.append(f"This build does not run on {gpu.name}: reinstall with CUDAARCHS={sm}.")
    if driver is not None and toolkit and driver[0] < int(toolkit.split(".")[0]):
        advice.append(
            f"The driver serves CUDA {driver[0]}.{driver[1]}, this build is of {toolkit}: update"
            f" the driver, or reinstall with a toolkit of CUDA {driver[0]}."
        )
    if _C.cuda_is_shim():
        advice.append("This build is for tests: CUDA's kernels run on the CPU, slowly.")
    return {
        "gpus": [f"{g.name} (sm {g.major}{g.minor}, {g.total_memory >> 30} GiB)" for g in found]
        or "none visible",
        "this build": f"for sm {archs}, by CUDA {toolkit}"
        if toolkit
        else "CPU only (no nvcc, or MBKERN_CUDA=OFF)",
        "driver": f"serves CUDA {driver[0]}.{driver[1]}" if driver else "none",
        "torch build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only",
    }


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver serves; None if there is no driver.

    It runs machine code of older toolkits, and of newer ones of the same major version.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``archs``, as CMake spells them, runs on a GPU.

    Machine code (not in ``90-virtual``) runs on its major version, from its minor version on;
    PTX (not in ``90-real``) on everything from its version on. Either of ``90a`` runs on 9.0 alone,
    of ``100f`` on that major version. Of a word such as ``native`` nothing is known: so it does.
    """
    for arch in archs.split():
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
        if match is None:
            return True
        built = (int(match[1]), int(match[2]))
        same_major = built[0] == capability[0]
        newer = built <= capability if match[3] != "a" else built == capability
        if newer and (same_major or not (match[3] or match[4] == "-real")):
            return True
    return False


def report() -> dict[str, Facts | list[str]]:
    """All sections by name, and the warnings last."""
    advice: list[str] = []
    return {
        "versions": _versions(advice),
        "instruction set": _isa(advice),
        "threads": _threads(advice),
        "huge pages": _huge_pages(advice),
        "cuda": _cuda(advice),
        "warnings": advice,
    }


def _print(name: str, section: Facts | list[str]) -> None:
    print(name)
    if isinstance(section, list):
        print("\n".join(f"  - {text}" for text in section) or "  none")
        return
    for key, value in section.items():
        text = ", ".join(value) or "none" if isinstance(value, list) else value
        print(f"  {key:<12} {text}")


def run(as_json: bool = False) -> int:
    """Print the report. The status is 0: a warning is advice, not a failure."""
    sections = report()
    if as_json:
        print(json.dumps(sections, indent=2))
    else:
        for name, section in sections.items():
            _print(name, section)
    return 0
