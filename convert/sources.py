"""Where the rows of a GGUF tensor come from: a checkpoint, its configuration, or another GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .architectures import Transform
from .container import Entry
from .ggml import encoded_size, to_float32
from .patch import Patch
from .shards import STORED_AS, Array, Tensor, WeightFiles, read_rows


class Source(Protocol):
    """Where the rows of one GGUF tensor come from."""

    @property
    def name(self) -> str:
        """Return the name by which the user knows the tensor."""

    @property
    def rows(self) -> int:
        """Return the number of rows."""

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row as it is read."""

    @property
    def unit(self) -> int:
        """Return the number of rows that must be read together: a multiple of it at a time."""

    def read(self, first: int, count: int) -> tuple[Array, str]:
        """Return `count` rows from row `first` on in the type of the source, and that type: see `encode`."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint."""

    files: WeightFiles
    tensor: Tensor
    patch: Patch | None  # the changes of adapters
    transform: Transform | None

    @property
    def name(self) -> str:
        """Return its name in the checkpoint."""
        return self.tensor.name

    @property
    def rows(self) -> int:
        """Return the length of its first dimension."""
        return self.tensor.shape[0]

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row in the checkpoint."""
        return self.tensor.nbytes // self.rows

    @property
    def unit(self) -> int:
        """Return the number of rows that its transform works on together."""
        return self.transform.unit if self.transform else 1

    def read(self, first: int, count: int) -> tuple[Array, str]:
        """Read rows, patch them, and transform them."""
        rows, dtype = read_rows(self.files, self.tensor, first, count), self.tensor.dtype
        if self.patch is not None:
            rows, dtype = self.patch.apply(rows, dtype, first), "F32"
        if self.transform is None:
            return rows, dtype
        if self.transform.arithmetic and dtype == "BF16":
            rows, dtype = to_float32(rows, dtype), "F32"
        return self.transform.apply(rows), dtype


@dataclass(frozen=True)
class Made:
    """A small tensor computed from the configuration, in float32."""

    name: str
    array: Array
    rows = unit = 1  # read as a whole

    @property
    def row_bytes(self) -> int:
        """Return the bytes of the whole tensor."""
        return self.array.nbytes

    def read(self, first: int, count: int) -> tuple[Array, str]:
        """Return the whole tensor."""
        return self.array, "F32"


@dataclass(frozen=True)
class Packed:
    """A tensor of a GGUF file."""

    files: WeightFiles
    file: str
    entry: Entry
    unit = 1

    @property
    def name(self) -> str:
        """Return its name in the file."""
        return self.entry.name

    @property
    def rows(self) -> int:
        """Return the number of rows in all its matrices."""
        return self.entry.nbytes // self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row in the file."""
        return encoded_size(self.entry.shape[-1:], self.entry.kind)

    def read(self, first: int, count: int) -> tuple[Array, str]:
        """Read rows; of a quantized type they come as bytes."""
        dtype = STORED_AS.get(self.entry.kind.name, np.dtype("u1"))
        data: Array = np.empty((count, self.row_bytes // dtype.itemsize), dtype)
        self.files.read_into(self.file, self.entry.start + first * self.row_bytes, data)
        return data, self.entry.kind.name
