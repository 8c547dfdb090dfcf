"""What a GGUF file will hold, planned from a checkpoint or from another GGUF file. No weight is read for it."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.gguf_writer import GGUFWriter

from metaalign_edge_runtime.errors import LoadError, some

from .chat import templates_to_write
from .checkpoint import Checkpoint
from .container import pack_head, padded, read_head
from .describe import TEMPLATE_KEY, describe, write_head
from .encode import OUTTYPES, choose_type
from .ggml import encoded_size
from .prove import choose_pre_tokenizer, prove_pre_tokenizer
from .quantize import QuantizeOptions, canonical_outtype, quantized
from .shards import STORED_AS, Array, WeightFiles, read_rows, reopener
from .sources import Made, Packed, Source, Stored

CHUNK = 2**20  # bytes of the source that a thread encodes at a time; they fit the processor's cache
# Threads that encode: one for each processor that this process may use.
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
AS_USUAL = QuantizeOptions()


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to write."""

    name: str
    shape: tuple[int, ...]
    kind: Type
    source: Source
    importance: Array | None = None  # (experts, columns): the weight of the error in each column

    @property
    def nbytes(self) -> int:
        """Return the bytes in the file, without padding."""
        return encoded_size(self.shape, self.kind)


@dataclass(frozen=True)
class ConversionPlan:
    """The contents of a file to write. No weight has been read yet, and nothing written."""

    origin: Path  # the checkpoint's folder, or the GGUF file
    architecture: str
    parameters: int
    outtype: str
    template: str | None  # its name; "keep": the checkpoint's own; "custom": one without a name; None: no template
    head: bytes
    tensors: tuple[Planned, ...]
    files: WeightFiles
    checks: tuple[str, ...]  # remarks for the user; those of bad things begin with "warning: "
    # Proofs to make before the writing: each returns remarks for the user, or raises LoadError.
    proofs: tuple[Callable[[], Iterable[str]], ...] = field(default=(), repr=False)

    @property
    def bytes(self) -> int:
        """Return the size of the file."""
        return len(self.head) + sum(padded(tensor.nbytes) for tensor in self.tensors)

    @property
    def memory(self) -> int:
        """Return the bytes that all chunks in work take at most, beyond the memory that the program has already."""
        largest = max(step(tensor) * tensor.source.row_bytes for tensor in self.tensors)
        return largest * 4 * (2 * WORKERS + 1)  # four copies of each: as read, as float32, transformed, encoded

    def by_type(self) -> dict[str, tuple[int, int]]:
        """Return the number of tensors of each type, and their bytes; the type with most bytes comes first."""
        found: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors:
            count, size = found.get(tensor.kind.name, (0, 0))
            found[tensor.kind.name] = count + 1, size + tensor.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def step(tensor: Planned) -> int:
    """Return the number of rows of a tensor that make a chunk."""
    unit = tensor.source.unit
    rows = max(1, CHUNK // max(1, tensor.source.row_bytes) // unit) * unit
    return min(rows, tensor.source.rows)


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

    outtype: one of OUTTYPES or any type of llama-quantize, in upper or lower case. chat_template: a template that
    replaces the checkpoint's own, which stays in the file as "original". template_name: stored as `metaalign.template`.
    pre: llama.cpp's name of the pre-tokenizer, for one that cannot be found. check: prove the pre-tokenizer before the
    writing (see `prove_pre_tokenizer`). options: how to quantize.

    Raises UsageError for an unknown outtype, LoadError for all that cannot be converted.
    """
    outtype = canonical_outtype(outtype)
    pre = choose_pre_tokenizer(checkpoint, pre)
    templates = templates_to_write(checkpoint.templates, chat_template)
    files = WeightFiles(reopener(checkpoint.folder, [tensor for tensor, _ in checkpoint.mapped]))
    direct = outtype in OUTTYPES and not options
    tensors = plan_tensors(checkpoint, outtype if direct else None, files)
    writer = describe(checkpoint, outtype if direct else "f32", pre, templates, template_name)
    head = _head(writer, tensors)
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
        proofs=tuple(proofs),
    )


def _head(writer: GGUFWriter, tensors: Iterable[Planned]) -> bytes:
    """Pack the head of a file: the keys that the writer holds, and the list of tensors."""
    for planned in tensors:  # with a ggml type given, the library ignores the numpy type
        writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, planned.kind)
    buffer = io.BytesIO()
    write_head(writer, buffer)
    return buffer.getvalue()


def _template_word(checkpoint: Checkpoint, templates: Mapping[str, str], name: str | None) -> str | None:
    if "default" not in templates:
        return None
    return name or ("keep" if templates["default"] == checkpoint.chat_template else "custom")


def plan_tensors(checkpoint: Checkpoint, outtype: str | None, files: WeightFiles) -> list[Planned]:
    """List the tensors of the file in order: those computed from the configuration, then those of the shards.

    outtype: one of OUTTYPES; None leaves each matrix in the type in which it is stored.
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
    """Plan to quantize a GGUF file, which may be quantized already. Its other keys stay as they are.

    Raises UsageError for an unknown outtype, NotFound or LoadError for the file.
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
    checks = [f"warning: quantized already ({some(sorted(again))}): an original in F16 gives better results"]
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
    """Let llama.cpp choose the types, from a sparse file without weights. Returns the head and the tensors in order."""
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


def _tied_head_is_equal(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Make sure that a saved head, which the file leaves out, equals the embedding. Raises LoadError."""
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
