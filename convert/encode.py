"""Encode chunks of rows in the tensor types of GGUF, and choose the type of a tensor."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from metaalign_edge_runtime.errors import LoadError

from .ggml import from_float32, to_float32
from .shards import STORED_AS, Array

# Types that llama.cpp's converter can write: the type of the matrices, and the value of general.file_type.
OUTTYPES: dict[str, tuple[Type, LlamaFileType]] = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
Q8_0_BLOCK = 32  # numbers that share a scale; blocks never cross a row
HALF_LIMIT = 65520.0  # from here on, float16 rounds to infinity
WIDE = (Type.F32, Type.BF16)  # types with the range of float32; others are float16 or have float16 scales


class Encoded(NamedTuple):
    """A chunk of rows in the type of the file."""

    data: Array  # of any numpy type: only its bytes count
    largest: float  # largest magnitude among the numbers


def choose_type(name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    """Return the type for the GGUF tensor `name`: `wanted`, but float32 for vectors, norms and biases."""
    if len(shape) <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight"):
        return Type.F32
    if wanted is Type.Q8_0 and shape[-1] % Q8_0_BLOCK:
        return Type.F16
    return wanted


def encode(name: str, rows: Array, dtype: str, kind: Type, importance: Array | None = None) -> Encoded:
    """Encode rows as `kind`. They come as `dtype`: F32, F16, BF16 as uint16, or a quantized type as bytes.

    importance: see `from_float32`. Raises LoadError, naming the tensor `name`, for NaN and infinity.
    """
    if dtype not in STORED_AS:
        if dtype == kind.name:
            return Encoded(rows, 0.0)
        rows, dtype = to_float32(rows, dtype), "F32"
    largest = magnitude(rows, dtype)
    if not np.isfinite(largest):
        raise LoadError(f"{name} holds NaN or infinity; the checkpoint is damaged, or its training went wrong")
    if dtype == kind.name:
        return Encoded(rows, largest)
    if rows.itemsize == 2 and kind in (Type.F16, Type.BF16):
        return Encoded(np.take(_table(dtype, kind), rows.view(np.uint16), mode="clip"), largest)
    return Encoded(from_float32(to_float32(rows, dtype), kind, importance), largest)


def magnitude(rows: Array, dtype: str) -> float:
    """Return the largest magnitude in `rows` (F32, F16 or BF16); NaN or infinity if there is one.

    Read as integers, floating-point numbers of one sign have the order of their magnitudes: the largest signed integer
    is the largest positive number, the largest unsigned one the negative number furthest from zero. That is three times
    as fast as comparing the numbers, and takes no memory.
    """
    bits = rows.itemsize * 8
    signed, unsigned = np.dtype(f"i{rows.itemsize}"), np.dtype(f"u{rows.itemsize}")
    above_zero = max(int(rows.view(signed).max()), 0)
    below_zero = max(int(rows.view(unsigned).max()) - (1 << bits - 1), 0)
    pattern = np.array([max(above_zero, below_zero)], unsigned)
    if dtype == "BF16":
        return float((pattern.astype(np.uint32) << 16).view(np.float32)[0])
    return float(pattern.view(f"f{rows.itemsize}")[0])


@cache
def _table(dtype: str, kind: Type) -> Array:
    """Return the table from all 65,536 patterns of one 16-bit type to the other; it is faster than any arithmetic."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    stored = patterns.view(np.float16) if dtype == "F16" else patterns
    with np.errstate(invalid="ignore"):
        return from_float32(to_float32(stored, dtype), kind).view(np.uint16).reshape(-1)
