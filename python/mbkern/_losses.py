"""The registry of losses: what each is called, takes, and can do."""

from __future__ import annotations

from dataclasses import dataclass

from mbkern import _C

_ROW = {name: number for number, name in enumerate(_C.row_losses())}
_POINTWISE = {name: number for number, name in enumerate(_C.pointwise_losses())}


@dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes:
        name: as in ``mbkern.functional`` and ``mbkern.loss_and_grad``.
        kind: "row" (one item is a row of classes) or "pointwise" (one item is an element).
        number: its position in the compiled list of its kind.
        differentiable: the tensor arguments that gradients are computed for.
    """

    name: str
    kind: str
    number: int
    differentiable: tuple[str, ...]


def _all() -> dict[str, Loss]:
    rows = [Loss(name, "row", number, ("input",)) for name, number in _ROW.items()]
    pointwise = [
        Loss(name, "pointwise", number, ("input", "target")) for name, number in _POINTWISE.items()
    ]
    return {loss.name: loss for loss in rows + pointwise}


_LOSSES = _all()


def losses() -> list[Loss]:
    """Every loss of this build with its properties."""
    return list(_LOSSES.values())


def find(name: str) -> Loss:
    """Return the loss of that name, or raise ValueError with the names there are."""
    try:
        return _LOSSES[name]
    except KeyError:
        raise ValueError(
            f"mbkern: unknown loss {name!r}; available: {', '.join(_LOSSES)}"
        ) from None
