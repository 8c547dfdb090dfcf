"""From an opened checkpoint, or from a GGUF file, to a GGUF file, the weights streaming through in chunks of rows.

A plan says what the file will hold, without a weight having been read. Then some threads read and encode a chunk each,
and this one writes what they make, in order.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from gguf import GGMLQuantizationType as Type

from metaalign_edge_runtime.errors import CannotWrite, LoadError, some
from metaalign_edge_runtime.llama.memory import peak_mb

from .architectures import Transform
from .chat import templates_to_write
from .checkpoint import Checkpoint
from .container import ALIGNMENT, Entry, pack_head, padded, read_head
from .describe import TEMPLATE_KEY, describe, write_head
from .encode import HALF_LIMIT, OUTTYPES, WIDE, Encoded, choose_type, encode
from .ggml import encoded_size, to_float32
from .output import check_output, check_space, whole_file
from .patch import Patch
from .prove import choose_pre_tokenizer, prove_pre_tokenizer
from .quantize import QuantizeOptions, canonical_outtype, quantized
from .shards import STORED_AS, Array, Tensor, WeightFiles, read_rows, reopener

CHUNK = 2**20  # bytes of source that a thread has at a time; little enough for the processor's cache
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
AS_USUAL = QuantizeOptions()
Progress = Callable[[str, int, int], None]  # GGUF tensor name, bytes of the file's weights done, and in all
Verify = Callable[[Path], Iterable[str]]  # looks at the finished file before it gets its name; says what it found


# -- what goes in -----------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where the rows of one GGUF tensor come from."""

    @property
    def name(self) -> str:
        """What the user knows it by."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def row_bytes(self) -> int:
        """Bytes of each, as read."""

    @property
    def unit(self) -> int:
        """They are read in multiples of this many."""

    def read(self, first: int, count: int) -> tuple[Array, str]:
        """Return some rows as they go into the file but for their type, and the type: see ``encode``."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint."""

    files: WeightFiles
    tensor: Tensor
    patch: Patch | None  # what adapters change
    transform: Transform | None

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        return self.tensor.name

    @property
    def rows(self) -> int:
        """The length of its first dimension."""
        return self.tensor.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the checkpoint."""
        return self.tensor.nbytes // self.rows

    @property
    def unit(self) -> int:
        """As many rows as its transform needs together."""
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
    """A tensor made from the configuration, in float32."""

    name: str
    array: Array
    rows = unit = 1

    @property
    def row_bytes(self) -> int:
        """Its size: it is small."""
        return self.array.nbytes

    def read(self, first: int, count: int) -> tuple[Array, str]:
        """Return it whole."""
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
        """Its name in the file."""
        return self.entry.name

    @property
    def rows(self) -> int:
        """Rows of all its matrices."""
        return self.entry.nbytes // self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the file."""
        return encoded_size(self.entry.shape[-1:], self.entry.kind)

    def read(self, first: int, count: int) -> tuple[Array, str]:
        """Read rows; those of a quantised type are bytes."""
        dtype = STORED_AS.get(self.entry.kind.name, np.dtype("u1"))
        data: Array = np.empty((count, self.row_bytes // dtype.itemsize), dtype)
        self.files.read_into(self.file, self.entry.start + first * self.row_bytes, data)
        return data, self.entry.kind.name


# -- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: Type
    source: Source
    importance: Array | None = None  # (experts, columns): how much each column matters

    @property
    def nbytes(self) -> int:
        """Bytes in the file, before padding."""
        return encoded_size(self.shape, self.kind)


@dataclass(frozen=True)
class ConversionPlan:
    """What a file will hold. No weight has been read yet, and nothing written."""

    origin: Path  # the checkpoint's folder, or the GGUF file
    architecture: str
    parameters: int
    outtype: str
    template: str | None  # its name; "keep": the checkpoint's own; "custom": another; None: there is none
    head: bytes
    tensors: tuple[Planned, ...]
    files: WeightFiles
    checks: tuple[str, ...]  # what the user should know
    before: tuple[Callable[[], Iterable[str]], ...] = field(default=(), repr=False)  # to be proven before the writing

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.head) + sum(padded(tensor.nbytes) for tensor in self.tensors)

    @property
    def memory(self) -> int:
        """Bytes that the chunks under way take at most, on top of what the program has already."""
        largest = max(step(tensor) * tensor.source.row_bytes for tensor in self.tensors)
        return largest * 4 * (2 * WORKERS + 1)  # as read, as float32 where that is more, transformed, and encoded

    def by_type(self) -> dict[str, tuple[int, int]]:
        """Sum up the tensors by type: how many, and their bytes; the largest share first."""
        found: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors:
            count, size = found.get(tensor.kind.name, (0, 0))
            found[tensor.kind.name] = count + 1, size + tensor.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


@dataclass(frozen=True)
class Conversion:
    """What ``write_plan`` did."""

    output: Path
    architecture: str
    parameters: int
    outtype: str
    bytes: int
    template: str | None
    seconds: float
    peak_mb: float  # highest memory of the whole process so far, verification apart; 0 where the system does not say
    checks: tuple[str, ...]  # what was proven, and what the user should know; what is bad begins with "warning: "


def plan_checkpoint(
    checkpoint: Checkpoint,
    outtype: str = "q8_0",
    *,
    chat_template: str | None = None,
    template_name: str | None = None,
    pre: str | None = None,
    check: bool = True,
    options: QuantizeOptions = AS_USUAL,
) -> ConversionPlan:
    """Plan the file that a checkpoint becomes.

    outtype: one of OUTTYPES, or any type of llama-quantize, in any case. chat_template: None keeps the checkpoint's
    own; another one replaces it, and the original stays in the file under the name "original". template_name: written
    as ``metaalign.template``. pre: llama.cpp's name for the pre-tokenizer, where the table does not know it. check:
    have the pre-tokenizer proven before the writing (see ``prove_pre_tokenizer``). options: how to quantise.

    Raises LoadError.
    """
    outtype = canonical_outtype(outtype)
    pre = choose_pre_tokenizer(checkpoint, pre)
    templates = templates_to_write(checkpoint.templates, chat_template)
    files = WeightFiles(reopener(checkpoint.folder, [tensor for tensor, _ in checkpoint.mapped]))
    direct = outtype in OUTTYPES and not options
    tensors = plan_tensors(checkpoint, outtype if direct else None, files)
    writer = describe(checkpoint, outtype if direct else "f32", pre, templates, template_name)
    for planned in tensors:  # the library takes the type from raw_dtype
        writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, planned.kind)
    buffer = io.BytesIO()
    write_head(writer, buffer)
    head = buffer.getvalue()
    if not direct:
        head, tensors = _planned_by_llama_cpp(head, tensors, outtype, options)
    checks = [*checkpoint.vocabulary.notes, *checkpoint.notes]
    if "default" not in templates:
        checks.append("no chat template: the checkpoint has none")
    proofs: list[Callable[[], Iterable[str]]] = [lambda: _tied_head_is_equal(checkpoint)]
    if check:
        proofs.insert(0, lambda: [prove_pre_tokenizer(checkpoint, pre)])
    return ConversionPlan(
        origin=checkpoint.folder.root,
        architecture=checkpoint.architecture,
        parameters=checkpoint.parameters,
        outtype=outtype,
        template=_template_word(checkpoint, templates, template_name),
        head=head,
        tensors=tuple(tensors),
        files=files,
        checks=tuple(checks),
        before=tuple(proofs),
    )


def _template_word(checkpoint: Checkpoint, templates: Mapping[str, str], name: str | None) -> str | None:
    if "default" not in templates:
        return None
    return name or ("keep" if templates["default"] == checkpoint.chat_template else "custom")


def plan_tensors(checkpoint: Checkpoint, outtype: str | None, files: WeightFiles) -> list[Planned]:
    """List the file's tensors in order: those made from the configuration, then those of the shards.

    outtype: one of OUTTYPES, None: each matrix in the type that it is stored in.
    """
    plan = []
    for name, array in checkpoint.piece.extra(checkpoint.config):
        plan.append(Planned(name, array.shape, choose_type(name, array.shape, Type.F32), Made(name, array)))
    for output in checkpoint.outputs():
        wanted = OUTTYPES[outtype][0] if outtype else Type[output.tensor.dtype]
        kind = choose_type(output.name, output.shape, wanted)
        source = Stored(files, output.tensor, checkpoint.patches.get(output.tensor.name), output.transform)
        plan.append(Planned(output.name, output.shape, kind, source))
    return plan


def plan_gguf(path: Path, outtype: str = "q8_0", *, options: QuantizeOptions = AS_USUAL) -> ConversionPlan:
    """Plan to quantise a GGUF file, in float or quantised already, anew; its other keys stay as they are.

    Raises NotFound or LoadError.
    """
    outtype = canonical_outtype(outtype)
    head = read_head(path)
    architecture = head.text("general.architecture")
    if not head.entries or architecture is None:
        raise LoadError(f"{path}: a GGUF file without a model in it")
    if (head.number("split.count") or 1) > 1:
        raise LoadError(f"{path}: one of several parts; join them first with llama.cpp's llama-gguf-split --merge")
    result = quantized(path, head, outtype, options)
    files = WeightFiles(lambda name: path.open("rb"))
    entries = {entry.name: entry for entry in head.entries}
    tensors = tuple(
        Planned(name, entries[name].shape, kind, Packed(files, path.name, entries[name]), result.importance.get(name))
        for name, kind in result.types.items()
    )
    again = {entry.kind.name for entry in head.entries if entry.kind.name not in STORED_AS}
    again -= {"Q8_0"} | {tensor.kind.name for tensor in tensors}
    checks = [f"warning: quantised already ({some(sorted(again))}): an original in F16 gives better results"]
    return ConversionPlan(
        origin=path.resolve(),
        architecture=architecture,
        parameters=sum(entry.nbytes and int(np.prod(entry.shape)) for entry in head.entries),
        outtype=outtype,
        template=(head.text(TEMPLATE_KEY) or "keep") if "tokenizer.chat_template" in head.metadata else None,
        head=pack_head(result.metadata, [(tensor.name, tensor.shape, tensor.kind) for tensor in tensors]),
        tensors=tensors,
        files=files,
        checks=tuple(checks if again else []),
    )


def _planned_by_llama_cpp(
    head: bytes, tensors: list[Planned], outtype: str, options: QuantizeOptions
) -> tuple[bytes, list[Planned]]:
    """Let llama.cpp choose the types, on a file with holes for weights. Returns the head and the tensors in order."""
    with tempfile.TemporaryDirectory(prefix="metaalign-edge-") as folder:
        path = Path(folder) / "weightless.gguf"
        try:
            path.write_bytes(head)
            os.truncate(path, len(head) + sum(padded(tensor.nbytes) for tensor in tensors))
        except OSError as error:
            raise LoadError(f"{folder}: cannot be written ({error.strerror}); set TMPDIR to another folder") from None
        result = quantized(path, read_head(path), outtype, options)
    named = {tensor.name: tensor for tensor in tensors}
    ordered = [
        replace(named[name], kind=kind, importance=result.importance.get(name)) for name, kind in result.types.items()
    ]
    return pack_head(result.metadata, [(tensor.name, tensor.shape, tensor.kind) for tensor in ordered]), ordered


# -- the writing ------------------------------------------------------------------------------------------------------


def write_gguf(
    checkpoint: Checkpoint,
    output: Path,
    *,
    outtype: str = "q8_0",
    chat_template: str | None = None,
    template_name: str | None = None,
    force: bool = False,
    pre: str | None = None,
    check: bool = True,
    options: QuantizeOptions = AS_USUAL,
    progress: Progress | None = None,
    verify: Verify | None = None,
) -> Conversion:
    """Convert ``checkpoint`` to the GGUF file ``output``; see ``plan_checkpoint`` and ``write_plan``."""
    canonical_outtype(outtype)
    check_output(output, force)
    plan = plan_checkpoint(
        checkpoint,
        outtype,
        chat_template=chat_template,
        template_name=template_name,
        pre=pre,
        check=check,
        options=options,
    )
    return write_plan(plan, output, force=force, progress=progress, verify=verify)


def write_plan(
    plan: ConversionPlan,
    output: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    verify: Verify | None = None,
) -> Conversion:
    """Write the GGUF file ``output``. Memory stays small whatever the model.

    force: replace an existing file. progress: called after every chunk; it may raise, to stop. verify: called with the
    path of the finished file before it gets its name; what it returns is added to the checks, what it raises stops.

    Raises UsageError, CannotWrite or LoadError; whatever is raised, nothing is left behind.
    """
    begun = time.perf_counter()
    check_output(output, force)
    _not_its_own_source(plan.origin, output)
    check_space(output, plan.bytes)
    proven = [line for proof in plan.before for line in proof()]
    with whole_file(output) as part:
        with part.open("wb") as file, plan.files:
            file.write(plan.head)
            overflown = _write_tensors(plan, file, progress)
        seconds, peak = time.perf_counter() - begun, peak_mb()
        verified = tuple(verify(part)) if verify else ()
    warnings = [f"warning: {line}" for line in overflown]
    return Conversion(
        output=output,
        architecture=plan.architecture,
        parameters=plan.parameters,
        outtype=plan.outtype,
        bytes=plan.bytes,
        template=plan.template,
        seconds=seconds,
        peak_mb=peak,
        checks=(*proven, *plan.checks, *warnings, *verified),
    )


class Piece(NamedTuple):
    """Some rows of a tensor."""

    tensor: Planned
    first: int
    rows: int


def step(tensor: Planned) -> int:
    """Return how many rows of a tensor make a chunk."""
    unit = tensor.source.unit
    rows = max(1, CHUNK // max(1, tensor.source.row_bytes) // unit) * unit
    return min(rows, tensor.source.rows)


def _pieces(plan: ConversionPlan) -> Iterator[Piece]:
    """Cut the tensors into chunks, in order; none crosses from one expert's matrix into another's."""
    for tensor in plan.tensors:
        rows = tensor.source.rows
        together = rows if tensor.importance is None else rows // len(tensor.importance)
        for start in range(0, rows, together):
            for first in range(start, start + together, step(tensor)):
                yield Piece(tensor, first, min(step(tensor), start + together - first))


def _encode_piece(piece: Piece) -> Encoded:
    tensor, first, count = piece
    rows, dtype = tensor.source.read(first, count)
    importance = None
    if tensor.importance is not None:
        importance = tensor.importance[first // (tensor.source.rows // len(tensor.importance))]
    return encode(tensor.source.name, rows, dtype, tensor.kind, importance)


def _encoded(pieces: Iterator[Piece]) -> Generator[tuple[Piece, Encoded], None, None]:
    """Read and encode in several threads, a few chunks ahead; yield in order."""
    ahead: deque[tuple[Piece, Future[Encoded]]] = deque()
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="encode") as pool:
        try:
            for piece in pieces:
                ahead.append((piece, pool.submit(_encode_piece, piece)))
                if len(ahead) > 2 * WORKERS:
                    done, future = ahead.popleft()
                    yield done, future.result()
            while ahead:
                done, future = ahead.popleft()
                yield done, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def _write_tensors(plan: ConversionPlan, file: BinaryIO, progress: Progress | None) -> list[str]:
    """Write the weights. Returns a sentence if float16 was too small for some."""
    total, done, size = sum(tensor.nbytes for tensor in plan.tensors), 0, 0
    too_large: dict[str, float] = {}
    with closing(_encoded(_pieces(plan))) as encoded:  # whatever is raised here, no thread reads on
        for (tensor, first, count), (data, largest) in encoded:
            file.write(np.ascontiguousarray(data).data.cast("B"))
            size += data.nbytes
            if first + count == tensor.source.rows:
                file.write(bytes(-size % ALIGNMENT))
                done, size = done + size, 0
            if largest >= HALF_LIMIT and tensor.kind not in WIDE:
                too_large[tensor.source.name] = max(largest, too_large.get(tensor.source.name, 0))
            if progress is not None:
                progress(tensor.name, done + size, total)
    if not too_large:
        return []
    return [
        f"{some(list(too_large))} hold numbers up to {max(too_large.values()):g}, and float16, in which {plan.outtype} "
        "stores them or their scales, ends at 65504: infinities may be in the file; use --outtype bf16"
    ]


def _tied_head_is_equal(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Make sure that a saved head which is to be left out really is the embedding. Raises LoadError."""
    head = checkpoint.tied_head
    if head is None:
        return ()
    embedding = next(tensor for tensor, _ in checkpoint.mapped if tensor.name == checkpoint.embedding)
    count = max(1, CHUNK // max(1, embedding.nbytes // embedding.shape[0]))
    with WeightFiles(reopener(checkpoint.folder, (head, embedding))) as files:
        for row in range(0, head.shape[0], count):
            rows = min(count, head.shape[0] - row)
            same = head.dtype == embedding.dtype and np.array_equal(
                read_rows(files, head, row, rows), read_rows(files, embedding, row, rows)
            )
            if not same:
                raise LoadError(
                    "lm_head.weight differs from the embedding that config.json ties it to; set tie_word_embeddings "
                    "to false to keep it, or remove the tensor"
                )
    return ()


def _not_its_own_source(origin: Path, output: Path) -> None:
    target = output.resolve()
    if target == origin or (target.parent == origin and output.exists() and output.suffix != ".gguf"):
        whose = "the source itself" if target == origin else "one of the checkpoint's own files"
        raise CannotWrite(f"{output}: {whose}; name another output")
