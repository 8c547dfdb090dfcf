"""GGUF's head, which stands before the weights: packed quickly, and read from files that others made.

Format: magic, version, the numbers of tensors and keys; each key with type and value; each tensor's name, shape (the
fastest first), type and offset; padding. Nothing in a file is believed before it is checked.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from gguf.gguf_writer import GGUFWriter

from metaalign_edge_runtime.errors import LoadError, NotFound

from .ggml import encoded_size

ALIGNMENT = 32  # bytes; every tensor begins at a multiple
MAGIC = b"GGUF"
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each plain type of value
KEY_LIMIT = 100_000  # keys, and tensors


class Packer(GGUFWriter):
    """The library's writer, which packs a vocabulary's texts one by one, in seconds: these are packed at once."""

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
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]  # the slowest first, as numpy has it
    kind: Type
    start: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """Bytes in the file, before padding."""
        return encoded_size(self.shape, self.kind)


@dataclass(frozen=True)
class Head:
    """What stands before the weights."""

    metadata: Mapping[str, bytes]  # each key's type and value as they stand in the file
    entries: tuple[Entry, ...]

    def text(self, key: str) -> str | None:
        """Return the value of ``key`` if it is a text."""
        packed = self.metadata.get(key, b"")
        return packed[12:].decode("utf-8", "replace") if packed[:4] == pack_number(Value.STRING) else None

    def number(self, key: str) -> int | None:
        """Return the value of ``key`` if it is a whole number."""
        packed = self.metadata.get(key, b"")
        kind = int.from_bytes(packed[:4], "little")
        return int.from_bytes(packed[4:], "little") if packed and kind in (0, 2, 4, 10) else None


def pack_number(value: int) -> bytes:
    """Pack a number as GGUF's heads have it."""
    return struct.pack("<I", value)


def pack_value(value: int | str) -> bytes:
    """Pack the type and the value of a key: a whole number (u32) or a text."""
    if isinstance(value, int):
        return struct.pack("<II", Value.UINT32, value)
    text = value.encode("utf-8")
    return struct.pack("<IQ", Value.STRING, len(text)) + text


def pack_head(metadata: Mapping[str, bytes], tensors: Sequence[tuple[str, tuple[int, ...], Type]]) -> bytes:
    """Pack a whole head, padding included, as llama.cpp does: dimensions of 1 at the slow end are left out."""
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
    """Round up to the next place where a tensor may begin."""
    return size + -size % ALIGNMENT


def read_head(path: Path) -> Head:
    """Read and check the head of a GGUF file. Raises NotFound or LoadError."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path.name).head()
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror})") from None


class _Reader:
    """Reads from the start of a file, never more than there is."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._size = os.fstat(file.fileno()).st_size

    def head(self) -> Head:
        if self._bytes(4) != MAGIC:
            raise LoadError(f"{self._name}: not a GGUF file")
        (version,) = self._unpack("<I")
        if version not in (2, 3):
            raise LoadError(f"{self._name}: GGUF version {version}; 2 and 3 can be read, big-endian files cannot")
        tensors, keys = self._unpack("<QQ")
        if max(tensors, keys) > KEY_LIMIT:
            raise LoadError(f"{self._name}: {tensors:,} tensors and {keys:,} keys? the file is damaged")
        metadata: dict[str, bytes] = {}
        for _ in range(keys):
            key = self._text()
            if key in metadata:
                raise LoadError(f"{self._name}: the key {key!r} stands twice")
            metadata[key] = self._value()
        found = Head(metadata, ())
        if found.number("general.alignment") not in (None, ALIGNMENT):
            raise LoadError(f"{self._name}: tensors aligned otherwise than to {ALIGNMENT} bytes are not supported")
        entries = [self._entry() for _ in range(tensors)]
        start = padded(self._file.tell())
        for name, shape, kind, offset in entries:
            if start + offset + encoded_size(shape, kind) > self._size:
                raise LoadError(f"{self._name}: ends before {name} does; download or convert it again")
        return Head(metadata, tuple(Entry(name, shape, kind, start + at) for name, shape, kind, at in entries))

    def _bytes(self, count: int) -> bytes:
        if count > self._size:
            raise LoadError(f"{self._name}: truncated or damaged in its head; download or convert it again")
        data = self._file.read(count)
        if len(data) != count:
            raise LoadError(f"{self._name}: truncated or damaged in its head; download or convert it again")
        return data

    def _unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _text(self) -> str:
        (length,) = self._unpack("<Q")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise LoadError(f"{self._name}: a name in its head is not UTF-8") from None

    def _value(self) -> bytes:
        """Return the next value with its type, as it stands there."""
        kind = self._bytes(4)
        number = int.from_bytes(kind, "little")
        if number == Value.ARRAY:
            head = self._bytes(12)
            inner, length = struct.unpack("<IQ", head)
            if length > self._size:
                raise LoadError(f"{self._name}: truncated or damaged in its head; download or convert it again")
            if inner == Value.STRING:
                return b"".join((kind, head, *(self._string() for _ in range(length))))
            return kind + head + self._bytes(length * self._plain(inner))
        return kind + (self._string() if number == Value.STRING else self._bytes(self._plain(number)))

    def _string(self) -> bytes:
        length = self._bytes(8)
        return length + self._bytes(int.from_bytes(length, "little"))

    def _plain(self, kind: int) -> int:
        if kind not in SIZES:
            raise LoadError(f"{self._name}: a value of unknown type {kind} in its head")
        return SIZES[kind]

    def _entry(self) -> tuple[str, tuple[int, ...], Type, int]:
        name = self._text()
        (count,) = self._unpack("<I")
        if not 1 <= count <= 4:
            raise LoadError(f"{self._name}: {name} has {count} dimensions")
        shape = tuple(reversed(self._unpack(f"<{count}Q")))
        number, offset = self._unpack("<IQ")
        try:
            kind = Type(number)
        except ValueError:
            raise LoadError(f"{self._name}: {name} is of a type that is not known ({number})") from None
        if not all(0 < size < 2**31 for size in shape) or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise LoadError(f"{self._name}: {name} has the shape {list(shape)}, which {kind.name} cannot have")
        return name, shape, kind, offset
