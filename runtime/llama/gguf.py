"""GGUF files: metadata and tensors, read without llama.cpp and only as far as they are asked for."""

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

DEFAULT_CONTEXT = 4096  # tokens per sequence, unless the model has fewer or the dialog needs more


class GGUFArray(NamedTuple):
    """Where an array of a GGUF's metadata lies. Vocabularies have 150,000 strings: they are read when asked for."""

    kind: int
    length: int
    offset: int


PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp ends the name of a part of a GGUF that was split


def parts_of(path: Path) -> list[Path]:
    """List the parts of a GGUF by the name of one of them, the first first; of any other file, itself alone."""
    if not (found := PART.search(path.name)):
        return [path]
    stem, count = path.name[: found.start()], found[2]
    return [path.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def identity(parts: Iterable[Path]) -> str:
    """Return what changes when one of these files does, without reading them.

    Raises:
        OSError: one is not there.
    """
    stats = [(part.resolve(), part.stat()) for part in parts]
    return "; ".join(f"{path}, {stat.st_size} bytes, {stat.st_mtime_ns}" for path, stat in stats)


class TensorInfo(NamedTuple):
    """What a GGUF says of a tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int  # its ggml type
    offset: int  # from where the weights begin


def is_gguf(path: Path) -> bool:
    """Tell by its first bytes whether a file is a GGUF."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


class GGUFReader:
    """Reads a GGUF's metadata from some place on. Each reading has its own: threads may share a file.

    Raises:
        struct.error, UnicodeDecodeError, KeyError, OverflowError: the file is damaged.
    """

    SCALARS: Mapping[int, str] = dict(
        zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), map("<{}".format, "BbHhIif?Qqd"), strict=True)
    )
    STRING, ARRAY = 8, 9

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data, self.at = data, at

    def scalar(self, form: str) -> Any:
        """Read a number."""
        (value,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        """Read a text."""
        length = self.scalar("<Q")
        if self.at + length > len(self._data):
            raise struct.error
        self.at += length
        return self._data[self.at - length : self.at].decode("utf-8")

    def strings(self, length: int) -> Iterator[str]:
        """Read so many texts, 300,000 perhaps."""
        begin, size_at = self.at, struct.Struct("<Q").unpack_from
        self.skip(self.STRING, length)
        data, at = self._data[begin : self.at], 0
        for _ in range(length):
            start = at + 8
            at = start + size_at(data, at)[0]
            yield data[start:at].decode("utf-8")

    def value(self, kind: int) -> Any:
        """Read a value of a kind; of an array, where it lies."""
        if kind == self.STRING:
            return self.string()
        if kind != self.ARRAY:
            return self.scalar(self.SCALARS[kind])
        inner, length = self.scalar("<I"), self.scalar("<Q")
        array = GGUFArray(inner, length, self.at)
        self.skip(inner, length)
        return array

    def skip(self, kind: int, length: int) -> None:
        """Pass over some values of a kind."""
        if kind in self.SCALARS:
            self.at += struct.calcsize(self.SCALARS[kind]) * length
        else:
            if kind == self.ARRAY:
                raise KeyError(kind)
            data, at, size_at = self._data, self.at, struct.Struct("<Q").unpack_from  # for 300,000 strings
            for _ in range(length):
                at += 8 + size_at(data, at)[0]
            self.at = at
        if self.at > len(self._data):
            raise struct.error


class ModelFile:
    """The metadata of a GGUF file, or of one in several parts, read without llama.cpp.

    Raises:
        NotFound: there is no such file. LoadError: it is empty, truncated or no GGUF, or a part is missing.
    """

    def __init__(self, path: Path, number: int = 0) -> None:
        self.path, self.paths = path, [path]
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    raise LoadError(f"{path} is empty: download or convert it again")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise NotFound(f"cannot read the model {path}: {error.strerror}") from None
        if self._data[:4] != b"GGUF":
            raise LoadError(f"{path} is not a GGUF file: make one with `metaalign-edge convert`")
        try:
            self.metadata = self._read()
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError):
            raise LoadError(f"{path} is truncated or damaged in its metadata: download or convert it again") from None
        count = self.metadata.get("split.count")
        if isinstance(count, int) and count > 1:
            self._check_parts(count, number)

    def _check_parts(self, count: int, number: int) -> None:
        """Find the other parts; this must be the one of that number, from 0."""
        self.paths, own = parts_of(self.path), self.metadata.get("split.no", 0)
        if len(self.paths) != count:
            raise LoadError(
                f"{self.path} is one of {count} parts: it must be called NAME-{own + 1:05}-of-{count:05}.gguf"
            )
        if own != number:
            raise LoadError(f"{self.path} is part {own + 1} of {count}: give the first, {self.paths[0].name}")
        if missing := [part.name for part in self.paths if not part.is_file()]:
            raise LoadError(f"{self.path} lacks its part {', '.join(missing)}: download it again")

    def _read(self) -> dict[str, Any]:
        reader = GGUFReader(self._data, 4)
        version = reader.scalar("<I")
        if version not in (2, 3):
            raise LoadError(f"{self.path} is GGUF version {version}; 2 and 3 can be read (a big-endian file cannot)")
        self.tensor_count, keys = reader.scalar("<Q"), reader.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = reader.string()
            metadata[key] = reader.value(reader.scalar("<I"))
        self._infos = reader.at
        self._forget_pages()
        return metadata

    def _forget_pages(self) -> None:
        """Let the system take back the pages that were read: they count as this process's, llama.cpp's own besides."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._data.madvise(mmap.MADV_DONTNEED)

    def items(self, key: str) -> Iterator[Any]:
        """Yield the items of an array of strings or numbers; nothing if the key is not there."""
        array = self.metadata.get(key)
        if isinstance(array, GGUFArray):
            reader = GGUFReader(self._data, array.offset)
            if array.kind == reader.STRING:
                yield from reader.strings(array.length)
            else:
                for _ in range(array.length):
                    yield reader.value(array.kind)

    def token(self, name: str) -> str:
        """Return the text of a special token such as `bos`; an empty string if the model names none."""
        index = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if index is None or not isinstance(tokens, GGUFArray) or not 0 <= index < tokens.length:
            return ""
        reader = GGUFReader(self._data, tokens.offset)
        reader.skip(tokens.kind, index)
        text = str(reader.value(tokens.kind))
        self._forget_pages()
        return text

    def number(self, key: str, default: int = 0) -> int:
        """Return a whole number of the architecture's; where it has one for each layer, the largest."""
        key = f"{self.architecture}.{key}"
        values = self.items(key) if isinstance(self.metadata.get(key), GGUFArray) else [self.metadata.get(key)]
        return max((value for value in values if isinstance(value, int) and value >= 0), default=default)

    @property
    def architecture(self) -> str:
        """Return the GGUF name of the architecture."""
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def context(self) -> int:
        """Return the number of tokens the model was trained to see."""
        return int(self.metadata.get(f"{self.architecture}.context_length", DEFAULT_CONTEXT))

    @property
    def identity(self) -> str:
        """Return what changes when the file does, or a part of it, without reading it."""
        return identity(self.paths)

    @property
    def bytes(self) -> int:
        """Return the size of all parts."""
        return sum(part.stat().st_size for part in self.paths)

    def tensor_infos(self) -> Iterator[TensorInfo]:
        """Yield what this part says of its tensors.

        Raises:
            LoadError: it is damaged there.
        """
        reader = GGUFReader(self._data, self._infos)
        try:
            for _ in range(self.tensor_count):
                name, dimensions = reader.string(), reader.scalar("<I")
                shape = tuple(reader.scalar("<Q") for _ in range(dimensions))
                yield TensorInfo(name, shape, reader.scalar("<I"), reader.scalar("<Q"))
            self._infos_end = reader.at
        except (struct.error, UnicodeDecodeError, OverflowError):
            raise LoadError(f"{self.path} is truncated or damaged in its list of tensors: download it again") from None

    def _weights(self) -> int:
        """Return where the weights begin, behind the list of tensors, which has just been read."""
        unit = self.metadata.get("general.alignment")
        unit = unit if isinstance(unit, int) and unit > 0 else 32
        return -(-self._infos_end // unit) * unit

    def tensors(self) -> dict[str, int]:
        """Return how many bytes each tensor of this part takes, by its name: as far as the next one, or the end.

        Raises:
            LoadError: their list is damaged.
        """
        infos = sorted(self.tensor_infos(), key=lambda info: info.offset)
        ends = [*(info.offset for info in infos[1:]), len(self._data) - self._weights()]
        return {info.name: max(0, end - info.offset) for info, end in zip(infos, ends, strict=False)}

    def files(self) -> list[ModelFile]:
        """Open all parts."""
        return [self, *(ModelFile(part, number) for number, part in enumerate(self.paths) if number)]

    @property
    def parameters(self) -> int:
        """Return the number of weights, of all parts."""
        return sum(math.prod(tensor.shape) for file in self.files() for tensor in file.tensor_infos())

    @property
    def quantization(self) -> str:
        """Return llama.cpp's name of how most weights are stored."""
        from gguf.constants import LlamaFileType

        try:
            name = LlamaFileType(self.metadata["general.file_type"]).name
        except (KeyError, ValueError):
            return "unknown"
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")

    def check_whole(self) -> None:
        """Make sure that no part ends before its weights do.

        Raises:
            LoadError: one does, or is damaged.
        """
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        for file in self.files():
            end = 0
            for tensor in file.tensor_infos():
                block, size = sizes.get(tensor.kind, (1, 0))  # a type of tomorrow
                end = max(end, tensor.offset + math.prod(tensor.shape) // block * size)
            if file._weights() + end > len(file._data):
                raise LoadError(f"{file.path} ends before its weights do: download it again")

    @property
    def purpose(self) -> str:
        """Return what the file is for: `model`, or what else llama.cpp's programs keep in a GGUF."""
        kind, causal = str(self.metadata.get("general.type", "model")), f"{self.architecture}.attention.causal"
        if kind != "model" or self.architecture == "clip":
            return "mmproj" if kind == "model" else kind
        if not self.tensor_count and len(self.paths) == 1:
            return "vocabulary"
        embeds = self.metadata.get(causal) is False or self.metadata.get(f"{self.architecture}.pooling_type")
        return "embedding" if embeds else kind

    @property
    def templates(self) -> dict[str, str]:
        """Return the chat templates in the file by name, the default one first as `default`."""
        prefix = "tokenizer.chat_template"
        found = {"default": self.metadata[prefix]} if prefix in self.metadata else {}
        return found | {
            key[len(prefix) + 1 :]: text for key, text in self.metadata.items() if key.startswith(prefix + ".")
        }
