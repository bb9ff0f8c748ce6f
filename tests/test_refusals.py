"""What no pointer may be taken of is refused, the values in the message, and nothing written."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from guarded import in_child
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import mbkern
from mbkern import functional as F


class Subclass(Tensor):
    pass


def fake(*shape: int) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape)


def without_memory(*shape: int) -> Tensor:
    """What sharded training leaves of a parameter that is not gathered."""
    x = torch.zeros(shape)
    x.untyped_storage().resize_(0)
    return x


UNFIT: dict[str, Callable[..., Tensor]] = {
    "fake": fake,
    "meta": lambda *shape: torch.empty(shape, device="meta"),
    "subclass": lambda *shape: torch.zeros(shape).as_subclass(Subclass),
    "sparse": lambda *shape: torch.zeros(shape).to_sparse(),
    "csr": lambda *shape: torch.eye(*shape).to_sparse_csr(),
    "mkldnn": lambda *shape: torch.zeros(shape).to_mkldnn(),
    "nested": lambda *shape: torch.nested.nested_tensor(list(torch.zeros(shape))),
    "quantized": lambda *shape: torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8),
    "complex": lambda *shape: torch.zeros(shape, dtype=torch.complex64),
    "boolean": lambda *shape: torch.zeros(shape, dtype=torch.bool),
    "integer": lambda *shape: torch.zeros(shape, dtype=torch.int64),
    "float8": lambda *shape: torch.zeros(shape).to(torch.float8_e4m3fn),
    "zero tensor": lambda *shape: torch._efficientzerotensor(shape),
    "without memory": without_memory,
}
REFUSED = (TypeError, ValueError, RuntimeError)  # NotImplementedError is a RuntimeError
PLACES = {
    "input": (3, 4),
    "target": (3, 4),
    "grad_out": (3, 4),
    "weight": (4,),
    "sample_weight": (3,),
    "denominator": (),
    "scale": (),
}


def exists(place: str, kind: str) -> bool:
    """Whether there is such a tensor of that shape, and whether it is unfit there."""
    dims = len(PLACES[place])
    if kind in ("boolean", "integer", "float8"):
        return place not in ("sample_weight", "denominator", "scale")  # there, real is enough
    return dims >= {"csr": 2, "nested": 2, "mkldnn": 1}.get(kind, 0)


PAIRS = [pair for pair in itertools.product(PLACES, UNFIT) if exists(*pair)]


@pytest.mark.filterwarnings("ignore")  # prototypes and deprecations of torch
@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(("place", "kind"), PAIRS)
def test_unfit_tensors(place: str, kind: str) -> None:
    """Refused in every place, in a child because a mistake is a crash."""
    shape = PLACES[place]
    # Made here: in a child, torch's own threads would hang.
    x, y, unfit = torch.zeros(3, 4), torch.zeros(3, 4), UNFIT[kind](*shape)

    def call() -> None:
        classes = torch.zeros(3, dtype=torch.int64)
        with pytest.raises(REFUSED):
            mbkern.loss_and_grad("cross_entropy", **{"input": x, "target": classes, place: unfit})
        if shape in ((3, 4), ()):
            with pytest.raises(REFUSED):
                mbkern.loss_and_grad("mse_loss", **{"input": x, "target": y, place: unfit})
        assert not x.any()

    in_child(call)


@pytest.mark.usefixtures("reader")
def test_function_transforms() -> None:
    """loss_and_grad is no torch function: inside vmap and grad a tensor has no memory."""

    def call() -> None:
        x, target = torch.randn(5, 3, 4), torch.zeros(3, dtype=torch.int64)

        def loss(y: Tensor) -> Tensor:
            return mbkern.loss_and_grad("cross_entropy", y, target)[0]

        with pytest.raises(REFUSED, match=r"torch\.func"):
            torch.func.vmap(loss)(x)
        with pytest.raises(REFUSED, match=r"torch\.func"):
            torch.func.grad(lambda y: loss(y.detach()))(x[0])

    in_child(call)


@pytest.mark.usefixtures("reader")
def test_readers_agree() -> None:
    """Every dtype and layout is read alike, with the table and without."""
    base = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    classes = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(2))
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda t: torch.stack((t, t), -1)[..., 1],
        lambda t: t[:, :, ::2, 1:],
        lambda t: t[..., :0],
    ]
    for dtype, index, layout in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64),
        (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        layouts,
    ):
        x = layout(base.to(dtype))
        target = classes[:, ::2, 1:] if x.shape == (2, 3, 2, 4) else classes[..., : x.shape[3]]
        got = mbkern.loss_and_grad("cross_entropy", x, target.to(index))
        want = mbkern.loss_and_grad("cross_entropy", x.contiguous(), target.contiguous())
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), (dtype, index, x.stride())


WRONG_CLASSES = [torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float32]


@pytest.mark.parametrize("dtype", WRONG_CLASSES, ids=str)
def test_dtypes_of_classes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        F.cross_entropy(torch.zeros(3, 4), torch.zeros(3).to(dtype))


@pytest.mark.usefixtures("reader")
def test_negative_views_are_right() -> None:
    """A lazily negated view holds the numbers with the other sign."""
    base = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    negative = base.conj().imag
    assert negative.is_neg()
    plain, target = negative.clone().resolve_neg(), torch.tensor([0, 3, 1])
    for name, y in (("cross_entropy", target), ("mse_loss", torch.ones(3, 4))):
        want = mbkern.loss_and_grad(name, plain, y)
        got = mbkern.loss_and_grad(name, negative, y)
        assert all(map(torch.equal, got, want))
    weights = negative.abs()._neg_view()
    for place in ("weight", "sample_weight", "denominator", "scale", "target"):
        value = {"weight": weights[0], "sample_weight": weights[:, 0], "target": weights}.get(
            place, weights[0, 0]
        )
        resolved = value.clone().resolve_neg()
        arguments = {"input": plain, "target": target}
        got = mbkern.loss_and_grad("cross_entropy", **{**arguments, place: value})
        want = mbkern.loss_and_grad("cross_entropy", **{**arguments, place: resolved})
        assert all(map(torch.equal, got, want)), place
    leaf = plain.requires_grad_()
    for name, y in (("cross_entropy", target), ("mse_loss", torch.ones(3, 4))):
        got, want = (
            torch.autograd.grad(getattr(mbkern.functional, name)(leaf, y), leaf, incoming)
            for incoming in (torch.tensor(3.0)._neg_view(), torch.tensor(-3.0))
        )
        assert torch.equal(got[0], want[0]), f"{name}: incoming gradient"


def test_negative_outputs_are_right_or_refused() -> None:
    out = torch.zeros(3, 4, dtype=torch.complex64).conj().imag
    target = torch.tensor([0, 3, 1])
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    _, want = mbkern.loss_and_grad("cross_entropy", x, target)
    try:
        mbkern.loss_and_grad("cross_entropy", x, target, grad_out=out)
    except REFUSED:
        assert not out.any()
    else:
        assert torch.equal(out, want)


def overlapping() -> dict[str, tuple[Tensor, Tensor, dict[str, object]]]:
    """Input, an output that is refused, and options."""
    x = torch.zeros(3, 4)
    wide = torch.zeros(30)
    weight = torch.ones(12)
    return {
        "expanded": (x, torch.zeros(1, 4).expand(3, 4), {}),
        "rows over rows": (x, torch.zeros(20).as_strided((3, 4), (2, 1)), {}),
        "shifted over the input": (wide[:12].view(3, 4), wide[1:13].view(3, 4), {}),
        "other strides over the input": (
            wide[:12].view(3, 4),
            wide[:12].view(4, 3).t(),
            {},
        ),
        "accumulated into the input": (x, x, {"accumulate": True}),
        "over the class weights": (x, weight.view(3, 4), {"weight": weight[:4]}),
        "over the sample weights": (x, weight.view(3, 4), {"sample_weight": weight[9:]}),
        "wrong shape": (x, torch.zeros(4, 3), {}),
        "wrong dtype": (x, torch.zeros(3, 4, dtype=torch.float64), {}),
        "accumulated in bfloat16": (
            x.bfloat16(),
            torch.zeros(3, 4, dtype=torch.bfloat16),
            {"accumulate": True},
        ),
    }


@pytest.mark.parametrize("kind", overlapping())
def test_unfit_outputs(kind: str) -> None:
    x, out, options = overlapping()[kind]
    before = out.clone()
    with pytest.raises(ValueError, match="grad_out"):
        mbkern.loss_and_grad("cross_entropy", x, torch.tensor([0, 1, 2]), grad_out=out, **options)
    assert torch.equal(out, before)


def test_output_over_the_probabilities() -> None:
    x, p = torch.zeros(3, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="overlaps another argument"):
        mbkern.loss_and_grad("cross_entropy", x, p, grad_out=p)
    with pytest.raises(ValueError, match="overlaps another argument"):
        mbkern.loss_and_grad("mse_loss", x, p, argnums=(0, 1), grad_out=(x, x))


@pytest.mark.parametrize("place", ["scale", "denominator"])
def test_a_number_inside_the_output(place: str) -> None:
    """A 0-dim tensor that lies in the gradient's memory: its value from before, or refused."""
    x = torch.randn(40, 2000, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 2.0
    target = torch.zeros(40, dtype=torch.int64)
    _, want = mbkern.loss_and_grad("cross_entropy", x, target, **{place: 2.0})
    try:
        got = mbkern.loss_and_grad("cross_entropy", x, target, grad_out=x, **{place: x[0, 0]})[1]
    except ValueError:
        return
    assert torch.equal(got, want)


def test_read_only_arrays() -> None:
    x = np.zeros((3, 4), dtype=np.float32)
    x.flags.writeable = False
    target = np.array([0, 1, 2])
    mbkern.loss_and_grad("cross_entropy", x, target)
    with pytest.raises(ValueError, match="read-only"):
        mbkern.loss_and_grad("cross_entropy", x, target, grad_out=x)
    with pytest.raises(ValueError, match="read-only"):
        mbkern.loss_and_grad(
            "cross_entropy", np.zeros((3, 4), dtype=np.float32), target, grad_out=x
        )


# ---- derivatives that are not computed -----------------------------------------------------------

ROWS = (torch.linspace(-1, 1, 12).reshape(3, 4), torch.tensor([0, 3, 1]))
PAIR = (ROWS[0], ROWS[0].flip(0))
#: Functions of a tensor that no derivative is computed of, and such a tensor.
UNDERIVED: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "weight": (lambda w: F.cross_entropy(*ROWS, weight=w), torch.ones(4)),
    "sample_weight": (lambda w: F.cross_entropy(*ROWS, sample_weight=w), torch.ones(3)),
    "denominator": (lambda w: F.cross_entropy(*ROWS, denominator=w), torch.tensor(2.0)),
    "weight of elements": (lambda w: F.mse_loss(*PAIR, weight=w), torch.ones(3, 4)),
    "sample_weight of elements": (lambda w: F.mse_loss(*PAIR, sample_weight=w), torch.ones(3, 1)),
    "denominator of elements": (lambda w: F.mse_loss(*PAIR, denominator=w), torch.tensor(2.0)),
}


@pytest.mark.parametrize("place", UNDERIVED)
def test_derivatives_that_are_not_computed(place: str) -> None:
    """Refused, not lost, also where vmap hides that a tensor is differentiated."""
    function, value = UNDERIVED[place]
    many = torch.stack([value, value])
    calls: dict[str, Callable[[], object]] = {
        "requires_grad": lambda: function(value.clone().requires_grad_()),
        "grad": lambda: torch.func.grad(function)(value),
        "vmap": lambda: torch.vmap(function)(many.clone().requires_grad_()),
        "grad(vmap)": lambda: torch.func.grad(lambda w: torch.vmap(function)(w).sum())(many),
        "vmap(grad)": lambda: torch.vmap(torch.func.grad(function))(many),
        "compile": lambda: torch.compile(function, backend="aot_eager")(
            value.clone().requires_grad_()
        ),
    }
    for name, call in calls.items():
        # Not only NotImplementedError: torch.compile wraps it.
        with pytest.raises(Exception, match="no gradient is computed for weights"):
            raise AssertionError(f"{name}: {call()}")
    with torch.no_grad():
        assert torch.equal(function(value.clone().requires_grad_()), function(value))
    assert torch.equal(torch.vmap(function)(many)[1], function(value))


@pytest.mark.parametrize("place", ["z_loss", "label_smoothing", "softcap"])
def test_numbers_are_no_tensors(place: str) -> None:
    """float(tensor) would lose its derivative."""
    value = torch.tensor(0.5)

    def function(v: object) -> Tensor:
        return F.cross_entropy(*ROWS, **{place: v})

    for call in (
        lambda: function(value),
        lambda: function(value.clone().requires_grad_()),
        lambda: torch.func.grad(function)(value),
        lambda: torch.func.jvp(function, (value,), (value,)),
        lambda: mbkern.loss_and_grad("cross_entropy", *ROWS, **{place: value}),
    ):
        with pytest.raises(TypeError, match=f"{place} must be a number, not a tensor"):
            call()
    for number in (0.5, np.float32(0.5), np.float64(0.5)):
        assert torch.equal(function(number), function(0.5))


@pytest.mark.parametrize("place", ["input", "target", "grad_out", "sample_weight", "scale"])
def test_loss_and_grad_is_outside_autograd(place: str) -> None:
    arguments = {"input": PAIR[0], "target": PAIR[1], place: torch.ones(3, 4)}
    if place == "scale":
        arguments[place] = torch.tensor(2.0)
    arguments[place] = arguments[place].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="outside autograd"):
        mbkern.loss_and_grad("mse_loss", **arguments)
    with torch.no_grad():
        mbkern.loss_and_grad("mse_loss", **arguments)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace",  # its category depends on the version
    "ignore:Dynamo does not know how to trace",
    "ignore:Graph break due to unsupported builtin",
)
def test_tracers() -> None:
    """A tracer sees results being allocated, and not the kernel that fills them."""

    def loss_and_grad(x: Tensor) -> Tensor:
        gradient: Tensor = mbkern.loss_and_grad("cross_entropy", x, ROWS[1])[1]
        return gradient

    def loss_sum(x: Tensor) -> Tensor:
        return mbkern.LossSum().add(x).value()

    for function in (loss_and_grad, loss_sum):
        for trace in (
            lambda f: make_fx(f)(ROWS[0]),
            lambda f: make_fx(f, pre_dispatch=True)(ROWS[0]),
            lambda f: torch.jit.trace(f, (ROWS[0],), check_trace=False),
        ):
            with pytest.raises(NotImplementedError, match="cannot be traced"):
                trace(function)
        with FlopCounterMode(display=False):  # a mode that does not trace
            inside = function(ROWS[0])
        compiled = torch.compile(function, backend="aot_eager")(ROWS[0])  # with a graph break
        assert torch.equal(inside, function(ROWS[0]))
        assert torch.equal(compiled, function(ROWS[0]))
