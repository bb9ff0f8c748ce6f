"""``python -m mbkern selftest``: do the kernels give the golden bits on this machine?

Each case runs on every instruction set, with several thread counts and cuts of the batch. All runs
must give the same bytes, and their digest must be the one that ships in ``_golden.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbkern import _C
from mbkern._loss_and_grad import loss_and_grad
from mbkern._loss_sum import LossSum
from mbkern._losses import losses
from mbkern._selftest_cases import FORMATS, Case, Outputs, cases, compute, cuts, hashes, make
from mbkern._version import NUMERICS_VERSION, __version__

GOLDEN = Path(__file__).with_name("_golden.json")
TIERS = ("scalar", "avx2", "avx512")
Golden = dict[str, dict[str, dict[str, str]]]  # kernel, dtype, case: digest


@dataclass
class Finding:
    """What the runs of one case gave: the digest of the first, and what was wrong."""

    case: str
    digest: str = ""
    runs: int = 0
    problem: str = ""


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor's elements, in the order of its indices."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().reshape(-1).view(integer)


def digest(outputs: Outputs) -> str:
    """128 bits of the SHA-256 of all bytes."""
    sha = hashlib.sha256()
    for tensor in outputs.values():
        sha.update(as_integers(tensor).numpy().tobytes())
    return sha.hexdigest()[:32]


def difference(outputs: Outputs, reference: Outputs) -> str:
    """The first element that differs, in words, or an empty string."""
    for name, tensor in outputs.items():
        a, b = as_integers(tensor), as_integers(reference[name])
        if not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            mask = (1 << 8 * a.element_size()) - 1
            return f"{name}[{at}] is {int(a[at]) & mask:#x}, not {int(b[at]) & mask:#x}"
    return ""


def thread_counts() -> list[int]:
    """One, two, three, and as many as there are CPUs."""
    return sorted({1, 2, 3, len(os.sched_getaffinity(0))})


def check(kernel: str, case: Case, dtype: torch.dtype) -> Finding:
    """Run a case on all instruction sets, thread counts and cuts."""
    data, finding = make(kernel, case, dtype), Finding(case.name)
    reference: Outputs | None = None
    for isa in _C.isas():
        _C.set_isa(isa)
        for threads in thread_counts():
            torch.set_num_threads(threads)
            for cut, pieces in cuts(case).items():
                outputs = compute(kernel, case, data, pieces)
                finding.runs += 1
                if reference is None:
                    reference, finding.digest = outputs, digest(outputs)
                elif found := difference(outputs, reference):
                    finding.problem = f"{isa}, {threads} threads, {cut}: {found}"
                    return finding
    return finding


def check_bad_targets(dtype: torch.dtype) -> Finding:
    """A class index out of range must raise, whatever it is, before anything is written."""
    finding = Finding("bad targets")
    for isa in _C.isas():
        _C.set_isa(isa)
        for columns in (7, 700):
            for bad in (-1, columns, 2**31, 2**32 + 1, 2**63 - 1, -(2**63)):
                target = torch.zeros(301, dtype=torch.int64)
                target[200] = bad
                x = torch.zeros(301, columns, dtype=dtype)
                grad = torch.full_like(x, 7.0)
                total = None if dtype is torch.float64 else LossSum()
                finding.runs += 1
                try:
                    loss_and_grad("cross_entropy", x, target, grad_out=grad, loss_sum=total)
                    finding.problem = f"{isa}: class {bad} of {columns} was not refused"
                except IndexError as error:
                    if str(bad) not in str(error) or "200" not in str(error):
                        finding.problem = f"{isa}: class {bad} at 200 is not named: {error}"
                if bool((grad != 7.0).any()) or (total is not None and bool(total.state.any())):
                    finding.problem = f"{isa}: class {bad} of {columns}: outputs were written"
    finding.digest = digest({"refusals": torch.tensor([finding.runs // len(_C.isas())])})
    return finding


def patterns(double: bool) -> NDArray[Any]:
    """Numbers of every sign and exponent, infinities and NaNs, half of them not far from one."""
    n, odd = 1 << 18, 12345  # the last vectors of every width are partial
    bits = 64 if double else 32
    exponent = 11 if double else 8
    everywhere = hashes(20, n + odd) >> np.uint64(64 - bits)
    mantissa = np.uint64((1 << (bits - 1 - exponent)) - 1)
    one = (1 << (exponent - 1)) - 1
    near = (hashes(21, n) % np.uint64(24) + np.uint64(one - 16)) << np.uint64(bits - 1 - exponent)
    sign = (everywhere[:n] >> np.uint64(bits - 1)) << np.uint64(bits - 1)
    both = np.concatenate((everywhere, (everywhere[:n] & mantissa) | near | sign))
    edges = np.array([0, 1, 2], dtype=np.uint64)
    top = np.uint64(((1 << exponent) - 1) << (bits - 1 - exponent))
    both = np.concatenate((both, edges, top - edges, top + edges))
    return both.view(np.float64) if double else both.astype(np.uint32).view(np.float32)


def check_elementary(name: str, double: bool) -> Finding:
    """An elementary function over fixed bit patterns on all instruction sets."""
    x, finding = patterns(double), Finding("bit patterns")
    if name == "exp_nonpositive":
        x = np.copysign(x, -1)  # NaNs, too
    reference: Outputs | None = None
    for isa in _C.isas():
        y = np.empty_like(x)
        _C.elementary(isa, name, double, x.ctypes.data, y.ctypes.data, len(x))
        outputs = {name: torch.from_numpy(y)}
        finding.runs += 1
        if reference is None:
            reference, finding.digest = outputs, digest(outputs)
        elif found := difference(outputs, reference):
            finding.problem = f"{isa}: {found}"
            break
    return finding


def findings() -> Iterator[tuple[str, str, list[Finding]]]:
    """(kernel, dtype, what was found) for all kernels and dtypes."""
    for loss in losses():
        for dtype in FORMATS:
            found = [check(loss.name, case, dtype) for case in cases(loss.name, dtype)]
            if loss.name == "cross_entropy":
                found.append(check_bad_targets(dtype))
            yield loss.name, str(dtype).removeprefix("torch."), found
    for name in _C.elementary_functions():
        for double in (False, True):
            yield name, "float64" if double else "float32", [check_elementary(name, double)]


def read_golden() -> tuple[Golden, str]:
    """The digests that ship with the package, and what is wrong with them."""
    try:
        content = json.loads(GOLDEN.read_text())
        version, digests = content["numerics_version"], content["digests"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"the golden digests cannot be read: {error!r}"
    if version != NUMERICS_VERSION:
        return {}, (
            f"the golden digests are of numerics version {version}, this mbkern is of version "
            f"{NUMERICS_VERSION}: their bits differ by design; reinstall mbkern"
        )
    return digests, ""


def compare(found: list[Finding], golden: dict[str, str] | None) -> list[str]:
    """What is wrong with the runs of a kernel and dtype; their digests are checked if given."""
    problems = [f"{f.case}: {f.problem}" for f in found if f.problem]
    if golden is not None:
        for f in found:
            if not f.problem and f.digest != golden.get(f.case):
                agree = f"all {f.runs} runs agree on {f.digest}"
                problems.append(f"{f.case}: {agree}, golden is {golden.get(f.case, 'missing')}")
        missing = set(golden) - {f.case for f in found}
        problems += [f"{case}: golden, but not a case" for case in sorted(missing)]
    return problems


def run(write_golden: bool = False) -> int:
    """Check everything, print a table, and return the exit status."""
    isa, threads = _C.isa(), torch.get_num_threads()
    try:
        return _run(write_golden)
    except KeyboardInterrupt:
        print("\ninterrupted")
        return 130
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)


def _run(write_golden: bool) -> int:
    start = time.perf_counter()
    golden, failure = ({}, "") if write_golden else read_golden()
    absent = [name for name in TIERS if name not in _C.isas()]
    print(f"mbkern {__version__}, numerics version {NUMERICS_VERSION}")
    print(f"instruction sets: {', '.join(_C.isas())}", end="; ")
    print(f"not available here: {', '.join(absent) or 'none'}")
    print(f"threads: {', '.join(map(str, thread_counts()))}", end="")
    print("\n" if _C.has_openmp() else " asked for, but there is no OpenMP: all runs are serial\n")
    print(f"{'kernel':<20} {'dtype':<9} {'cases':>5} {'runs':>5}  result")
    computed: Golden = {}
    bad = runs = 0
    for kernel, dtype, found in findings():
        expected = None if write_golden or failure else golden.get(kernel, {}).get(dtype, {})
        problems = compare(found, expected)
        computed.setdefault(kernel, {})[dtype] = {f.case: f.digest for f in found}
        bad, runs = bad + bool(problems), runs + sum(f.runs for f in found)
        good = "agree" if expected is None else "ok"
        print(f"{kernel:<20} {dtype:<9} {len(found):>5} {sum(f.runs for f in found):>5}", end="  ")
        print("DIFFERS" if problems else good, flush=True)
        for problem in problems:
            print(f"  {problem}")
    stale = [kernel for kernel in golden if kernel not in computed]
    if stale:
        failure = f"golden kernels that are not in this build: {', '.join(stale)}"
    print(f"\n{runs} runs in {time.perf_counter() - start:.0f} s", end=": ")
    if bad or failure:
        verdict = f"{bad} of the rows above differ" if bad else "all runs agree"
        print(f"{verdict}; {failure}" if failure else verdict)
        return 1
    if write_golden:
        content = {"numerics_version": NUMERICS_VERSION, "digests": computed}
        GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
        print(f"all runs agree; {GOLDEN.name} written")
    else:
        print("every bit as it should be")
    return 0
