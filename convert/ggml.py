"""Convert numbers between the types of ggml: with its own C routines if llama-cpp-python is installed, else numpy.

Both give the same bytes. ggml is up to thirty times as fast, is needed for most quantized types, and lets other Python
threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import sys
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from metaalign_edge_runtime.errors import LoadError

from .shards import Array

NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}
IN_NUMPY = (Type.F32, Type.F16, Type.BF16, Type.Q8_0)  # types that do not need ggml
FROM_FLOAT32 = {Type.F16: "ggml_fp32_to_fp16_row", Type.BF16: "ggml_fp32_to_bf16_row_ref"}
TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class TypeTraits(ctypes.Structure):
    """The first fields of ggml's struct `ggml_type_traits`."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", TO_FLOAT),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """Load the ggml of llama-cpp-python without importing that; None if it is not installed."""
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except ValueError:  # a module made at run time has no spec
        return None
    for folder in (spec.submodule_search_locations if spec else None) or ():
        try:
            ggml = ctypes.CDLL(str(Path(folder) / "lib" / NAMES.get(sys.platform, "libggml-base.so")))
            pointer, count = ctypes.c_void_p, ctypes.c_int64
            for name in FROM_FLOAT32.values():
                getattr(ggml, name).argtypes, getattr(ggml, name).restype = [pointer, pointer, count], None
            ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
            ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
            ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
            ggml.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
        except (OSError, AttributeError):  # not there, or another version of ggml
            continue
        return ggml
    return None


def encoded_size(shape: tuple[int, ...], kind: Type) -> int:
    """Return the bytes of a tensor in GGUF, without padding."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def to_float32(rows: Array, dtype: str) -> Array:
    """Return `rows` of the type `dtype` as float32; rows of a quantized type come as bytes."""
    if dtype == "F32":
        return rows
    kind, ggml = Type[dtype], library()
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = rows.shape if rows.itemsize == size else (*rows.shape[:-1], rows.shape[-1] // size * block)
    if ggml is not None:
        rows, numbers = np.ascontiguousarray(rows), np.empty(shape, np.float32)
        ggml.ggml_get_type_traits(int(kind)).contents.to_float(rows.ctypes.data, numbers.ctypes.data, numbers.size)
        return numbers
    if kind is Type.BF16:  # numpy has no bfloat16; the rows are uint16
        return (rows.astype(np.uint32) << 16).view(np.float32)
    if kind is Type.F16:
        return rows.astype(np.float32)
    dequantized: Array = gguf.quants.dequantize(rows, kind)
    return dequantized


def from_float32(numbers: Array, kind: Type, importance: Array | None = None) -> Array:
    """Return the bytes of float32 `numbers` in `kind`, as an array of any type and shape.

    importance: the weight of the error in each column (float32), for quantized types. Raises LoadError if `kind` needs
    ggml and that is not installed.
    """
    if kind is Type.F32:
        return numbers
    ggml = library()
    if ggml is None:
        return _in_numpy(numbers, kind)
    numbers = np.ascontiguousarray(numbers)
    data = np.empty(encoded_size(numbers.shape, kind), np.uint8)
    if kind in FROM_FLOAT32:
        getattr(ggml, FROM_FLOAT32[kind])(numbers.ctypes.data, data.ctypes.data, numbers.size)
        return data
    columns = numbers.shape[-1]
    weights = None if importance is None else importance.ctypes.data
    ggml.ggml_quantize_chunk(
        int(kind), numbers.ctypes.data, data.ctypes.data, 0, numbers.size // columns, columns, weights
    )
    return data


def _in_numpy(numbers: Array, kind: Type) -> Array:
    if kind not in IN_NUMPY:
        raise LoadError(f"{kind.name} takes ggml, which comes with llama-cpp-python: pip install llama-cpp-python")
    if kind is Type.F16:
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16)
    encoded: Array = gguf.quants.quantize(numbers, kind)
    return encoded


def needs_importance(kind: Type) -> bool:
    """Say whether `kind` needs an importance matrix: without one, ggml would end the process."""
    ggml = library()
    return ggml is not None and bool(ggml.ggml_quantize_requires_imatrix(int(kind)))
