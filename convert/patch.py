"""The changes that adapters make to a tensor, computed in float32 for some rows at a time.

An adapter's own matrices are read again for each chunk of rows, since an adapter may be too large to be kept in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from metaalign_edge_runtime.errors import LoadError

from .folder import Folder
from .ggml import to_float32
from .shards import STORED_AS, Array, Tensor, WeightFiles, read_rows

COMPARED = 2**24  # bytes of a tensor to compare at a time


class Step(Protocol):
    """One change to a tensor."""

    def apply(self, rows: Array, first: int) -> Array:
        """Return float32 `rows`, which begin at row `first` of the tensor, with the change applied."""


@dataclass(frozen=True)
class Patch:
    """All changes to one tensor, one after another."""

    steps: Sequence[Step]

    def apply(self, rows: Array, dtype: str, first: int) -> Array:
        """Return `rows` (see `Step`), stored as `dtype`, in float32 and with all changes applied."""
        numbers = to_float32(rows, dtype)
        for step in self.steps:
            numbers = step.apply(numbers, first)
        return numbers


@dataclass(frozen=True)
class LowRank:
    """`W + scale * B @ A`; with DoRA, each row of the sum is then scaled to the length `magnitude`.

    Shapes: W rows x columns, A rank x columns, B rows x rank. The matrix of an embedding is stored transposed: then A
    is rank x rows, and B columns x rank.
    """

    folder: Folder
    a: Tensor
    b: Tensor
    scale: float
    embedding: bool = False
    magnitude: Tensor | None = None

    def apply(self, rows: Array, first: int) -> Array:
        """Return `rows` (see `Step`) with the change applied. Raises LoadError for NaN, infinity and rows of zeros."""
        count = len(rows)
        if self.embedding:
            left = read_columns(self.folder, self.a, first, count).T
            right = read_numbers(self.folder, self.b, 0, self.b.shape[0]).T
        else:
            left = read_numbers(self.folder, self.b, first, count)
            right = read_numbers(self.folder, self.a, 0, self.a.shape[0])
        changed: Array = left @ right
        changed *= np.float32(self.scale)
        changed += rows
        if self.magnitude is not None:
            length = np.sqrt(np.einsum("ij,ij->i", changed, changed))
            if not length.all():
                raise LoadError(f"{self.magnitude.name}: DoRA would divide by the length of a row that is all zeros")
            changed *= (read_numbers(self.folder, self.magnitude, first, count) / length)[:, None]
        return changed


@dataclass(frozen=True)
class Shift:
    """`bias + scale * values`, for the bias of a layer."""

    folder: Folder
    values: Tensor
    scale: float

    def apply(self, rows: Array, first: int) -> Array:
        """Return `rows` (see `Step`) with the change applied. Raises LoadError for NaN and infinity."""
        shifted: Array = rows + np.float32(self.scale) * read_numbers(self.folder, self.values, first, len(rows))
        return shifted


@dataclass(frozen=True)
class Replaced:
    """Some rows replaced: row `places[i]` of the tensor by row `i` of `values`."""

    folder: Folder
    values: Tensor
    places: Sequence[int]

    def apply(self, rows: Array, first: int) -> Array:
        """Return `rows` (see `Step`), some of them replaced. Raises LoadError for NaN and infinity."""
        replaced: Array = rows.copy()
        for number, place in enumerate(self.places):
            if first <= place < first + len(rows):
                replaced[place - first] = read_numbers(self.folder, self.values, number, 1)[0]
        return replaced


def same_numbers(folder: Folder, tensor: Tensor, other_folder: Folder, other: Tensor) -> bool:
    """Say whether two tensors hold the same numbers, whatever types they are stored in."""
    if tensor.shape != other.shape:
        return False
    rows = tensor.shape[0]
    step = max(1, COMPARED // max(1, tensor.nbytes // max(1, rows)))
    with WeightFiles(folder.open) as files, WeightFiles(other_folder.open) as others:
        for first in range(0, rows, step):
            count = min(step, rows - first)
            ours, theirs = read_rows(files, tensor, first, count), read_rows(others, other, first, count)
            if (to_float32(ours, tensor.dtype) != to_float32(theirs, other.dtype)).any():
                return False
    return True


def read_numbers(folder: Folder, tensor: Tensor, first: int, count: int) -> Array:
    """Read `count` rows as float32. Raises LoadError for NaN and infinity."""
    with WeightFiles(folder.open) as files:
        return _finite(tensor, to_float32(read_rows(files, tensor, first, count), tensor.dtype))


def read_columns(folder: Folder, tensor: Tensor, first: int, count: int) -> Array:
    """Read `count` columns of a matrix as float32, and only those. Raises LoadError for NaN and infinity."""
    rows, columns = tensor.shape
    item = STORED_AS[tensor.dtype].itemsize
    with WeightFiles(folder.open) as files:
        parts = (
            replace(tensor, shape=(count,), start=tensor.start + (row * columns + first) * item) for row in range(rows)
        )
        stored = np.stack([read_rows(files, part, 0, count) for part in parts])
    return _finite(tensor, to_float32(stored, tensor.dtype))


def _finite(tensor: Tensor, numbers: Array) -> Array:
    if not np.isfinite(numbers).all():
        raise LoadError(f"{tensor.shard}: {tensor.name} holds NaN or infinity; the training of the adapter failed")
    return numbers
