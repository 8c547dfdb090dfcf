"""GGUF files: metadata and the list of tensors, read without llama.cpp and only as far as they are asked for."""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoadError, NotFound

MAGIC = b"GGUF"  # the first bytes of every file
DEFAULT_CONTEXT = 4096  # tokens per sequence, unless the model has fewer or the dialog needs more
DEFAULT_ALIGNMENT = 32  # bytes; weights begin at a multiple, unless `general.alignment` says otherwise
STRIDE = 1024  # strings between two of an array whose offsets are kept
DAMAGED = (struct.error, UnicodeDecodeError, KeyError, OverflowError)  # what reading a damaged file raises


class GGUFArray(NamedTuple):
    """Where an array of the metadata lies in the file. A vocabulary has 150,000 strings: they are read when needed."""

    kind: int  # GGUF's number of the type of its items
    length: int  # items
    offset: int  # of its first item, in bytes from the start of the file
    steps: tuple[int, ...] = ()  # of an array of strings, the offset of every STRIDE-th one


class TensorInfo(NamedTuple):
    """An entry in the list of tensors."""

    name: str
    shape: tuple[int, ...]  # the fastest dimension first
    kind: int  # ggml's number of its type
    offset: int  # bytes from where the weights begin


PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp ends the name of a part of a model that was split


def parts_of(path: Path) -> list[Path]:
    """List all parts of a split model in order, given one of them; a file whose name is no part's stands alone."""
    if not (found := PART.search(path.name)):
        return [path]
    stem, count = path.name[: found.start()], found[2]
    return [path.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def identity(parts: Iterable[Path]) -> str:
    """Return a text that changes when one of these files does: paths, sizes and times, without reading them.

    Raises:
        OSError: a file is missing.
    """
    stats = [(part.resolve(), part.stat()) for part in parts]
    return "; ".join(f"{path}, {stat.st_size} bytes, {stat.st_mtime_ns}" for path, stat in stats)


def changed(path: Path) -> int:
    """Return when the system last changed a file, in nanoseconds: another file in its place has a later one.

    Raises:
        OSError: it is missing.
    """
    return path.stat().st_ctime_ns


def is_gguf(path: Path) -> bool:
    """Tell by its first bytes whether a file is a GGUF."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class GGUFReader:
    """Reads values one after another, from an offset on. It keeps its own place, so that threads may share a file.

    Raises:
        struct.error, UnicodeDecodeError, KeyError, OverflowError: the file is damaged.
    """

    SCALARS: Mapping[int, str] = dict(  # GGUF's number of a type -> its form in struct
        zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), map("<{}".format, "BbHhIif?Qqd"), strict=True)
    )
    STRING, ARRAY = 8, 9

    def __init__(self, data: mmap.mmap | bytes, at: int) -> None:
        self._data, self.at = data, at

    def scalar(self, form: str) -> Any:
        """Read a number of this form of `struct`."""
        (value,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self, errors: str = "strict") -> str:
        """Read a text; `errors` says what becomes of bytes that are not UTF-8, as in `bytes.decode`."""
        length = self.scalar("<Q")
        if self.at + length > len(self._data):
            raise struct.error
        self.at += length
        return self._data[self.at - length : self.at].decode("utf-8", errors)

    def strings(self, length: int) -> Iterator[str]:
        """Read the strings of an array of this length."""
        begin, size_at = self.at, struct.Struct("<Q").unpack_from
        self.skip(self.STRING, length)
        data, at = self._data[begin : self.at], 0
        for _ in range(length):
            start = at + 8
            at = start + size_at(data, at)[0]
            yield data[start:at].decode("utf-8")

    def value(self, kind: int) -> Any:
        """Read a value of this type; of an array, return where it lies and pass over it."""
        if kind == self.STRING:
            return self.string("replace")  # llama.cpp cuts some texts after 127 bytes, within a character perhaps
        if kind != self.ARRAY:
            return self.scalar(self.SCALARS[kind])
        inner, length = self.scalar("<I"), self.scalar("<Q")
        begin = self.at
        return GGUFArray(inner, length, begin, self.skip(inner, length))

    def skip(self, kind: int, length: int) -> tuple[int, ...]:
        """Pass over `length` values of this type; of strings, return the offset of every STRIDE-th one."""
        steps = []
        if kind in self.SCALARS:
            self.at += struct.calcsize(self.SCALARS[kind]) * length
        elif kind == self.ARRAY:
            raise KeyError(kind)
        else:  # quick, as vocabularies have 300,000 strings
            data, at, size_at = memoryview(self._data), self.at, struct.Struct("<Q").unpack_from
            for first in range(0, length, STRIDE):
                steps.append(at)
                for _ in range(min(STRIDE, length - first)):
                    at += 8 + size_at(data, at)[0]
            self.at = at
        if self.at > len(self._data):
            raise struct.error
        return tuple(steps)


class GGUFFile:
    """A GGUF file, mapped into memory: its metadata at once, its arrays and its list of tensors when asked for.

    Layout: `GGUF`, version, the numbers of tensors and of keys; every key with the type of its value and the value;
    name, shape, type and offset of every tensor; padding; the weights.

    Raises:
        NotFound: it cannot be read. LoadError: it is empty, truncated, or no GGUF.
    """

    path: Path
    metadata: dict[str, Any]  # by key; of an array, the GGUFArray
    tensor_count: int

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    raise LoadError(f"{path} is empty: download or convert it again")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise NotFound(f"cannot read the model {path}: {error.strerror}") from None
        if self._data[:4] != MAGIC:
            raise LoadError(f"{path} is not a GGUF file: make one with `metaalign-edge convert`")
        try:
            self._read_metadata()
        except DAMAGED:
            raise LoadError(f"{path} is truncated or damaged in its head: download or convert it again") from None

    def _read_metadata(self) -> None:
        reader = GGUFReader(self._data, len(MAGIC))
        version = reader.scalar("<I")
        if version not in (2, 3):
            raise LoadError(f"{self.path} is GGUF version {version}; 2 and 3 can be read (a big-endian file cannot)")
        self.tensor_count, keys = reader.scalar("<Q"), reader.scalar("<Q")
        self.metadata, self._places = {}, dict[str, slice]()
        for _ in range(keys):
            key = reader.string()
            if key in self.metadata:
                raise LoadError(f"{self.path} has the key {key!r} twice: download or convert it again")
            begin = reader.at
            self.metadata[key] = reader.value(reader.scalar("<I"))
            self._places[key] = slice(begin, reader.at)
        self._infos = reader.at  # where the list of tensors begins
        self._forget_pages()

    def _forget_pages(self) -> None:
        """Drop our mapped pages: llama.cpp maps the same file, and both would count in our memory."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._data.madvise(mmap.MADV_DONTNEED)

    @property
    def size(self) -> int:
        """Return the bytes of this file."""
        return len(self._data)

    def packed(self, key: str) -> bytes:
        """Return the type and the value of a key, as they stand in the file."""
        return self._data[self._places[key]]

    def items(self, key: str) -> Iterator[Any]:
        """Yield the items of an array of strings or numbers; nothing if no array has this key."""
        array = self.metadata.get(key)
        if isinstance(array, GGUFArray):
            reader = GGUFReader(self._data, array.offset)
            if array.kind == reader.STRING:
                yield from reader.strings(array.length)
            else:  # of one size: a vocabulary has 150,000
                number = reader.SCALARS[array.kind][-1]
                yield from struct.unpack_from(f"<{array.length}{number}", self._data, array.offset)

    def item(self, key: str, index: int) -> Any:
        """Return one item of an array without reading the others; None if there is no such item."""
        array = self.metadata.get(key)
        if not isinstance(array, GGUFArray) or not 0 <= index < array.length:
            return None
        near = index // STRIDE if array.steps else 0
        reader = GGUFReader(self._data, array.steps[near] if array.steps else array.offset)
        reader.skip(array.kind, index - near * STRIDE)
        found = reader.value(array.kind)
        self._forget_pages()
        return found

    def tensor_infos(self) -> Iterator[TensorInfo]:
        """Yield the entries of the list of tensors.

        Raises:
            LoadError: the list is damaged.
        """
        return self._infos_from(GGUFReader(self._data, self._infos))

    def _infos_from(self, reader: GGUFReader) -> Iterator[TensorInfo]:
        try:
            for _ in range(self.tensor_count):
                name, dimensions = reader.string(), reader.scalar("<I")
                shape = tuple(reader.scalar("<Q") for _ in range(dimensions))
                yield TensorInfo(name, shape, reader.scalar("<I"), reader.scalar("<Q"))
        except DAMAGED:
            raise LoadError(f"{self.path} is truncated or damaged in its list of tensors: download it again") from None

    def weights_start(self) -> int:
        """Return the offset at which the weights begin: behind the list of tensors, after the padding.

        Raises:
            LoadError: the list is damaged.
        """
        reader = GGUFReader(self._data, self._infos)
        for _ in self._infos_from(reader):
            pass
        unit = self.metadata.get("general.alignment")
        unit = unit if isinstance(unit, int) and unit > 0 else DEFAULT_ALIGNMENT
        return -(-reader.at // unit) * unit

    def tensors(self) -> dict[str, int]:
        """Return the bytes of each tensor in this file by its name: up to the next tensor, or to the end.

        Raises:
            LoadError: the list of tensors is damaged.
        """
        infos = sorted(self.tensor_infos(), key=lambda info: info.offset)
        ends = [*(info.offset for info in infos[1:]), self.size - self.weights_start()]
        return {info.name: max(0, end - info.offset) for info, end in zip(infos, ends, strict=False)}

    def check_end(self) -> None:
        """Make sure that the file does not end before its weights do.

        Raises:
            LoadError: it does, or its list of tensors is damaged.
        """
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        end = 0
        for tensor in self.tensor_infos():
            block, size = sizes.get(tensor.kind, (1, 0))  # a type that this version of gguf does not know counts 0
            end = max(end, tensor.offset + math.prod(tensor.shape) // block * size)
        if self.weights_start() + end > self.size:
            raise LoadError(f"{self.path} ends before its weights do: download it again")


class ModelFile(GGUFFile):
    """What a GGUF says of the model in it. Of a model that was split, this is the first part, and speaks for all.

    Raises:
        NotFound, LoadError: as for GGUFFile; LoadError also where another part is missing.
    """

    def __init__(self, path: Path, number: int = 0) -> None:
        """Open a file; one of a split model must be its part `number`, counted from 0."""
        super().__init__(path)
        self.paths = [path]  # of all parts
        count = self.metadata.get("split.count")
        if isinstance(count, int) and count > 1:
            self._find_parts(count, number)
        # for the names of states: while a model answers, its file may vanish, or another take its place
        self.opened = [self.identity, *map(changed, self.paths)]

    def _find_parts(self, count: int, number: int) -> None:
        self.paths, own = parts_of(self.path), self.metadata.get("split.no", 0)
        if len(self.paths) != count:
            raise LoadError(
                f"{self.path} is one of {count} parts: it must be called NAME-{own + 1:05}-of-{count:05}.gguf"
            )
        if own != number:
            raise LoadError(f"{self.path} is part {own + 1} of {count}: give the first, {self.paths[0].name}")
        if missing := [part.name for part in self.paths if not part.is_file()]:
            raise LoadError(f"{self.path} lacks its part {', '.join(missing)}: download it again")

    def files(self) -> list[ModelFile]:
        """Open all parts."""
        return [self, *(ModelFile(part, number) for number, part in enumerate(self.paths) if number)]

    def check_whole(self) -> None:
        """Make sure that no part ends before its weights do.

        Raises:
            LoadError: a part does, or its list of tensors is damaged.
        """
        for file in self.files():
            file.check_end()

    @property
    def identity(self) -> str:
        """Return a text that changes when a part of the model does."""
        return identity(self.paths)

    @property
    def bytes(self) -> int:
        """Return the size of all parts."""
        return sum(part.stat().st_size for part in self.paths)

    @property
    def parameters(self) -> int:
        """Return the number of weights in all parts."""
        return sum(math.prod(tensor.shape) for file in self.files() for tensor in file.tensor_infos())

    @property
    def architecture(self) -> str:
        """Return GGUF's name of the architecture."""
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def context(self) -> int:
        """Return the number of tokens that the model was trained to see."""
        return int(self.metadata.get(f"{self.architecture}.context_length", DEFAULT_CONTEXT))

    def number(self, key: str, default: int = 0) -> int:
        """Return the whole number under the key `<architecture>.<key>`; of a list with one a layer, the largest."""
        key = f"{self.architecture}.{key}"
        values = self.items(key) if isinstance(self.metadata.get(key), GGUFArray) else [self.metadata.get(key)]
        return max((value for value in values if isinstance(value, int) and value >= 0), default=default)

    def token(self, name: str) -> str:
        """Return the text of a special token such as `bos`; an empty string if the model names none."""
        index = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        text = None if index is None else self.item("tokenizer.ggml.tokens", index)
        return "" if text is None else str(text)

    @property
    def templates(self) -> dict[str, str]:
        """Return the chat templates in the file by their names; the one in use comes first, as `default`."""
        prefix = "tokenizer.chat_template"
        found = {"default": self.metadata[prefix]} if prefix in self.metadata else {}
        return found | {
            key[len(prefix) + 1 :]: text for key, text in self.metadata.items() if key.startswith(prefix + ".")
        }

    @property
    def quantization(self) -> str:
        """Return llama.cpp's name for how most weights are stored, such as Q4_K_M."""
        from gguf.constants import LlamaFileType

        try:
            name = LlamaFileType(self.metadata["general.file_type"]).name
        except (KeyError, ValueError):
            return "unknown"
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")

    @property
    def purpose(self) -> str:
        """Return what llama.cpp uses the file for: `model`, `embedding`, `adapter`, `mmproj`, `vocabulary`, ….

        Answers come from a `model` only.
        """
        kind, causal = str(self.metadata.get("general.type", "model")), f"{self.architecture}.attention.causal"
        if kind != "model" or self.architecture == "clip":
            return "mmproj" if kind == "model" else kind
        if not self.tensor_count and len(self.paths) == 1:
            return "vocabulary"
        embeds = self.metadata.get(causal) is False or self.metadata.get(f"{self.architecture}.pooling_type")
        return "embedding" if embeds else kind
