"""The types of a quantized file: those of llama.cpp, and which tensor gets which.

Only llama.cpp's `llama_model_quantize` knows the mixtures, such as Q4_K_M. It makes a dry run on a file with a head
but without weights, and logs the type of each tensor. Then the weights stream through ggml here: the bytes are the
same, but it takes little memory and no intermediate file. The names, the types that need an importance matrix and the
two formats of its file follow llama.cpp's llama-quantize (MIT).
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

from metaalign_edge_runtime.errors import LoadError, NotFound, UsageError, some
from metaalign_edge_runtime.llama import library, soundness
from metaalign_edge_runtime.llama.gguf import ModelFile, is_gguf

from .container import Entry, Head, pack_value, read_head, unpack_texts
from .encode import OUTTYPES
from .ggml import needs_importance
from .shards import Array

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
NOT_MADE = (FileType.GUESSED, 39)  # llama.cpp can read 39, NVFP4, but not write it
MIXTURES = {  # name in llama-quantize -> general.file_type
    file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_"): file_type
    for file_type in FileType
    if file_type not in NOT_MADE
}
# Types that are unusable without an importance matrix.
WEIGHED = (Type.IQ3_XXS, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ1_M, Type.IQ1_S)
EDGES = ("token_embd.weight", "output.weight")  # tensors that need none for these types
IMATRIX_LIMIT = 2**31  # bytes of an importance matrix, and of a tensor in it
# A line of the log of a dry run: name of the tensor, type, and new type if that changes.
TRIAL_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\w+), size = .*?(?:-> .*\((\w+)\))?$", re.MULTILINE
)


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize, besides the type of the file; the names are those of llama-quantize."""

    imatrix: Path | None = None  # an importance matrix, as llama-imatrix writes it
    leave_output_tensor: bool = False  # keep output.weight as it is stored
    output_tensor_type: str | None = None  # a type for output.weight
    token_embedding_type: str | None = None  # a type for token_embd.weight
    tensor_types: tuple[str, ...] = ()  # each PATTERN=TYPE: the type for tensors whose names match
    pure: bool = False  # one type for all matrices, no mixture

    def __bool__(self) -> bool:
        """Say whether any option differs from the default."""
        return self != QuantizeOptions()


@dataclass(frozen=True)
class Importance:
    """An importance matrix: weights for the error in each column of each matrix."""

    name: str  # of its file
    weights: Mapping[str, Array]  # GGUF tensor -> float32
    datasets: tuple[str, ...] = ()  # files of the texts that it was computed from
    chunks: int = 0  # of those texts


@dataclass(frozen=True)
class Quantized:
    """The contents of a quantized file."""

    metadata: Mapping[str, bytes]  # as in `Head.metadata`
    types: Mapping[str, Type]  # GGUF tensor -> its type, in the order of the file
    importance: Mapping[str, Array] = field(default_factory=dict)  # GGUF tensor -> (experts, columns), float32


def known_outtypes() -> list[str]:
    """List the output types: those of llama.cpp's converter, then llama-quantize's."""
    return [*OUTTYPES, *sorted(name for name in MIXTURES if name.lower() not in OUTTYPES)]


def canonical_outtype(outtype: str) -> str:
    """Return the canonical spelling of an output type: f32, f16, bf16, q8_0, else llama.cpp's. Raises UsageError."""
    if outtype.lower() in OUTTYPES:
        return outtype.lower()
    name = ALIASES.get(outtype.upper(), outtype.upper())
    if name not in MIXTURES:
        raise UsageError(f"outtype {outtype!r} is not one of {', '.join(known_outtypes())}")
    return name


def quantized(path: Path, head: Head, outtype: str, options: QuantizeOptions) -> Quantized:
    """Return the contents of the GGUF file `path` if it is quantized to `outtype`. Only its head is read.

    Raises LoadError if llama.cpp is not installed or refuses, or if the importance matrix is missing or that of another
    model.
    """
    name = outtype.upper()
    matrix = read_imatrix(options.imatrix) if options.imatrix is not None else None
    types = _trial(path, name, options, matrix)
    if sorted(types) != sorted(entry.name for entry in head.entries):
        raise LoadError("llama.cpp's plan for the tensors cannot be read; is llama-cpp-python the pinned version?")
    weights = {}
    for entry in head.entries:
        kind = types[entry.name]
        if kind is entry.kind or kind.name.lower() in ("f32", "f16", "bf16"):
            continue
        found = _weights_for(entry, matrix)
        required = kind in WEIGHED or (kind is Type.Q2_K and name == "Q2_K_S")
        if found is None and (needs_importance(kind) or (required and entry.name not in EDGES)):
            raise LoadError(
                f"{name} needs an importance matrix for {entry.name}: make one with llama.cpp's llama-imatrix and give "
                "it (--imatrix)"
            )
        if found is not None:
            weights[entry.name] = found
    return Quantized(_metadata(head, name, matrix), types, weights)


def _metadata(head: Head, name: str, matrix: Importance | None) -> dict[str, bytes]:
    """Return the keys that llama.cpp writes: those of the source, then those about the quantization."""
    last: dict[str, int | str] = {
        gguf.Keys.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        gguf.Keys.General.FILE_TYPE: int(MIXTURES[name]),
    }
    if matrix is not None:
        last["quantize.imatrix.file"] = _cut(matrix.name)
        if matrix.datasets:
            last["quantize.imatrix.dataset"] = _cut(matrix.datasets[0])
        last["quantize.imatrix.entries_count"] = len(matrix.weights)
        if matrix.chunks > 0:
            last["quantize.imatrix.chunks_count"] = matrix.chunks
    kept = {key: value for key, value in head.metadata.items() if key not in last and not key.startswith("split.")}
    return {**kept, **{key: pack_value(value) for key, value in last.items()}}


def _cut(text: str) -> str:
    """Cut a text to 127 bytes, the room that llama.cpp has for it."""
    return text.encode("utf-8")[:127].decode("utf-8", "ignore")


def _weights_for(entry: Entry, matrix: Importance | None) -> Array | None:
    found = matrix.weights.get(entry.name) if matrix is not None else None
    if found is None or matrix is None:
        return None
    experts = entry.shape[-3] if len(entry.shape) > 2 else 1
    if found.size != experts * entry.shape[-1]:
        if entry.name == EDGES[0]:  # here llama-imatrix counts tokens, not columns
            return None
        raise LoadError(
            f"{matrix.name}: {found.size:,} values for {entry.name}, which has {experts * entry.shape[-1]:,} columns; "
            "the importance matrix is another model's"
        )
    return found.reshape(experts, -1)


# -- llama.cpp's plan -------------------------------------------------------------------------------------------------


def _trial(path: Path, name: str, options: QuantizeOptions, matrix: Importance | None) -> dict[str, Type]:
    """Return the type of each tensor by llama.cpp's dry run, in the order of writing. Raises LoadError."""
    llama = library.start()
    soundness.check_weights(ModelFile(path))
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run, params.allow_requantize = int(MIXTURES[name]), 1, True, True
    params.pure, params.quantize_output_tensor = options.pure, not options.leave_output_tensor
    if options.output_tensor_type is not None:
        params.output_tensor_type = int(_tensor_type(options.output_tensor_type))
    if options.token_embedding_type is not None:
        params.token_embedding_type = int(_tensor_type(options.token_embedding_type))
    if options.tensor_types:
        pairs = [_override(text) for text in options.tensor_types]
        overrides = (llama.llama_model_tensor_override * (len(pairs) + 1))()
        for place, (pattern, kind) in enumerate(pairs):
            overrides[place].pattern, overrides[place].type = pattern, int(kind)
        params.tt_overrides = overrides
    if matrix is not None:
        rows = (llama.llama_model_imatrix_data * (len(matrix.weights) + 1))()
        for place, (tensor, values) in enumerate(matrix.weights.items()):
            pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            rows[place].name, rows[place].data, rows[place].size = tensor.encode("utf-8"), pointer, values.size
        params.imatrix = rows
    with _log(llama) as log:
        failed = llama.llama_model_quantize(str(path).encode(), b"", ctypes.byref(params))
    text = "".join(log)
    if failed:
        reasons = re.findall(r"failed to quantize: (.*)", text)
        raise LoadError(f"llama.cpp cannot quantize this to {name}: {reasons[-1] if reasons else 'it gives no reason'}")
    return {tensor: _tensor_type(after or before) for tensor, before, after in TRIAL_LINE.findall(text)}


@contextmanager
def _log(llama: Any) -> Iterator[list[str]]:
    """Yield a list that collects the lines of llama.cpp's log; afterwards the log goes where it went before."""
    lines: list[str] = []
    callback = llama.llama_log_callback(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
    before, data = llama.llama_log_callback(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        llama.llama_log_set(before, data)


def _tensor_type(name: str) -> Type:
    try:
        return Type[name.upper()]
    except KeyError:
        raise LoadError(f"{name!r} is no type of a tensor, such as Q6_K or F16") from None


def _override(text: str) -> tuple[bytes, Type]:
    pattern, _, kind = text.partition("=")
    if not pattern or not kind:
        raise LoadError(f"tensor type {text!r}: write PATTERN=TYPE, such as attn_v=Q8_0")
    return pattern.lower().encode("utf-8"), _tensor_type(kind)


# -- importance matrices ----------------------------------------------------------------------------------------------


def read_imatrix(path: Path) -> Importance:
    """Read a file of llama-imatrix, in today's format (GGUF) or the old one. Raises NotFound or LoadError."""
    try:
        with path.open("rb") as file:
            found = _read_new(path, file) if is_gguf(path) else _read_old(path, file)
    except FileNotFoundError:
        raise NotFound(f"{path}: no such importance matrix") from None
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror})") from None
    damaged = [name for name, values in found.weights.items() if not np.isfinite(values).all()]
    if damaged or not found.weights:
        raise LoadError(f"{path.name}: {'NaN or infinity for ' + some(damaged) if damaged else 'nothing in it'}")
    return found


def _read_new(path: Path, file: BinaryIO) -> Importance:
    head = read_head(path)
    entries = {entry.name: entry for entry in head.entries}
    chunks = head.number("imatrix.chunk_count")
    if chunks is None or "imatrix.datasets" not in head.metadata:
        raise LoadError(f"{path.name}: a GGUF file, but no importance matrix")
    weights = {}
    for name in sorted(entries):
        stem = name.removesuffix(".in_sum2")
        if stem == name:
            continue
        counts = entries.get(f"{stem}.counts")
        if counts is None or counts.kind is not Type.F32 or entries[name].kind is not Type.F32:
            raise LoadError(f"{path.name}: no counts for {stem} in it")
        sums, seen = _numbers(file, entries[name]), np.rint(_numbers(file, counts)).reshape(-1, 1)
        if sums.size % seen.size:
            raise LoadError(f"{path.name}: {sums.size} sums for {stem} and {seen.size} counts")
        sums = sums.reshape(seen.size, -1)
        ones = np.ones_like(sums)  # the weights of experts that no text reached
        weights[stem] = np.divide(sums, seen, out=ones, where=seen > 0).reshape(-1)
    return Importance(path.name, weights, unpack_texts(head.metadata["imatrix.datasets"]), chunks)


def _numbers(file: BinaryIO, entry: Entry) -> Array:
    if entry.nbytes > IMATRIX_LIMIT:
        raise LoadError(f"{entry.name}: {entry.nbytes:,} bytes, which no importance matrix has")
    file.seek(entry.start)
    return np.frombuffer(file.read(entry.nbytes), np.float32)


def _read_old(path: Path, file: BinaryIO) -> Importance:
    """Read the old format: a count of entries (name, calls, values), then perhaps the chunks and the dataset."""
    data = path.read_bytes() if path.stat().st_size < IMATRIX_LIMIT else b""
    at = 0

    def number() -> int:
        nonlocal at
        at += 4
        return int(struct.unpack_from("<i", data, at - 4)[0])

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise struct.error
        at += count
        return data[at - count : at]

    weights: dict[str, Array] = {}
    try:
        for _ in range(number()):
            name, calls = take(number()).decode("utf-8"), number()
            values = np.frombuffer(take(4 * number()), "<f4")
            weights[name] = values / np.float32(calls) if calls > 0 else values.copy()
        chunks = number() if at < len(data) else 0
        datasets = (take(number()).decode("utf-8", "replace"),) if at < len(data) else ()
    except (struct.error, UnicodeDecodeError):
        raise LoadError(f"{path.name}: not an importance matrix, or cut short") from None
    return Importance(path.name, weights, datasets, chunks)
