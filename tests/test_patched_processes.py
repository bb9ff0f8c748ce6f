"""patched() and other processes: which are inside, and that none waits for a thread it lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(sys.platform == "win32", reason="NOT CHECKED: no fork here"),
]

FORK = """
import os, signal, sys, threading, time, warnings
import torch, mbkern
import torch.nn.functional as F
from mbkern import _patched

warnings.simplefilter("ignore")  # of threads beside a fork: that is what is tried
held = threading.Event()

def first():  # a block that is being entered for the first time
    with _patched._lock:
        held.set()
        time.sleep(1)

thread = threading.Thread(target=first)
thread.start()
held.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    with mbkern.patched(report=True) as report:
        F.mse_loss(torch.ones(3), torch.zeros(3))
    os._exit(0 if report.taken["mse_loss"] == 1 else 1)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""

WORKERS = """
import sys
import torch, mbkern
import torch.nn.functional as F

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        with_grad = F.mse_loss(torch.ones(3, requires_grad=True), torch.zeros(3)).grad_fn
        return "torch" if with_grad.name().startswith("MseLoss") else "mbkern"

def patch(_):
    mbkern.patch()

def computed_by(context, init=None):
    loader = torch.utils.data.DataLoader(
        Data(), batch_size=None, num_workers=1, multiprocessing_context=context, worker_init_fn=init
    )
    return list(loader)[0]

if __name__ == "__main__":
    with mbkern.patched():
        found = [computed_by("fork"), computed_by("spawn"), computed_by("spawn", patch)]
    print(*found)
"""


def run(program: str, path: Path) -> subprocess.CompletedProcess[str]:
    path.write_text(program)  # spawned processes import it
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=300
    )


def test_a_child_does_not_wait_for_a_thread_that_it_lacks(tmp_path: Path) -> None:
    done = run(FORK, tmp_path / "fork.py")
    assert done.returncode == 0, done.stderr


def test_forked_workers_are_inside_and_spawned_ones_are_not(
    tmp_path: Path,
) -> None:
    done = run(WORKERS, tmp_path / "workers.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mbkern", "torch", "mbkern"]
