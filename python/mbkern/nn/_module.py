"""What the modules have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbkern._arguments import Number
from mbkern.functional._ends import Extras as FunctionExtras

_EXTRAS: dict[str, Any] = {
    "inplace": False,
    "grad_scale": None,
    "denominator": None,
    "loss_dtype": None,
}


class _Signature:
    """What ``inspect.signature`` says of a class whose constructor hands its arguments on.

    Made when it is asked for. Of an instance, and of a class with a constructor of its own, it is
    not there, so that Python looks at what these take.
    """

    def __get__(self, module: Extras | None, owner: type[Extras]) -> inspect.Signature:
        if module is not None or owner.__init__ not in (Extras.__init__, OwnLoss.__init__):
            raise AttributeError("__signature__")
        kind = inspect.Parameter.KEYWORD_ONLY
        annotations = inspect.get_annotations(FunctionExtras)
        extras = [
            inspect.Parameter(name, kind, default=default, annotation=annotations[name])
            for name, default in _EXTRAS.items()
        ]
        return inspect.Signature([*owner._own_parameters(), *extras])


class Extras:
    """The keywords that every loss takes, kept for the calls; the rest goes to torch's module."""

    __signature__ = _Signature()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kept = {name: kwargs.pop(name, default) for name, default in _EXTRAS.items()}
        super().__init__(*args, **kwargs)
        self.inplace: bool = kept["inplace"]
        self.grad_scale: Number | None = kept["grad_scale"]
        self.denominator: Number | None = kept["denominator"]
        self.loss_dtype: torch.dtype | None = kept["loss_dtype"]

    @classmethod
    def _own_parameters(cls) -> list[inspect.Parameter]:
        """Those of the constructor but the extras: torch's module's."""
        torchs = next(base for base in cls.__mro__ if not issubclass(base, Extras))
        return list(inspect.signature(torchs).parameters.values())

    def _extras(self, sample_weight: Tensor | None) -> dict[str, Any]:
        """Those that are not the functions' own defaults: without any a call is the quickest."""
        given = {"sample_weight": sample_weight, **{name: getattr(self, name) for name in _EXTRAS}}
        return {n: value for n, value in given.items() if value is not None and value is not False}


class TorchLoss(Extras):
    """A loss of an input against a target whose options are attributes of torch's module."""

    _function: Callable[..., Tensor]
    _options: tuple[str, ...] = ()
    reduction: str

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        options = {name: getattr(self, name) for name in self._options}
        extras = self._extras(sample_weight)
        return self._function(input, target, reduction=self.reduction, **options, **extras)


class OwnLoss(Extras, torch.nn.Module):
    """A loss that torch does not have: its function's parameters by keyword."""

    _function: Callable[..., Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = inspect.signature(self._function).parameters
        given = dict(zip(self._names(), args, strict=False))
        if len(args) > len(given) or given.keys() & kwargs.keys():
            raise TypeError(f"mbkern: {type(self).__name__} takes {', '.join(self._names())}")
        kwargs = {**given, **kwargs}
        options = {n: kwargs.pop(n, names[n].default) for n in self._names()}
        super().__init__(**kwargs)
        for name, value in options.items():
            if name == "weight":
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        """Names of the loss's own parameters and its reduction, in the function's order."""
        skipped = ("input", "similarity", "student", "teacher", "target", "extras")
        return tuple(n for n in inspect.signature(cls._function).parameters if n not in skipped)

    @classmethod
    def _own_parameters(cls) -> list[inspect.Parameter]:
        given = inspect.signature(cls._function).parameters
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return [given[name].replace(kind=kind) for name in cls._names()]

    def extra_repr(self) -> str:
        """The loss's own parameters."""
        return ", ".join(f"{n}={getattr(self, n)}" for n in self._names())

    def _loss(self, *tensors: Tensor | None, sample_weight: Tensor | None, **more: Any) -> Tensor:
        options = {name: getattr(self, name) for name in self._names()}
        return self._function(*tensors, **options, **more, **self._extras(sample_weight))
