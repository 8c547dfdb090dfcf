"""The head of a GGUF file, all that stands before the weights: packed quickly, and read from files of others.

Everything in a file is checked before it is used. The layout stands in `GGUFFile`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from gguf.gguf_writer import GGUFWriter

from metaalign_edge_runtime.errors import LoadError, counted
from metaalign_edge_runtime.llama.gguf import MAGIC, GGUFArray, GGUFFile, GGUFReader, TensorInfo

from .ggml import encoded_size

ALIGNMENT = 32  # bytes; every tensor begins at a multiple
COUNT_LIMIT = 100_000  # of keys and of tensors in a file


class Packer(GGUFWriter):
    """The gguf library's writer, but fast for vocabularies: it packs each text by itself, which takes seconds."""

    def _pack_val(self, val: Any, vtype: Value, add_vtype: bool, sub_type: Value | None = None) -> bytes:
        if vtype is not Value.ARRAY or not isinstance(val, list) or not val or sub_type is not None:
            return super()._pack_val(val, vtype, add_vtype, sub_type)
        head = struct.pack("<I", vtype) if add_vtype else b""
        if all(isinstance(item, int) and not isinstance(item, bool) for item in val):
            return head + struct.pack(f"<IQ{len(val)}i", Value.INT32, len(val), *val)
        if all(type(item) in (str, bytes) for item in val):
            texts = [item.encode("utf-8") if isinstance(item, str) else item for item in val]
            packed = b"".join(struct.pack("<Q", len(text)) + text for text in texts)
            return head + struct.pack("<IQ", Value.STRING, len(val)) + packed
        return super()._pack_val(val, vtype, add_vtype, sub_type)


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]  # the slowest dimension first, as in numpy
    kind: Type
    start: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """Return the bytes in the file, without padding."""
        return encoded_size(self.shape, self.kind)


@dataclass(frozen=True)
class Head:
    """The part of a GGUF file that stands before the weights."""

    metadata: Mapping[str, bytes]  # by key, type and value as they stand in the file
    values: Mapping[str, Any]  # by key, the value; of an array, its GGUFArray
    entries: tuple[Entry, ...]

    def text(self, key: str) -> str | None:
        """Return the value of `key` if it is a text."""
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> int | None:
        """Return the value of `key` if it is a whole number."""
        value = self.values.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def pack_value(value: int | str) -> bytes:
    """Pack the type and the value of a key, a whole number (u32) or a text."""
    if isinstance(value, int):
        return struct.pack("<II", Value.UINT32, value)
    text = value.encode("utf-8")
    return struct.pack("<IQ", Value.STRING, len(text)) + text


def pack_head(metadata: Mapping[str, bytes], tensors: Sequence[tuple[str, tuple[int, ...], Type]]) -> bytes:
    """Pack a whole head with its padding. Like llama.cpp it leaves out slowest dimensions of size 1."""
    parts = [MAGIC, struct.pack("<IQQ", gguf.GGUF_VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        name = key.encode("utf-8")
        parts += [struct.pack("<Q", len(name)), name, value]
    offset = 0
    for name_, shape, kind in tensors:
        name, sizes = name_.encode("utf-8"), list(reversed(shape))
        while len(sizes) > 1 and sizes[-1] == 1:
            sizes.pop()
        fields = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
        parts += [struct.pack("<Q", len(name)), name, fields]
        offset += padded(encoded_size(shape, kind))
    packed = b"".join(parts)
    return packed + bytes(-len(packed) % ALIGNMENT)


def padded(size: int) -> int:
    """Round up a size to the next multiple of ALIGNMENT."""
    return size + -size % ALIGNMENT


def read_head(path: Path) -> Head:
    """Read and check the head of a GGUF file. Raises NotFound or LoadError."""
    file = GGUFFile(path)
    if max(file.tensor_count, len(file.metadata)) > COUNT_LIMIT:
        keys = len(file.metadata)
        raise LoadError(f"{path.name}: {file.tensor_count:,} tensors and {keys:,} keys? the file is damaged")
    if file.metadata.get("general.alignment") not in (None, ALIGNMENT):
        raise LoadError(f"{path.name}: tensors aligned otherwise than to {ALIGNMENT} bytes are not supported")
    start = file.weights_start()
    entries = tuple(_entry(path.name, info, start) for info in file.tensor_infos())
    for entry in entries:
        if entry.start + entry.nbytes > file.size:
            raise LoadError(f"{path.name}: ends before {entry.name} does; download or convert it again")
    return Head({key: file.packed(key) for key in file.metadata}, file.metadata, entries)


def _entry(source: str, info: TensorInfo, start: int) -> Entry:
    """Check an entry of the list of tensors in the file `source`, whose weights begin at `start`."""
    shape = tuple(reversed(info.shape))
    if not 1 <= len(shape) <= 4:
        raise LoadError(f"{source}: {info.name} has {counted(len(shape), 'dimension')}")
    try:
        kind = Type(info.kind)
    except ValueError:
        raise LoadError(f"{source}: {info.name} is of a type that is not known ({info.kind})") from None
    if not all(0 < size < 2**31 for size in shape) or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        raise LoadError(f"{source}: {info.name} has the shape {list(shape)}, which {kind.name} cannot have")
    return Entry(info.name, shape, kind, start + info.offset)


def unpack_texts(packed: bytes) -> tuple[str, ...]:
    """Return the texts of an array that is packed as in `Head.metadata`; nothing if it is no array of texts."""
    reader = GGUFReader(packed, 0)
    array = reader.value(reader.scalar("<I"))
    if not isinstance(array, GGUFArray) or array.kind != reader.STRING:
        return ()
    return tuple(GGUFReader(packed, array.offset).strings(array.length))
