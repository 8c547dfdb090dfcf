"""Write a GGUF file as planned. The weights stream through in chunks of rows, so that memory stays small.

Several threads read and encode one chunk each; the calling thread writes the chunks in order.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from metaalign_edge_runtime.errors import CannotWrite, some
from metaalign_edge_runtime.llama.memory import peak_mb

from .checkpoint import Checkpoint
from .container import ALIGNMENT
from .encode import HALF_LIMIT, WIDE, Encoded, encode
from .output import check_output, check_space, whole_file
from .plan import AS_USUAL, WORKERS, ConversionPlan, Planned, plan_checkpoint, step
from .quantize import QuantizeOptions, canonical_outtype

Progress = Callable[[str, int, int], None]  # takes a tensor's name, the bytes of weights written, and all bytes
Verify = Callable[[Path], Iterable[str]]  # checks the file before it gets its name; returns remarks


@dataclass(frozen=True)
class Conversion:
    """A file that was written."""

    output: Path
    architecture: str
    parameters: int
    outtype: str
    bytes: int
    template: str | None
    seconds: float
    peak_mb: float  # largest memory of the process before the verification; 0 where the system does not tell
    checks: tuple[str, ...]  # what was proven, and remarks for the user; those of bad things begin with "warning: "


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
    """Convert `checkpoint` to the GGUF file `output`; see `plan_checkpoint` and `write_plan`."""
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
    """Write the GGUF file `output`.

    force: replace an existing file. progress: called after every chunk; it stops the writing by raising. verify: called
    with the path of the complete file before that gets its name; its remarks join the checks, and it may raise.

    Raises UsageError, CannotWrite or LoadError; no file is left behind then.
    """
    begun = time.perf_counter()
    check_output(output, force)
    _not_its_own_source(plan.origin, output)
    check_space(output, plan.bytes)
    proven = [line for proof in plan.proofs for line in proof()]
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
    """Rows of a tensor that are read and encoded together."""

    tensor: Planned
    first: int
    rows: int


def _pieces(plan: ConversionPlan) -> Iterator[Piece]:
    """Cut the tensors into chunks, in order. No chunk holds rows of two experts: each has its own importance."""
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
    """Read and encode chunks in several threads, a few ahead of the writer; yield them in order."""
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
    """Write the weights. Returns a warning if some are too large for float16."""
    total, done, size = sum(tensor.nbytes for tensor in plan.tensors), 0, 0
    too_large: dict[str, float] = {}
    with closing(_encoded(_pieces(plan))) as encoded:  # so that no thread reads on if anything is raised
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


def _not_its_own_source(origin: Path, output: Path) -> None:
    target = output.resolve()
    if target == origin or (target.parent == origin and os.path.exists(output) and output.suffix != ".gguf"):
        whose = "the source itself" if target == origin else "one of the checkpoint's own files"
        raise CannotWrite(f"{output}: {whose}; name another output")
