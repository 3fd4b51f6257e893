"""Triton's interpreter, made to round as a GPU does: for tests and for the table of errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

from idml_fast import backend


@contextmanager
def mended() -> Iterator[None]:
    """While it is on, interpreted kernels round bfloat16 and products as compiled ones do.

    The interpreter keeps bfloat16 as the integers of its bits, which it would multiply as integers,
    and cuts off what a rounding to bfloat16 should round to the nearest. It multiplies float32 in
    float32 whatever `idml_fast.backend.precision` is; here its factors are rounded first, or split
    in two, as Triton compiles them. The sums of a product stay float32: how the matrix units of a
    GPU round those is not emulated.

    It also puts its own functions in the place of Triton's language once a launch: by itself it
    does so at every function that a kernel calls, which takes a third of the time.
    """
    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    patch_language, replaced = interpreter._patch_lang, interpreter._LangPatchScope()

    def patch_language_once(function: Any) -> Any:
        nonlocal replaced
        if not replaced._changes:  # the end of a launch has taken them back
            # For a function that sees all of the language: Triton's own ones see its core.
            seen = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
            replaced = patch_language(seen)
        return replaced

    def mended_dot(
        self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, *others: Any
    ) -> TensorHandle:
        factors = [(a, b)]
        if a.dtype.scalar == tl.bfloat16:
            factors = [(_handle(_widened(a.data)), _handle(_widened(b.data)))]
        elif a.dtype.scalar == tl.float32:
            factors = _factors(a, b, precision)
        for left, right in factors:
            d = create_dot(self, left, right, d, precision, *others)
        return d

    def mended_cast(self: Any, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if (x.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(x.data), tl.bfloat16)
        if (x.dtype.scalar, dtype.scalar) == (tl.bfloat16, tl.float32):
            return _handle(_widened(x.data))
        return cast(self, x, dtype)

    # The options are frozen, and leave out bf16x3.
    options = vars(interpreter_builder.options)
    with (
        patch.object(InterpreterBuilder, "create_dot", mended_dot),
        patch.object(InterpreterBuilder, "cast_impl", mended_cast),
        patch.object(interpreter, "_patch_lang", patch_language_once),
        patch.dict(options, allowed_dot_input_precisions=backend.PRECISIONS),
    ):
        yield


def _factors(
    a: TensorHandle, b: TensorHandle, precision: Any
) -> list[tuple[TensorHandle, TensorHandle]]:
    """The products that one of float32 is made of, the smallest first."""
    if precision == INPUT_PRECISION.TF32:
        # The matrix units read the leading bits of a float32.
        return [(_handle(_cut(a.data)), _handle(_cut(b.data)))]
    if precision not in ROUNDINGS:
        return [(a, b)]
    (a_high, a_low), (b_high, b_low) = (_split(x.data, ROUNDINGS[precision]) for x in (a, b))
    return [(a_low, b_high), (a_high, b_low), (a_high, b_high)]


def _split(x: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray]) -> list[TensorHandle]:
    """The two parts of float32 that are multiplied."""
    high = rounded(x)
    return [_handle(high), _handle(rounded(x - high))]


def _cut(x: np.ndarray) -> np.ndarray:
    """float32 without the 13 bits that tf32 does not have."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest tf32, halves away from zero."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isfinite(x), _cut((bits + np.uint32(0x1000)).view(np.float32)), x)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, as the integers of its bits."""
    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()


def _widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, given as the integers of its bits, as float32."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16).float().numpy()


def _handle(x: np.ndarray) -> TensorHandle:
    return TensorHandle(x, tl.float32)


# How the two parts of float32 are rounded.
ROUNDINGS: dict[Any, Callable[[np.ndarray], np.ndarray]] = {
    INPUT_PRECISION.TF32x3: _to_tf32,
    INPUT_PRECISION.BF16x3: lambda x: _widened(_to_bfloat16(x)),
}
