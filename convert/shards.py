"""The weights on disk: safetensors files, their index, and single rows of a tensor.

Format: the length of the header (8 bytes), a JSON header `name -> {dtype, shape, data_offsets}`, and the data, without
gaps. Everything in the header is checked before it is used.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import numpy.typing as npt

from metaalign_edge_runtime.errors import LoadError, some

from .folder import MB, Folder, parse_json

HEADER_LIMIT = 100 * MB  # bytes; the format sets this limit itself
INDEX_LIMIT = 100 * MB
TENSOR_LIMIT = 100_000
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
STORED_AS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}  # the types that can be converted; numpy has no bfloat16
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, not yet read."""

    name: str
    dtype: str  # as the header spells it: F32, F16, BF16, …
    shape: tuple[int, ...]
    shard: str  # file name in the folder
    start: int  # bytes from the start of the file
    key: str  # its name in the header; `name` is the one in a text-only model, without the prefix of a vision model

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def list_tensors(folder: Folder) -> dict[str, Tensor]:
    """List every tensor of the checkpoint by its name, ordered by shard and, within a shard, by name.

    Raises LoadError for pickled weights, a missing shard, an index that disagrees with the files, and a bad header.
    """
    weight_map = _weight_map(folder)
    shards = sorted(set(weight_map.values())) if weight_map else _shards_without_index(folder)
    missing = [shard for shard in shards if not folder.has(shard)]
    if missing:
        raise LoadError(f"{INDEX} names files that are not there: {some(missing)}; download the checkpoint again")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for tensor in read_header(folder, shard):
            if tensor.name in tensors:
                raise LoadError(f"{shard}: {tensor.name} is in {tensors[tensor.name].shard} too; remove one")
            tensors[tensor.name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise LoadError(f"{INDEX} says that {shard} holds {name}, but it does not; download both again")
    if weight_map and (surplus := [name for name in tensors if name not in weight_map]):
        raise LoadError(f"{INDEX} does not list {some(surplus)}; download the checkpoint again")
    return tensors


def _weight_map(folder: Folder) -> dict[str, str]:
    if not folder.has(INDEX):
        return {}
    weight_map = folder.json(INDEX, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{INDEX}: no weight_map in it; download the checkpoint again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):  # such as ../../somewhere/else
            raise LoadError(f"{INDEX}: {shard!r} for {name} is not the plain name of a .safetensors file")
    return weight_map


def _shards_without_index(folder: Folder) -> list[str]:
    names = folder.names()
    shards = [name for name in names if name.startswith("model") and SHARD_NAME.fullmatch(name)]
    if shards:
        return shards
    if any(name.startswith("adapter_model") for name in names):
        raise LoadError("a LoRA adapter, not a model: convert its base model, and give this folder with --lora")
    pickled = [name for name in names if name.endswith(PICKLED) and name != "training_args.bin"]
    if pickled:
        raise LoadError(
            f"{pickled[0]}: pickled weights can run any code when read, so they never are; save the model again with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), which writes safetensors"
        )
    raise LoadError(f"{folder.name}: no model*.safetensors in the folder; download the checkpoint again")


def read_header(folder: Folder, shard: str) -> list[Tensor]:
    """Read and check the header of one file. Returns its tensors sorted by name; raises LoadError."""
    try:
        with folder.open(shard) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise LoadError(f"{shard}: a header of {length:,} bytes? the file is damaged or cut short")
            text = file.read(length).decode("utf-8")
    except UnicodeDecodeError:
        raise LoadError(f"{shard}: not a safetensors file; download it again") from None
    except OSError as error:
        raise LoadError(f"{shard}: cannot be read ({error.strerror})") from None
    header = parse_json(text, shard)
    header.pop("__metadata__", None)
    if len(header) > TENSOR_LIMIT:
        raise LoadError(f"{shard}: {len(header):,} tensors, more than any model has")
    spans = [_checked(shard, name, entry) for name, entry in header.items()]
    end = 0
    for tensor, first, last in sorted(spans, key=lambda span: (span[1], span[2])):
        if first != end:  # the format allows neither gaps nor overlaps
            raise LoadError(f"{shard}: {tensor.name} starts at byte {first:,} of the data, not at {end:,}; damaged")
        end = last
    if end != size - 8 - length:
        raise LoadError(
            f"{shard}: {size - 8 - length:,} bytes of data, not the {end:,} of its header; download it again"
        )
    tensors = (replace(tensor, start=8 + length + first) for tensor, first, _ in spans)
    return sorted(tensors, key=lambda tensor: tensor.name)


def _checked(shard: str, name: str, entry: Any) -> tuple[Tensor, int, int]:
    """Check one entry of the header: types, limits, and that shape and length agree.

    Returns the tensor, and where its data begins and ends, in bytes from the start of all data.
    """
    where = f"{shard}: {name}"
    if not isinstance(entry, dict):
        raise LoadError(f"{where}: the header has no description of it")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise LoadError(f"{where}: unknown type {dtype!r}")
    if not _counts(shape) or len(shape) > 4 or any(size >= 2**31 for size in shape):
        raise LoadError(f"{where}: {shape!r} is no shape")
    if not _counts(offsets) or len(offsets) != 2:
        raise LoadError(f"{where}: {offsets!r} are no offsets")
    tensor = Tensor(name, dtype, tuple(shape), shard, 0, name)
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise LoadError(f"{where}: {offsets[1] - offsets[0]:,} bytes, but {dtype} {shape} takes {tensor.nbytes:,}")
    return tensor, offsets[0], offsets[1]


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def reopener(folder: Folder, known: Iterable[Tensor]) -> Callable[[str], BinaryIO]:
    """Return a function that opens a shard anew, and raises LoadError if a `known` tensor is no longer where it was."""

    def reopen(shard: str) -> BinaryIO:
        there = set(read_header(folder, shard))
        if any(replace(tensor, name=tensor.key) not in there for tensor in known if tensor.shard == shard):
            raise LoadError(f"{shard}: changed since it was opened; is something else writing there?")
        return folder.open(shard)

    return reopen


class WeightFiles:
    """Files of weights, each opened when it is first read from; any number of threads may read.

    Use it in a `with` block: its end raises LoadError if a file was changed meanwhile.
    """

    def __init__(self, open_file: Callable[[str], BinaryIO]) -> None:
        """Take a function that opens a file by its name."""
        self._open_file = open_file
        self._lock = threading.Lock()
        self._files: dict[str, tuple[BinaryIO, tuple[int, int]]] = {}

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        changed = [name for name, (file, stamp) in self._files.items() if _stamp(file) != stamp]
        for file, _ in self._files.values():
            file.close()
        self._files.clear()
        if changed and kind is None:
            raise LoadError(f"{changed[0]}: changed while it was read; is something else writing there?")

    def read_into(self, name: str, start: int, data: Array) -> None:
        """Fill `data` with the bytes from `start`. Raises LoadError if they cannot be read."""
        with self._lock:
            try:
                if name not in self._files:
                    file = self._open_file(name)
                    self._files[name] = file, _stamp(file)
                file = self._files[name][0]
                file.seek(start)
                got = file.readinto(data)  # type: ignore[attr-defined]
            except OSError as error:
                raise LoadError(f"{name}: cannot be read ({error.strerror})") from None
        if got != data.nbytes:
            raise LoadError(f"{name}: shorter than it was a moment ago; is something else writing there?")


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def read_rows(files: WeightFiles, tensor: Tensor, first: int, count: int) -> Array:
    """Read `count` rows (along the first dimension) in the type in which they are stored; bfloat16 as uint16."""
    data: Array = np.empty((count, *tensor.shape[1:]), STORED_AS[tensor.dtype])
    files.read_into(tensor.shard, tensor.start + first * math.prod(tensor.shape[1:]) * data.itemsize, data)
    return data
