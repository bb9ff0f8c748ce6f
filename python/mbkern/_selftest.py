"""``python -m mbkern selftest``: do the kernels give the golden bits on this machine?

Each case runs on every instruction set, with several thread counts and cuts of the batch, and on
CUDA. All runs must give the same bytes, and their digest must be the one that ships in
``_golden.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbkern import _C, _cuda
from mbkern import _selftest_head as head
from mbkern import _selftest_lists as lists
from mbkern._cli import INTERRUPTED
from mbkern._loss_and_grad import loss_and_grad
from mbkern._loss_sum import LossSum
from mbkern._losses import losses
from mbkern._selftest_cases import (
    FORMATS,
    Case,
    Outputs,
    cases,
    compute,
    cuts,
    make,
    numbers,
    patterns,
)
from mbkern._selftest_tiers import Tier, find_tiers
from mbkern._version import NUMERICS_VERSION, __version__

GOLDEN = Path(__file__).with_name("_golden.json")
TIERS = ("scalar", "avx2", "avx512")
BAD_TARGETS = "bad targets"  # of the CPU, which refuses them
Golden = dict[str, dict[str, dict[str, str]]]  # kernel, dtype, case: digest
Data = dict[str, Any]  # of a case, made on the CPU
Cuts = dict[str, list[slice]]
Run = Callable[[Case, Any, list[slice]], Outputs]


@dataclass
class Finding:
    """What the runs of one case gave: the digest of the first, and what was wrong.

    Without a digest, the case knows by itself what is right.
    """

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


def check(case: Case, data: Data, run: Run, cuts: Cuts, tiers: list[Tier]) -> Finding:
    """Run a case on all tiers, and in all cuts."""
    finding = Finding(case.name)
    reference: Outputs | None = None
    for tier in tiers:
        tier.enter()
        moved = moved_to(tier, data)
        for cut, pieces in cuts.items():
            outputs = {name: tensor.cpu() for name, tensor in run(case, moved, pieces).items()}
            finding.runs += 1
            if reference is None:
                reference, finding.digest = outputs, digest(outputs)
            elif found := difference(outputs, reference):
                finding.problem = f"{tier.name}, {cut}: {found}"
                return finding
    return finding


def moved_to(tier: Tier, data: Any) -> Any:
    """A case's inputs and options, in dicts and lists, in the memory of a tier."""
    if isinstance(data, dict):
        return {name: moved_to(tier, value) for name, value in data.items()}
    if isinstance(data, list):
        return [moved_to(tier, value) for value in data]
    return tier.move(data) if isinstance(data, Tensor) else data


def bad_classes() -> Iterator[tuple[int, int, Tensor]]:
    """Numbers of columns, class indices out of range, and targets that hold them at 200."""
    for columns in (7, 700):
        for bad in (-1, columns, 2**31, 2**32 + 1, 2**63 - 1, -(2**63)):
            target = torch.zeros(301, dtype=torch.int64)
            target[200] = bad
            yield columns, bad, target


def check_bad_targets(dtype: torch.dtype, tiers: list[Tier]) -> Finding:
    """On the CPU, a class index out of range must raise before anything is written."""
    finding = Finding(BAD_TARGETS)
    for isa, tier in {tier.isa: tier for tier in tiers}.items():
        tier.enter()
        for columns, bad, target in bad_classes():
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
    finding.digest = digest(
        {"refusals": torch.tensor([finding.runs // len({tier.isa for tier in tiers})])}
    )
    return finding


def check_bad_targets_on_cuda(dtype: torch.dtype, tier: Tier) -> Finding:
    """On CUDA it must make its row NaN, leave all other rows alone, and be noted."""
    finding = Finding("bad targets on CUDA")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    tier.enter()
    _cuda.take_target_errors()
    for columns, bad, target in bad_classes():
        x = tier.move(numbers(1, (301, columns), dtype))
        totals = [LossSum(x.device), LossSum(x.device)]
        outputs = [
            loss_and_grad(
                "cross_entropy", x, tier.move(t), reduction="none", loss_dtype=wide,
                loss_sum=None if dtype is torch.float64 else total,
            )
            for t, total in zip((target.clamp(0, 0), target), totals, strict=True)
        ]  # fmt: skip
        want, got = (
            {"loss": loss.cpu(), "gradient": grad.cpu(), "exact sum": total.state.cpu()}
            for (loss, grad), total in zip(outputs, totals, strict=True)
        )
        for name in ("loss", "gradient"):
            want[name][200] = torch.nan
        if dtype is not torch.float64:
            want["exact sum"] = LossSum().add(want["loss"]).state
        finding.runs += 1
        if found := difference(got, want):
            finding.problem = f"class {bad} of {columns}: {found}"
        noted = _cuda.take_target_errors()
        if noted != _cuda.TargetErrors(1, 200, bad, columns):
            finding.problem = f"class {bad} of {columns}: the device has noted {noted}"
    return finding


def check_elementary(name: str, double: bool, tiers: list[Tier]) -> Finding:
    """An elementary function over fixed bit patterns on all instruction sets, and on CUDA."""
    x, finding = patterns(double), Finding("bit patterns")
    if name == "exp_nonpositive":
        x = np.copysign(x, -1)  # NaNs, too
    reference: Outputs | None = None
    for tier in {tier.isa: tier for tier in tiers}.values():
        tier.enter()
        outputs = {name: tier.elementary(name, x)}
        finding.runs += 1
        if reference is None:
            reference, finding.digest = outputs, digest(outputs)
        elif found := difference(outputs, reference):
            finding.problem = f"{tier.isa or tier.name}: {found}"
            break
    return finding


def findings(tiers: list[Tier]) -> Iterator[tuple[str, str, list[Finding]]]:
    """(kernel, dtype, what was found) for all kernels and dtypes."""
    on_cpu = [tier for tier in tiers if not tier.on_cuda]
    for loss in losses():
        for dtype in FORMATS:
            found = [
                check(
                    case, make(loss.name, case, dtype), partial(compute, loss.name), cuts(case),
                    tiers,
                )
                for case in cases(loss.name, dtype)
            ]  # fmt: skip
            if loss.name == "cross_entropy" and on_cpu:
                found.append(check_bad_targets(dtype, on_cpu))
            if loss.name == "cross_entropy" and len(on_cpu) < len(tiers):
                found.append(check_bad_targets_on_cuda(dtype, tiers[-1]))
            yield loss.name, str(dtype).removeprefix("torch."), found
    others: tuple[tuple[str, Any, list[Case]], ...] = (
        ("linear_cross_entropy", head, head.HEADS),
        ("accumulation", lists, lists.LISTS),
    )
    for name, module, known in others:
        for dtype in FORMATS:
            found = [
                check(case, module.make(case, dtype), module.compute, module.cuts(case), tiers)
                for case in known
            ]
            yield name, str(dtype).removeprefix("torch."), found
    for name in _C.elementary_functions():
        for double in (False, True):
            yield name, "float64" if double else "float32", [check_elementary(name, double, tiers)]


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
            if f.digest and not f.problem and f.digest != golden.get(f.case):
                agree = f"all {f.runs} runs agree on {f.digest}"
                problems.append(f"{f.case}: {agree}, golden is {golden.get(f.case, 'missing')}")
        missing = set(golden) - {f.case for f in found}
        problems += [f"{case}: golden, but not a case" for case in sorted(missing)]
    return problems


def run(write_golden: bool = False, device: str | None = None) -> int:
    """Check everything, print a table, and return the exit status."""
    try:
        isa = _C.isa()
    except ValueError as error:  # MBKERN_ISA
        print(error, file=sys.stderr)
        return 1
    threads, shim = torch.get_num_threads(), _C.cuda_shim_is_on()
    found = find_tiers(device, thread_counts)
    if not found:
        print("no GPU that torch sees, or no kernels for CUDA in this build: nothing checked")
        return 1
    try:
        return _run(write_golden, found)
    except KeyboardInterrupt:
        print("\ninterrupted")
        return INTERRUPTED
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)
        _C.cuda_switch_shim(shim)


def _run(write_golden: bool, tiers: list[Tier]) -> int:
    start = time.perf_counter()
    golden, failure = ({}, "") if write_golden else read_golden()
    absent = [name for name in TIERS if name not in _C.isas()]
    print(f"mbkern {__version__}, numerics version {NUMERICS_VERSION}")
    print(f"instruction sets: {', '.join(_C.isas())}", end="; ")
    print(f"not available here: {', '.join(absent) or 'none'}")
    print(f"threads: {', '.join(map(str, thread_counts()))}", end="")
    print("" if _C.has_openmp() else " asked for, but there is no OpenMP: all runs are serial")
    print(f"run on: {', '.join(dict.fromkeys(tier.isa or tier.name for tier in tiers))}\n")
    print(f"{'kernel':<20} {'dtype':<9} {'cases':>5} {'runs':>5}  result")
    computed: Golden = {}
    bad = runs = 0
    for kernel, dtype, found in findings(tiers):
        expected = None
        if not write_golden and not failure:
            expected = dict(golden.get(kernel, {}).get(dtype, {}))
            if all(tier.on_cuda for tier in tiers):
                expected.pop(BAD_TARGETS, None)
        problems = compare(found, expected)
        computed.setdefault(kernel, {})[dtype] = {f.case: f.digest for f in found if f.digest}
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
        print(f"all runs agree; written: {GOLDEN}")
    else:
        print("every bit as it should be")
    return 0
