"""CUDA's kernels through the whole of mbkern: the CPU's bits, and the manners of a CUDA library.

In the build for tests, where CUDA's kernels run on the CPU, so does what needs no GPU by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, REDUCTIONS, Case, Sample, Variation
from torch import Tensor

import mbkern
from mbkern import _C, _selftest
from mbkern import _launch_product as products
from mbkern import functional as F

pytestmark = pytest.mark.gpu
INDEX = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def move(value: Any, device: torch.device) -> Any:
    """A copy of a tensor in a device's memory, with the same strides and gaps."""
    if not isinstance(value, Tensor):
        return value
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    copy = memory.to(device, copy=True)
    return copy.as_strided(value.shape, value.stride(), value.storage_offset())


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """The CPU's own kernels for CPU tensors, also in the build for tests."""
    before = _C.cuda_shim_is_on()
    _C.cuda_switch_shim(False)
    yield
    _C.cuda_switch_shim(before)


def same(got: dict[str, Tensor], want: dict[str, Tensor], label: str) -> None:
    """All dtypes and bits agree."""
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype is want[name].dtype, f"{label}: {name}"
        assert tensor.shape == want[name].shape, f"{label}: {name}"
    found = _selftest.difference(got, want)
    assert not found, f"{label}: {found}"


Run = Callable[[torch.device], dict[str, Tensor]]


def compare(run: Run, device: torch.device, label: str) -> dict[str, Tensor]:
    """Run on the CPU and on the device; the results must be of the same bits, and are returned."""
    with cpu_kernels():
        want = run(torch.device("cpu"))
    got = {}
    for name, tensor in run(device).items():
        assert tensor.device.type == device.type, f"{label}: {name} is on {tensor.device}"
        got[name] = tensor.cpu()
    same(got, want, label)
    return want


def training(case: Case, sample: Sample, **options: Any) -> Run:
    """The loss and the gradients, for an incoming gradient that is not one."""

    def run(device: torch.device) -> dict[str, Tensor]:
        there = {k: move(v, device) for k, v in sample.options.items()}
        moved = Sample(move(sample.input, device), move(sample.target, device), there)
        leaves = {
            name: tensor.requires_grad_()
            for name, tensor in case.tensors(moved).items()
            if name in case.differentiable
        }
        arguments = there | {k: move(v, device) for k, v in options.items()}
        loss = case.function(moved.input, moved.target, **arguments)
        incoming = torch.linspace(-1.5, 2.0, max(loss.numel(), 2))[: loss.numel()]
        loss.backward(incoming.reshape(loss.shape).to(loss))
        found = {"loss": loss.detach()} | {n: leaf.grad for n, leaf in leaves.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    return run


VARIED = [
    pytest.param(case, variation, id=f"{case.name}, {variation.name}")
    for case in CASES
    for variation in case.variations
]


@pytest.mark.parametrize(("case", "variation"), VARIED)
def test_the_bits_are_the_cpus(case: Case, variation: Variation, device: torch.device) -> None:
    """Every loss, option, dtype and reduction, with backward."""
    for dtype in DTYPES:
        for shape in ((9, 70), (3, 1030), (2, 5, 3, 4)):
            sample = case.sample(shape, dtype, variation)
            for reduction in REDUCTIONS:
                run = training(case, sample, reduction=reduction)
                compare(run, device, f"{dtype}, {shape}, {reduction}")


@pytest.mark.parametrize("index", INDEX, ids=str)
def test_index_types(index: torch.dtype, device: torch.device) -> None:
    for columns in (7, 90, 3000):
        x = torch.randn(33, columns)
        target = torch.randint(min(columns, 100), (33,)).to(index)
        run = training(CASES[0], Sample(x, target, {}))
        compare(run, device, f"{columns} columns")


def layouts(shape: tuple[int, ...], make: Callable[..., Tensor] = torch.randn) -> dict[str, Tensor]:
    plain = make(shape)
    found = {
        "by columns": plain.transpose(0, 1).contiguous().transpose(0, 1),
        "gaps": make(shape[0], shape[1] + 3, *shape[2:])[:, :-3],
        "offset": make(plain.numel() + 1)[1:].view(shape),
        "every other item": make(2 * shape[0], *shape[1:])[::2],
        "every other column": make(shape[0], 2 * shape[1], *shape[2:])[:, ::2],
        "one row for all": make(1, *shape[1:]).expand(shape),
    }
    if len(shape) == 4:
        found["channels last"] = plain.contiguous(memory_format=torch.channels_last)
        found["does not merge"] = plain.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", [(11, 130), (3, 21, 5, 7), (2, 700, 3, 2)], ids=str)
def test_layouts(case: Case, shape: tuple[int, ...], device: torch.device) -> None:
    for dtype in DTYPES:
        sample = case.sample(shape, dtype)
        make = torch.rand if case.name == "binary_cross_entropy" else torch.randn
        for name, input in layouts(shape, make).items():
            strided = input.to(dtype)  # keeps the strides of what fills its memory
            for reduction in ("none", "mean"):
                run = training(case, Sample(strided, sample.target, {}), reduction=reduction)
                compare(run, device, f"{dtype}, {name}, {reduction}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 2), (1, 1), (0,), (4, 5, 0)], ids=str)
def test_empty_and_small(case: Case, shape: tuple[int, ...], device: torch.device) -> None:
    if case.has_rows and shape[1 if len(shape) > 1 else 0] == 0:
        pytest.skip("no classes")
    sample = case.sample(shape, torch.float32)
    for reduction in REDUCTIONS:
        compare(training(case, sample, reduction=reduction), device, reduction)


def one_pass(name: str, x: Tensor, other: Tensor, how: str, /, **options: Any) -> Run:
    """loss_and_grad in one of its ways, with the exact sum of the losses."""

    def run(device: torch.device) -> dict[str, Tensor]:
        input, out = move(x, device), None
        if how == "in place":
            out = input
        elif how == "accumulated":
            wide = torch.float64 if x.dtype is torch.float64 else torch.float32
            out = move(torch.linspace(-2, 2, x.numel(), dtype=wide).view(x.shape), device)
        moved = {k: move(v, device) for k, v in options.items()}
        total = None if x.dtype is torch.float64 else mbkern.LossSum(device)
        loss, grad = mbkern.loss_and_grad(
            name, input, move(other, device), grad_out=out, loss_sum=total,
            accumulate=how == "accumulated", **moved,
        )  # fmt: skip
        assert out is None or grad is out
        found = {"loss": loss, "gradient": grad}
        if total is not None:
            found["exact sum"] = total.state
        return found

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("how", ["fresh", "in place", "accumulated"])
def test_loss_and_grad(case: Case, how: str, device: torch.device) -> None:
    for dtype in DTYPES:
        for shape in ((21, 33), (5, 3001)):
            sample = case.sample(shape, dtype)
            for options in (
                {"reduction": "sum"},
                {"reduction": "none", "loss_dtype": torch.float32},
                {"denominator": 7.0, "scale": 0.3},
                {"denominator": torch.tensor(7), "scale": torch.tensor(0.3)},
            ):
                options = sample.options | options
                run = one_pass(case.name, sample.input, sample.target, how, **options)
                compare(run, device, f"{dtype}, {shape}, {list(options)}")


def test_scalars_of_every_kind(device: torch.device) -> None:
    """A number, a tensor on the CPU, a tensor on the device: of any dtype, the same bits."""
    x, target = torch.randn(6, 50, device=device), torch.arange(6, device=device)
    kinds: list[Any] = [3, 3.0]
    for dtype in (*DTYPES, torch.int32):
        three = torch.tensor(3, dtype=dtype)
        kinds += [three, three.to(device), three.to(device).expand(2)[1]]
    found = [
        mbkern.loss_and_grad("cross_entropy", x, target, denominator=d, scale=s)
        for d, s in [(kind, kind) for kind in kinds]
    ]
    for loss, grad in found:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_loss_sum(device: torch.device) -> None:
    values = torch.randn(5000) * torch.logspace(-30, 30, 5000)
    with cpu_kernels():
        want = mbkern.LossSum().add(values).add(values.to(torch.bfloat16))
    halves = [mbkern.LossSum(device), mbkern.LossSum(device)]
    halves[0].add(values[:1234].to(device)).add(values[1234:].to(device))
    halves[1].add(values.to(torch.bfloat16).to(device))
    total = halves[0].merge(halves[1])
    assert torch.equal(total.state.cpu(), want.state)
    for dtype in DTYPES:
        for denominator in (None, 77.0, torch.tensor(77, device=device)):
            got = total.value(denominator, dtype=dtype)
            host = 77.0 if denominator is not None else None
            with cpu_kernels():
                exact = want.value(host, dtype=dtype)
            assert got.device.type == device.type
            assert got.dtype is dtype
            assert torch.equal(got.cpu(), exact)
    loaded = mbkern.LossSum(device)
    loaded.load_state_dict(total.state_dict())
    assert torch.equal(loaded.state, total.state)
    assert not loaded.reset().state.any()
    assert repr(loaded) == f"LossSum(0.0, device={str(total.state.device)!r})"


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 4.0, 0.3, torch.inf])
def test_hints(dtype: torch.dtype, factor: float, device: torch.device) -> None:
    """A hint of the incoming gradient, right or wrong, as a number or on the device."""
    sample = CASES[0].sample((7, 90), dtype)
    sample.target[2] = -100

    def run(on: torch.device) -> dict[str, Tensor]:
        found = {}
        for name, hint in {"number": 4.0, "tensor": torch.tensor(4.0, device=on)}.items():
            x = move(sample.input, on).requires_grad_()
            F.cross_entropy(x, move(sample.target, on), grad_scale=hint).backward(
                torch.tensor(factor, dtype=dtype, device=on)
            )
            assert x.grad is not None
            found[name] = x.grad
            if isinstance(hint, Tensor):
                hint.mul_(2)  # as GradScaler does, later
        return found

    found = compare(run, device, "hint")
    same({"": found["tensor"]}, {"": found["number"]}, "tensor against number")
    assert not found["number"][2].any(), "an ignored item's gradient is 0"


@pytest.mark.parametrize("layout", ["dense", "columns", "gaps"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype: torch.dtype, reduction: str, layout: str, device: torch.device) -> None:
    """The gradient over the logits, where they lie, formed in forward or in backward; the version
    is bumped."""
    memory = {"dense": (8, 300), "columns": (300, 8), "gaps": (8, 304)}[layout]
    values = torch.randn(memory).to(dtype)

    def run(on: torch.device, inplace: bool = True) -> dict[str, Tensor]:
        leaf = move(values, on).requires_grad_()
        base = leaf * 1.0
        x = {"dense": base, "columns": base.t(), "gaps": base[:, 2:302]}[layout]
        version = x._version
        target = torch.arange(8, device=on) * 37
        loss = F.cross_entropy(x, target, reduction=reduction, inplace=inplace)
        loss.backward(torch.full_like(loss, 2.5))
        assert (x._version > version) == inplace
        assert leaf.grad is not None
        found = {"loss": loss.detach(), "gradient": leaf.grad}
        if inplace:
            found["logits"] = base.detach()
        return found

    got = run(device)
    plain = run(device, inplace=False)
    same({"": got["gradient"].cpu()}, {"": plain["gradient"].cpu()}, "in place against not")
    assert not torch.equal(got["logits"].cpu(), values)


def test_retained_and_second_backward(device: torch.device) -> None:
    x = torch.randn(4, 30, device=device, requires_grad=True)
    loss = F.cross_entropy(x, torch.arange(4, device=device))
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_second_derivatives(case: Case, device: torch.device) -> None:
    sample = case.sample((3, 6), torch.float64)
    target = move(sample.target, device)
    options = {name: move(value, device) for name, value in sample.options.items()}
    function = getattr(F, case.name)
    x = move(sample.input, device).detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: function(x, target, **options), (x,))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transforms(case: Case, device: torch.device) -> None:
    """torch.func: one call an element, with that call's bits."""
    sample = case.sample((5, 60), torch.float32)
    x, target = move(sample.input, device), move(sample.target, device)

    def of_item(x: Tensor, target: Tensor) -> Tensor:
        return case.function(x, target)

    many = torch.func.vmap(torch.func.grad(of_item))(x, target)
    for i in range(5):
        assert torch.equal(many[i], torch.func.grad(of_item)(x[i], target[i]))


# Of torch's Dynamo, about itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(case: Case, backend: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sample = case.sample((6, 70), dtype)
        found = []
        for function in (case.function, torch.compile(case.function, backend=backend)):
            x = move(sample.input, device).requires_grad_()
            loss = function(x, move(sample.target, device))
            loss.backward()
            assert x.grad is not None
            found.append({"loss": loss.detach().cpu(), "gradient": x.grad.cpu()})
        same(found[1], found[0], str(dtype))


def test_autocast(device: torch.device) -> None:
    x = torch.randn(5, 40, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.arange(5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = F.cross_entropy(x, target)
        stock = torch.nn.functional.cross_entropy(x, target)
    assert loss.dtype is stock.dtype is torch.float32
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.dtype is torch.bfloat16


def test_grad_scaler(device: torch.device) -> None:
    """A step with the scaler's own scale as the hint is the step without a hint."""
    weights = []
    for hinted in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 20).to(device, torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1)
        for _ in range(3):
            optimizer.zero_grad()
            out = model(torch.linspace(-1, 1, 48, device=device).view(6, 8)).half()
            scaled = scaler.scale(torch.ones((), device=device))
            loss = F.cross_entropy(
                out, torch.arange(6, device=device), grad_scale=scaled if hinted else None,
                loss_dtype=torch.float32,
            )  # fmt: skip
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def test_patched(device: torch.device) -> None:
    x, target = torch.randn(4, 9, device=device), torch.arange(4, device=device)
    with mbkern.patched(report=True) as report:
        loss = torch.nn.functional.cross_entropy(x, target)
    assert report.taken["cross_entropy"] == 1
    assert torch.equal(loss, F.cross_entropy(x, target))


# ---- bad class indices ---------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [7, 130, 5000])
@pytest.mark.parametrize("bad", [-1, 2**31 + 3, -(2**63), None])
def test_bad_class(columns: int, bad: int | None, device: torch.device) -> None:
    """A NaN in its row's loss and gradient, and in what is reduced; a note; no other row."""
    bad = columns if bad is None else bad
    x, target = torch.randn(40, columns, device=device), torch.arange(40, device=device) % 7
    good_loss, good_grad = mbkern.loss_and_grad("cross_entropy", x, target, reduction="none")
    mbkern.take_target_errors(device if device.type == "cuda" else None)
    target[17] = bad
    loss, grad = mbkern.loss_and_grad("cross_entropy", x, target, reduction="none")
    errors = mbkern.take_target_errors()
    assert errors == mbkern.TargetErrors(count=1, item=17, value=bad, columns=columns)
    assert mbkern.take_target_errors().count == 0
    assert loss[17].isnan()
    assert grad[17].isnan().all()
    good_loss[17] = good_grad[17] = torch.nan
    same(
        {"loss": loss.cpu(), "gradient": grad.cpu()},
        {"loss": good_loss.cpu(), "gradient": good_grad.cpu()},
        "other rows",
    )
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(leaf, target, reduction="sum")
    loss.backward()
    assert loss.isnan()
    assert leaf.grad is not None
    assert leaf.grad[17].isnan().all()
    assert leaf.grad.isnan().any(1).sum() == 1
    assert mbkern.take_target_errors().count >= 1
    assert torch.equal(x + 0, x), "the context lives on"


def test_many_bad_classes(device: torch.device) -> None:
    mbkern.take_target_errors()
    x, target = torch.zeros(300, 5, device=device), torch.full((300,), 9, device=device)
    F.cross_entropy(x, target)
    target[100:] = -100  # ignored
    F.cross_entropy(x, target)
    errors = mbkern.take_target_errors()
    assert errors.count == 400
    assert (errors.value, errors.columns) == (9, 5)
    assert 0 <= errors.item < 300


@pytest.mark.skipif(_C.cuda_built(), reason="this build has kernels for CUDA")
def test_a_build_without_cuda_says_so() -> None:
    with pytest.raises(NotImplementedError, match="CPU tensors only; install with MBKERN_CUDA=ON"):
        mbkern.take_target_errors()
    with pytest.raises(RuntimeError, match="CPU tensors only; install with MBKERN_CUDA=ON"):
        _C.cuda_take_target_errors()


@pytest.mark.skipif(
    not _C.cuda_built() or _C.cuda_is_shim() or torch.cuda.is_available(),
    reason="a build for CUDA under a torch without a GPU",
)
def test_a_torch_without_a_gpu_is_said() -> None:
    with pytest.raises(NotImplementedError, match="this torch sees no GPU"):
        mbkern.take_target_errors()


def test_the_device_is_chosen(device: torch.device) -> None:
    _C.cuda_use_device(0)
    with pytest.raises(RuntimeError, match="mbkern: choosing a device: "):
        _C.cuda_use_device(1000)


def test_products_of_a_depth_that_almost_fills_a_block(device: torch.device) -> None:
    """The last of the tiles that it is read in is not whole, and nothing is added behind it: -0 and
    -0 is -0."""

    def run(where: torch.device) -> dict[str, Tensor]:
        found = {}
        for depth in (240, 250, 256, 511):
            a, b = (torch.full((depth, 3), x, device=where) for x in (1e-30, -1e-30))
            c = torch.full((3, 3), -0.0, device=where)
            found[str(depth)] = products.product(c, a, b, products.BLOCKS)
        return found

    compare(run, device, "blocks")
