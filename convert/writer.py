"""From a plan to a GGUF file, the weights streaming through in chunks of rows.

Some threads read and encode a chunk each, and this one writes them in order.
"""

from __future__ import annotations

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

Progress = Callable[[str, int, int], None]  # GGUF tensor name, bytes of the file's weights done, and in all
Verify = Callable[[Path], Iterable[str]]  # looks at the finished file before it gets its name; says what it found


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


def _not_its_own_source(origin: Path, output: Path) -> None:
    target = output.resolve()
    if target == origin or (target.parent == origin and output.exists() and output.suffix != ".gguf"):
        whose = "the source itself" if target == origin else "one of the checkpoint's own files"
        raise CannotWrite(f"{output}: {whose}; name another output")
