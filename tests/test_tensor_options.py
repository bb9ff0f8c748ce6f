"""Options that are tensors of a subclass, and a compiled number where a tensor is usual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import mbkern.functional as F

Loss = Callable[..., Tensor]


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("option", ["weight", "sample_weight", "denominator"])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss, F.mse_loss])
def test_a_subclass_among_the_options(loss: Loss, option: str) -> None:
    """Torch's functions take it, and their result is of it."""
    torch.manual_seed(0)
    x = torch.randn(6, 4).log_softmax(1).requires_grad_()
    t = torch.randn(6, 4) if loss is F.mse_loss else torch.arange(6) % 4
    shape = {"weight": t.shape if loss is F.mse_loss else (4,), "sample_weight": t.shape}
    value = torch.rand(shape.get(option, ())) + 0.5
    want = loss(x, t, **{option: value})
    got = loss(x, t, **{option: value.as_subclass(Subclass)})
    assert type(got) is Subclass
    assert torch.equal(got.as_subclass(Tensor), want)
    (plain,) = torch.autograd.grad(want, x)
    (grad,) = torch.autograd.grad(got.as_subclass(Tensor), x)
    assert torch.equal(grad, plain)


@pytest.mark.parametrize("option", ["weight", "sample_weight"])
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss])
def test_a_product_of_weights_keeps_derivatives(loss: Loss, option: str) -> None:
    """In forward mode they are computed; in backward they are refused, not left out."""
    torch.manual_seed(0)
    x, y, direction = torch.randn(3, 6, 4, dtype=torch.float64)
    weights = {n: torch.rand(6, 4, dtype=torch.float64) + 0.5 for n in ("weight", "sample_weight")}

    def of(weight: Tensor) -> Tensor:
        return loss(x, y, **weights | {option: weight})

    _, tangent = torch.func.jvp(of, (weights[option],), (direction,))
    step = 1e-6 * direction
    want = (of(weights[option] + step) - of(weights[option] - step)) / 2e-6
    torch.testing.assert_close(tangent, want, rtol=1e-6, atol=1e-9)
    with pytest.raises(NotImplementedError, match="no gradient is computed for weights"):
        of(weights[option].requires_grad_())


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_number_as_target(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    call = torch.compile(
        F.multilabel_soft_margin_loss, fullgraph=True, dynamic=dynamic, backend=counter
    )
    x = torch.randn(4, 5)
    for number in (0.25, 0.5, 0.75, 1.0):
        assert torch.equal(call(x, number), F.multilabel_soft_margin_loss(x, number))
    assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore")  # Dynamo's, of what it does itself
@pytest.mark.parametrize(
    "name", ["softmax_focal_loss", "kl_div_with_logits", "js_div_with_logits", "huber_loss"]
)
def test_two_losses_in_a_function_of_dynamic_shapes(name: str) -> None:
    """Each number of a loss is read before its Function is traced: else Dynamo fails."""
    torch._dynamo.reset()
    loss = getattr(F, name)

    def both(x: Tensor, target: Tensor) -> Tensor:
        return loss(x, target) + loss(x.flip(0), target)

    x = torch.randn(6, 5, requires_grad=True)
    target = torch.arange(6) % 5 if name == "softmax_focal_loss" else torch.rand(6, 5)
    call = torch.compile(both, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(call(x, target), both(x, target))
