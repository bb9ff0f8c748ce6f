"""mbkern.loss_and_grad refuses what is wrong, the values in the message, and nothing written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES
from torch import Tensor

import mbkern
from mbkern import LossSum, loss_and_grad

X = torch.arange(12.0).reshape(3, 4)
T = torch.tensor([0, 3, 1])
P = torch.full((3, 4), 0.25)
Q = torch.full((3, 4), 0.5)
MEMORY = torch.arange(40.0)

# What changes of loss_and_grad("cross_entropy", X, T, grad_out=..., loss_sum=...), and the error.
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": ({"name": "nll"}, ValueError, "unknown loss 'nll'; available: cross_entropy"),
    "option": ({"smoothing": 0.1}, TypeError, "cross_entropy has no option 'smoothing'"),
    "reduction": ({"reduction": "avg"}, ValueError, "'avg' is not a valid reduction: none, mean"),
    "denominator": (
        {"reduction": "sum", "denominator": 3}, ValueError,
        "denominator goes with reduction='mean', not 'sum'",
    ),
    "denominator shape": (
        {"denominator": torch.ones(2)}, ValueError,
        r"denominator must be a number or a 0-dim tensor, not \(2,\) torch.float32",
    ),
    "scale shape": (
        {"scale": torch.ones(1)}, ValueError,
        r"scale must be a number or a 0-dim tensor, not \(1,\) torch.float32",
    ),
    "complex scale": ({"scale": torch.tensor(1j)}, TypeError, "scale is torch.complex64"),
    "argnums": ({"argnums": 2}, ValueError, "argnums 2 is not a differentiable argument of cross_"),
    "argnums name": ({"argnums": "logits"}, ValueError, "argnums 'logits' is not a differentiable"),
    "argnums of class indices": (
        {"argnums": 1}, ValueError, "cross_entropy: input, and the target if it holds class prob",
    ),
    "argnums twice": (
        {"argnums": (0, "input"), "grad_out": (None, None)}, ValueError,
        r"argnums \(0, 'input'\) must name each argument once",
    ),
    "no argnums": ({"argnums": (), "grad_out": ()}, ValueError, r"argnums \(\) must name each"),
    "structure": ({"argnums": (0,)}, ValueError, r"the structure of argnums=\(0,\)"),
    "input": ({"input": [1.0]}, TypeError, "input must be a tensor or a NumPy array, not list"),
    "target": ({"target": 3}, TypeError, "target must be a tensor or a NumPy array, not int"),
    "grad_out": ({"grad_out": 3}, TypeError, "grad_out must be a tensor or a NumPy array, not int"),
    "scalar input": (
        {"input": torch.tensor(1.0), "target": torch.tensor(0)}, ValueError,
        "input must have a class dimension",
    ),
    "input dtype": ({"input": X.int()}, TypeError, "input is torch.int32; supported are float32"),
    "complex input": ({"input": X.to(torch.complex64)}, TypeError, "input is torch.complex64"),
    "target shape": (
        {"target": torch.zeros(4, dtype=torch.long)}, ValueError,
        r"target has shape \(4,\); for an input of \(3, 4\) it must be \(3,\) .* or \(3, 4\)",
    ),
    "target dtype": ({"target": T.float()}, TypeError, "class indices are torch.float32; "),
    "bool target": ({"target": T > 0}, TypeError, "class indices are torch.bool; supported"),
    "integer probabilities": (
        {"target": P.long()}, TypeError, "class probabilities and must be floating, not torch.int",
    ),
    "ignored probability": (
        {"target": P, "ignore_index": 2}, ValueError,
        "ignore_index=2 has no meaning for a target of class probabilities",
    ),
    "class too large": (
        {"target": torch.tensor([0, 4, 9])}, IndexError,
        r"target 4 at flat index 1 is out of bounds: .*\[0, 4\) nor ignore_index \(-100\)",
    ),
    "class of another ignore_index": (
        {"target": torch.tensor([0, 1, -100]), "ignore_index": -1}, IndexError,
        r"target -100 at flat index 2 .* nor ignore_index \(-1\)",
    ),
    "weight shape": (
        {"weight": torch.ones(3)}, ValueError,
        r"weight must have one entry for each of the 4 classes, not shape \(3,\)",
    ),
    "weight dtype": ({"weight": torch.ones(4).int()}, TypeError, "weight is torch.int32"),
    "weight type": ({"weight": [1.0] * 4}, TypeError, "weight must be a tensor, not list"),
    "sample weight shape": (
        {"sample_weight": torch.ones(4)}, ValueError,
        r"sample_weight has shape \(4,\), which does not broadcast to .* loss, \(3,\)",
    ),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, r"must be in \[0, 1\], not 1.5"),
    "smoothing NaN": ({"label_smoothing": float("nan")}, ValueError, r"in \[0, 1\], not nan"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, not 0.0"),
    "softcap inf": ({"softcap": float("inf")}, ValueError, "positive and finite, not inf"),
    "loss_dtype": ({"loss_dtype": torch.int32}, TypeError, "loss_dtype must be a floating dtype"),
    "requires grad": (
        {"input": X.clone().requires_grad_()}, RuntimeError, "an argument requires grad; call ",
    ),
    "out shape": (
        {"grad_out": torch.zeros(4, 3)}, ValueError,
        r"grad_out must be \(3, 4\) torch.float32, not \(4, 3\) torch.float32 on cpu",
    ),
    "buffer dtype": (
        {"input": X.half(), "grad_out": torch.zeros(3, 4).half(), "accumulate": True}, ValueError,
        r"grad_out must be \(3, 4\) torch.float32, not \(3, 4\) torch.float16",
    ),
    "read-only": (
        {"grad_out": np.broadcast_to(np.float32(0), (3, 4))}, ValueError,
        r"grad_out is a read-only array of shape \(3, 4\)",
    ),
    "expanded": (
        {"grad_out": torch.zeros(4).expand(3, 4)}, ValueError,
        r"elements that share memory \(shape \(3, 4\), strides \(0, 1\)\)",
    ),
    "overlap": (
        {"input": MEMORY[:12].view(3, 4), "grad_out": MEMORY[4:16].view(3, 4)}, ValueError,
        "grad_out overlaps the input without being the input",
    ),
    "over the target": (
        {"target": P, "grad_out": P}, ValueError, r"grad_out overlaps another argument, \(3, 4\)",
    ),
    "accumulate over the input": (
        {"input": MEMORY[:12].view(3, 4), "grad_out": MEMORY[:12].view(3, 4), "accumulate": True},
        ValueError, "shares memory with the input, which cannot be accumulated into",
    ),
    "fp64 with loss_sum": (
        {"input": X.double(), "grad_out": None}, TypeError, "float64 losses are refused",
    ),
    "broadcast": (
        {"name": "mse_loss", "target": P[0]}, ValueError, r"one shape, not \(3, 4\) and \(4,\)",
    ),
    "index target": ({"name": "mse_loss", "target": P.int()}, TypeError, "target is torch.int32"),
    "element weight shape": (
        {"name": "mse_loss", "target": P, "sample_weight": torch.ones(3)}, ValueError,
        r"has shape \(3,\), which does not broadcast to .* loss, \(3, 4\)",
    ),
    "foreign option": (
        {"name": "mse_loss", "target": P, "z_loss": 0.1}, TypeError, "has no option 'z_loss'",
    ),
    "outputs over each other": (
        {"name": "mse_loss", "target": P, "argnums": (0, 1),
         "grad_out": (MEMORY[:12].view(3, 4), MEMORY[11:23].view(3, 4))},
        ValueError, "grad_out overlaps another argument",
    ),
    "swapped outputs": (
        {"name": "mse_loss", "target": P, "argnums": (0, 1), "grad_out": (P, X)},
        ValueError, "grad_out overlaps another argument",
    ),
    "third tensor missing": (
        {"name": "gaussian_nll_loss", "target": P}, TypeError, "takes input, target, var; var is m",
    ),
    "third tensor's shape": (
        {"name": "gaussian_nll_loss", "target": P, "var": P[0]}, ValueError,
        r"one shape, not \(3, 4\) and \(4,\)",
    ),
    "output over the third tensor": (
        {"name": "gaussian_nll_loss", "target": P, "var": Q, "grad_out": Q}, ValueError,
        "grad_out overlaps another argument",
    ),
    "argument without a gradient": (
        {"name": "soft_margin_loss", "target": P, "argnums": "target"}, ValueError,
        "argnums 'target' is not a differentiable argument of soft_margin_loss: input",
    ),
    "no LossSum": (
        {"loss_sum": torch.zeros(3)}, TypeError, "loss_sum must be a LossSum, not Tensor",
    ),
    "no LossSum of elements": (
        {"name": "mse_loss", "target": P, "loss_sum": 3.0}, TypeError, "LossSum, not float",
    ),
    "bfloat16 of NumPy": (
        {"input": X.numpy(), "target": T.numpy(), "loss_dtype": torch.bfloat16,
         "grad_out": np.full((3, 4), 7.0, np.float32)},
        TypeError, "loss_dtype=torch.bfloat16 with NumPy arrays",
    ),
    "another byte order": (
        {"input": X.numpy().astype(">f4"), "grad_out": None}, ValueError,
        r"input is an array \(3, 4\) of >f4 with strides \(16, 4\): .*byte order",
    ),
    "an array backwards": (
        {"grad_out": np.full((3, 4), 7.0, np.float32)[::-1]}, ValueError,
        r"grad_out is an array \(3, 4\) of float32 with strides \(-16, 4\): ",
    ),
    "an array of objects": (
        {"sample_weight": np.ones(3, object), "input": X.numpy(), "grad_out": None}, TypeError,
        r"sample_weight is an array \(3,\) of object",
    ),
    "a masked array": (
        {"input": np.ma.array(X.numpy(), mask=X.numpy() > 5), "grad_out": None}, TypeError,
        r"input is a masked array; pass its filled\(0\) or its data",
    ),
    "a masked weight": (
        {"sample_weight": np.ma.array([1.0, 2.0, 3.0], mask=[1, 0, 0])}, TypeError,
        "sample_weight is a masked array",
    ),
    "parameter out of range": (
        {"name": "huber_loss", "target": P, "delta": 0.0}, ValueError, "delta must be in",
    ),
    "parameter of another loss": (
        {"name": "huber_loss", "target": P, "beta": 1.0}, TypeError, "has no option 'beta'",
    ),
    "fp64 target with loss_sum": (
        {"name": "mse_loss", "target": P.double()}, TypeError, "float64 losses are refused",
    ),
}  # fmt: skip


def memory(value: Any) -> bytes:
    """All of the memory that a tensor, array or LossSum lies in."""
    value = value.state if isinstance(value, LossSum) else value
    if isinstance(value, np.ndarray):
        return value.tobytes()
    storage = value.detach().untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()


@pytest.mark.cpu
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    """The message names the argument and its value, and nothing has been written."""
    changed, error, message = REFUSED[what]
    options: dict[str, Any] = {
        "name": "cross_entropy",
        "input": X,
        "target": T,
        "grad_out": torch.full((3, 4), 7.0),
        "loss_sum": LossSum().add(torch.tensor([1.5])),
        **changed,
    }
    flat = [v for o in options.values() for v in (o if isinstance(o, tuple) else (o,))]
    watched = [v for v in flat if isinstance(v, (Tensor, np.ndarray, LossSum))]
    before = [memory(v) for v in watched]
    with pytest.raises(error, match=f"^mbkern: .*{message}"):
        loss_and_grad(**options)
    assert [memory(v) for v in watched] == before, "something was written"


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_class_leaves_everything(dtype: torch.dtype) -> None:
    """However many good rows come before it, and whatever the output is."""
    x, target = torch.zeros(600, 1000, dtype=dtype), torch.zeros(600, dtype=torch.long)
    target[[417, 599]] = torch.tensor([1000, -5])
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    acc = None if dtype is torch.float64 else LossSum().add(torch.ones(1))
    for out, accumulate in ((torch.ones_like(x), False), (x, False), (x.to(wide) + 1, True)):
        before = [memory(v) for v in (x, out, acc) if v is not None]
        with pytest.raises(IndexError, match="target 1000 at flat index 417 is out of bounds"):
            loss_and_grad(
                "cross_entropy", x, target, grad_out=out, accumulate=accumulate, loss_sum=acc
            )
        assert [memory(v) for v in (x, out, acc) if v is not None] == before


def test_the_list_of_losses() -> None:
    with pytest.raises(
        ValueError, match=r"unknown loss 'cross_entorpy'; available: cross_entropy, "
    ):
        loss_and_grad("cross_entorpy", torch.ones(2, 3), torch.ones(2, 3))
    assert [loss.name for loss in mbkern.losses()]
