"""Tensor types in GGUF, and numbers on their way from one to another, a chunk of rows at a time."""

from __future__ import annotations

import math

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from .errors import ConvertError
from .shards import Array

# --outtype -> the type of the matrices, and general.file_type
OUTTYPES: dict[str, tuple[Type, LlamaFileType]] = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
COPIED = {("F32", Type.F32), ("F16", Type.F16), ("BF16", Type.BF16)}  # the bytes stay what they are
Q8_0_BLOCK = 32  # numbers that share a scale; blocks never cross a row


def choose_type(name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    """Choose the type of the GGUF tensor ``name``: vectors, norms and biases stay float32, as llama.cpp expects."""
    if len(shape) <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight"):
        return Type.F32
    if wanted is Type.Q8_0 and shape[-1] % Q8_0_BLOCK:
        return Type.F16
    return wanted


def encoded_size(shape: tuple[int, ...], kind: Type) -> int:
    """Return the bytes that a tensor takes in GGUF."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def widen(rows: Array, dtype: str) -> tuple[Array, str]:
    """Return rows that can be computed with, and their dtype: bfloat16, stored as uint16, becomes float32."""
    return ((rows.astype(np.uint32) << 16).view(np.float32), "F32") if dtype == "BF16" else (rows, dtype)


def encode(name: str, rows: Array, dtype: str, kind: Type) -> Array:
    """Turn rows as stored (``dtype``: F32, F16 or BF16, the last as uint16) into the bytes of ``kind``.

    Raises ConvertError, naming the tensor ``name``, for NaN, infinity, and what float16 cannot hold.
    """
    numbers, _ = widen(rows, dtype)
    if not np.isfinite(numbers).all():
        raise ConvertError(f"{name} holds NaN or infinity; the checkpoint is damaged, or its training went wrong")
    if (dtype, kind) in COPIED:
        return rows
    numbers = numbers.astype(np.float32, copy=False)
    if kind is Type.F16:
        with np.errstate(over="ignore"):
            halves = numbers.astype(np.float16)
        if not np.isfinite(halves).all():
            largest = float(np.abs(numbers).max())
            raise ConvertError(f"{name} holds {largest:g}, more than float16 can (65504); use --outtype bf16")
        return halves
    encoded: Array = gguf.quants.quantize(numbers, kind)
    return encoded
