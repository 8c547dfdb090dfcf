"""From an opened checkpoint to a GGUF file, the weights streaming through in chunks of rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType as Type

from .architectures import Rule
from .chat import templates_to_write
from .checkpoint import EMBEDDING, Checkpoint
from .describe import describe, write_head
from .encode import OUTTYPES, choose_type, encode, encoded_size
from .errors import CannotWrite, ConvertError
from .output import atomic, check_output, check_space
from .prove import choose_pre_tokenizer, prove_pre_tokenizer
from .shards import Array, Tensor, read_rows

CHUNK = 16 * 2**20  # bytes of source that are in memory at a time
ALIGNMENT = 32  # bytes; every tensor begins at a multiple
Progress = Callable[[str, int, int], None]  # GGUF tensor name, bytes of the file's weights done, and in all


@dataclass(frozen=True)
class Conversion:
    """What ``write_gguf`` did."""

    output: Path
    architecture: str
    parameters: int
    outtype: str
    bytes: int
    template: str | None  # its name; "keep": the checkpoint's own; "custom": another; None: there is none
    seconds: float
    peak_mb: float  # highest memory of the whole process so far; 0 where the system does not say
    checks: tuple[str, ...]  # what was proven, and what the user should know


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: either read from the checkpoint or made from its configuration."""

    name: str
    shape: tuple[int, ...]
    kind: Type
    source: tuple[Tensor, Rule] | Array

    @property
    def nbytes(self) -> int:
        """Bytes in the file, before padding."""
        return encoded_size(self.shape, self.kind)


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
    progress: Progress | None = None,
) -> Conversion:
    """Convert ``checkpoint`` to the GGUF file ``output``. Memory stays small whatever the model.

    outtype: one of OUTTYPES. chat_template: None keeps the checkpoint's own; another one replaces it, and the original
    stays in the file under the name "original". template_name: written as ``metaalign.template``. force: replace an
    existing file. pre: llama.cpp's name for the pre-tokenizer, where the table does not know it. check: prove the
    pre-tokenizer (see ``prove_pre_tokenizer``). progress: called after every chunk; it may raise, to stop.

    Raises OutputExists, CannotWrite or ConvertError; whatever is raised, nothing is left behind.
    """
    begun = time.perf_counter()
    if outtype not in OUTTYPES:
        raise ConvertError(f"outtype {outtype!r} is not one of {', '.join(OUTTYPES)}")
    check_output(output, force)
    _not_its_own_source(checkpoint, output)
    pre = choose_pre_tokenizer(checkpoint, pre)
    templates = templates_to_write(checkpoint.templates, chat_template)
    plan = plan_tensors(checkpoint, outtype)
    writer = describe(checkpoint, outtype, pre, templates, template_name)
    for planned in plan:  # the library takes the type from raw_dtype
        writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, planned.kind)
    check_space(output, sum(planned.nbytes for planned in plan))
    checks = list(checkpoint.vocabulary.notes)
    if check:
        checks.insert(0, prove_pre_tokenizer(checkpoint, pre))
    if "default" not in templates:
        checks.append("no chat template: the checkpoint has none")
    _tied_head_is_equal(checkpoint)
    with atomic(output) as file:
        write_head(writer, file)
        _write_tensors(checkpoint, plan, file, progress)
        size = file.tell()
    return Conversion(
        output=output,
        architecture=checkpoint.architecture,
        parameters=checkpoint.parameters,
        outtype=outtype,
        bytes=size,
        template=_template_word(checkpoint, templates, template_name),
        seconds=time.perf_counter() - begun,
        peak_mb=peak_mb(),
        checks=tuple(checks),
    )


def _template_word(checkpoint: Checkpoint, templates: Mapping[str, str], name: str | None) -> str | None:
    if "default" not in templates:
        return None
    return name or ("keep" if templates["default"] == checkpoint.chat_template else "custom")


def plan_tensors(checkpoint: Checkpoint, outtype: str) -> list[Planned]:
    """List the file's tensors in order: those made from the configuration, then those of the shards."""
    wanted = OUTTYPES[outtype][0]
    plan = [
        Planned(name, array.shape, choose_type(name, array.shape, wanted), array)
        for name, array in checkpoint.piece.extra(checkpoint.config)
    ]
    names = checkpoint.gguf_names()
    for tensor, rule in checkpoint.mapped:
        name = names[tensor.name]
        plan.append(Planned(name, tensor.shape, choose_type(name, tensor.shape, wanted), (tensor, rule)))
    return plan


def _write_tensors(checkpoint: Checkpoint, plan: list[Planned], file: BinaryIO, progress: Progress | None) -> None:
    total, done = sum(planned.nbytes for planned in plan), 0
    for planned in plan:
        written = 0
        for chunk in _chunks(checkpoint, planned):
            file.write(np.ascontiguousarray(chunk).data.cast("B"))
            written += chunk.nbytes
            if progress is not None:
                progress(planned.name, done + written, total)
        file.write(bytes(-written % ALIGNMENT))
        done += written


def _chunks(checkpoint: Checkpoint, planned: Planned) -> Iterator[Array]:
    """Yield a tensor in the file's type, some rows at a time."""
    if not isinstance(planned.source, tuple):
        yield encode(planned.name, planned.source, "F32", planned.kind)
        return
    tensor, rule = planned.source
    rows = tensor.shape[0]
    transform = rule.transform(checkpoint.config, rows) if rule.transform else None
    unit = transform.unit if transform else 1
    row_bytes = max(1, tensor.nbytes // rows)
    step = max(1, CHUNK // row_bytes // unit) * unit
    with checkpoint.folder.open(tensor.shard) as shard:
        for first in range(0, rows, step):
            data = read_rows(shard, tensor, first, min(step, rows - first))
            yield encode(tensor.name, transform.apply(data) if transform else data, tensor.dtype, planned.kind)


def _tied_head_is_equal(checkpoint: Checkpoint) -> None:
    """Make sure that a saved head which is to be left out really is the embedding. Raises ConvertError."""
    head = checkpoint.tied_head
    if head is None:
        return
    embedding = next(tensor for tensor, _ in checkpoint.mapped if tensor.name == EMBEDDING)
    step = max(1, CHUNK // max(1, embedding.nbytes // embedding.shape[0]))
    with checkpoint.folder.open(head.shard) as first, checkpoint.folder.open(embedding.shard) as second:
        for row in range(0, head.shape[0], step):
            count = min(step, head.shape[0] - row)
            ours, theirs = read_rows(first, head, row, count), read_rows(second, embedding, row, count)
            if head.dtype != embedding.dtype or not np.array_equal(ours, theirs):
                raise ConvertError(
                    "lm_head.weight differs from the embedding that config.json ties it to; set tie_word_embeddings "
                    "to false to keep it, or remove the tensor"
                )


def _not_its_own_source(checkpoint: Checkpoint, output: Path) -> None:
    inside = output.resolve().parent == checkpoint.folder.root
    if inside and output.exists() and output.suffix != ".gguf":
        raise CannotWrite(f"{output}: one of the checkpoint's own files; name another output")


def peak_mb() -> float:
    """Return the process's highest memory use in MB, 0 where the system does not say."""
    try:  # Linux: getrusage would include what the parent used before it started this program
        (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
