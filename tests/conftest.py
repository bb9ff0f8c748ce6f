"""What tests share."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator

import pytest
import torch
import torch.nn.functional as F

from mbkern import _C, _launch, _patched


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and test cases, a million objects, stay: a collection need not go through them.

    That takes 0.3 s, a plan's measurement nine of them. What tests make is collected as ever.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """In the build for tests, CUDA's kernels take all tensors, but in tests of the CPU's own."""
    _C.cuda_switch_shim(item.get_closest_marker("cpu") is None)


@pytest.fixture
def gpu() -> torch.device:
    """The GPU, for what only a GPU shows."""
    if _C.cuda_is_shim():
        pytest.skip("NOT CHECKED: this build runs CUDA's kernels on the CPU")
    if not _C.cuda_built():
        pytest.skip("NOT CHECKED: this build has kernels for CPU tensors only")
    if not torch.cuda.is_available():
        pytest.skip("NOT CHECKED: torch sees no GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where CUDA's kernels run: the GPU, or in the build for tests the CPU."""
    if _C.cuda_is_shim():
        return torch.device("cpu")
    found: torch.device = request.getfixturevalue("gpu")
    return found


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each instruction set of this machine."""
    before = _C.isa()
    _C.set_isa(request.param)
    assert _C.isa() == request.param
    yield request.param
    assert _C.isa() == request.param, "the test has changed the instruction set"
    _C.set_isa(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small tensors: a second thread only waits, and slows torch down fivefold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def restored() -> Iterator[None]:
    """The instruction set and the number of threads, for tests that go through all of them."""
    isa, threads = _C.isa(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture(params=["exchange table", "attributes"])
def reader(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each way to read tensors that this torch offers."""
    exchange = request.param == "exchange table"
    if exchange and not _launch.has_exchange_table:
        pytest.skip("this torch has no exchange table")
    assert _launch.read_torch(exchange=exchange) == exchange
    yield request.param
    _launch.read_torch()


@pytest.fixture
def patches_taken_back() -> Iterator[None]:
    """After the test torch's functions are torch's again, in every thread."""
    assert _patched._Process.users == 0
    originals = {name: getattr(F, name) for name in ("cross_entropy", "mse_loss")}
    yield
    for name, original in originals.items():
        assert getattr(F, name) is original
    assert not _patched._thread.on
    assert not _patched._Process.on
    assert _patched._Process.users == 0
    assert _patched._thread.reports == _patched._thread.modes == ()
