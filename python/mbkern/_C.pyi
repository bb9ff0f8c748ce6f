"""Kernels over addresses. Nothing is checked here: :mod:`mbkern._launch` is the only caller."""

from typing import TypeAlias

_Strides: TypeAlias = tuple[int, int, int]
_Scalar: TypeAlias = tuple[float, int, int]
_Result: TypeAlias = tuple[int, bool, _Scalar, int, int, int]

def build_info() -> dict[str, str]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def has_openmp() -> bool: ...
def row_losses() -> list[str]: ...
def pointwise_losses() -> list[str]: ...
def elementary_functions() -> list[str]: ...
def elementary(isa: str, name: str, in_double: bool, x: int, y: int, n: int) -> None: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...
def exact_value(state: int) -> float: ...
def exact_result(state: int, result: _Result) -> None: ...
def exact_merge(into: int, other: int) -> None: ...
def exact_add(state: int, values: int, n: int) -> None: ...
def row_loss(
    loss: int,
    dtype: int,
    items: int,
    inner_size: int,
    columns: int,
    input: int,
    input_strides: _Strides,
    grad: int,
    grad_strides: _Strides,
    accumulate: bool,
    target: int,
    target_type: int,
    target_strides: _Strides,
    ignore_index: int,
    class_weight: int,
    sample_weight: int,
    sample_weight_strides: _Strides,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: _Scalar,
    item_scale: int,
    item_scale_strides: _Strides,
    losses: int,
    row_state: int,
    from_state: bool,
    divisor: _Scalar,
    result: _Result,
    threads: int,
    /,
) -> float: ...
def pointwise_loss(
    loss: int,
    in_double: bool,
    shape: list[int] | tuple[int, ...],
    data: list[int],
    dtypes: list[int],
    view_strides: list[tuple[int, ...]],
    accumulate: bool,
    parameter: float,
    scale: _Scalar,
    result: _Result,
    threads: int,
    /,
) -> float: ...
