"""Build and install with this Python, offline; then what was built, and its machine code."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

from gpu.stage import FAILED, NOT_RUN, PASSED, ROOT, Clock, Report, python, run


def check(clock: Clock) -> Report:
    """The build must have code for the GPU here, and its kernels must be faultless."""
    command = python("-m", "pip", "install", "--no-deps", ".")
    if find_spec("scikit_build_core") and find_spec("pybind11"):
        command.insert(4, "--no-build-isolation")  # nothing is fetched
    done = run(command, clock.left(), {"MBKERN_CUDA": "ON"})
    details: dict[str, Any] = {"seconds": round(done.seconds)}
    print(f"build and install: {done.seconds:.0f} s")
    if not done.good:
        print(done.ending(40))
        return Report(FAILED, done.failure(), details)

    doctor = run(python("-m", "mbkern", "doctor", "--json"), clock.left())
    if not doctor.good:
        return Report(FAILED, f"doctor: {doctor.failure()}", details)
    report = json.loads(doctor.output[doctor.output.index("{") :])
    details["doctor"] = report
    print(json.dumps(report["cuda"], indent=1))
    wrong = [text for text in report["warnings"] if "GPU" in text]

    code = run(python(ROOT / "tests/machine_code.py"), clock.left())
    details["machine code"] = code.ending()
    print(code.ending(3))
    if "NoDisassembler" in code.output:
        return Report(FAILED if wrong else NOT_RUN, "; ".join([*wrong, code.ending()]), details)
    if not code.good:
        wrong.append(f"machine code: {code.failure()}")
    return Report(FAILED if wrong else PASSED, "; ".join(wrong), details)
