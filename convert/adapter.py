"""A LoRA adapter as a GGUF file of its own, which llama.cpp applies to the base model at run time.

Tensors and keys follow llama.cpp's convert_lora_to_gguf.py (MIT). At run time the change is `alpha / rank * B @ A`,
with one alpha for the whole file and the rank of each B. Other scales are multiplied into B; the rest is refused.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.gguf_writer import GGUFWriter

from metaalign_edge_runtime.errors import CannotWrite, LoadError, counted, some
from metaalign_edge_runtime.llama.memory import peak_mb

from .architectures import Transform
from .checkpoint import Checkpoint, Output
from .container import ALIGNMENT
from .describe import write_head
from .encode import OUTTYPES, choose_type, encode
from .ggml import encoded_size
from .lora import Pair, PeftAdapter
from .lora_settings import SETTINGS
from .metadata import read_metadata
from .output import check_output, check_space, whole_file
from .patch import read_numbers
from .shards import Array
from .writer import Conversion

INSTEAD = "merge it instead (leave --lora-only out)"


@dataclass(frozen=True)
class Half:
    """One tensor of the file: A or B of a pair."""

    name: str
    shape: tuple[int, ...]
    kind: Type
    pair: Pair
    transform: Transform | None  # that the base model's tensor goes through; it applies to the rows of B, too


def write_adapter(
    checkpoint: Checkpoint, adapter: PeftAdapter, output: Path, *, outtype: str = "f32", force: bool = False
) -> Conversion:
    """Write `adapter` as the GGUF file `output`, for GGUFs that were converted from `checkpoint`, its base model.

    outtype: one of OUTTYPES. force: replace an existing file.

    Raises UsageError, CannotWrite, or LoadError for what only merging can express; nothing is left behind then.
    """
    begun = time.perf_counter()
    if outtype not in OUTTYPES:
        raise LoadError(f"outtype {outtype!r} is not one of {', '.join(OUTTYPES)}")
    check_output(output, force)
    if os.path.exists(output) and output.resolve().parent == adapter.folder.root and output.suffix != ".gguf":
        raise CannotWrite(f"{output}: one of the adapter's own files; name another output")
    _check_expressible(checkpoint, adapter)
    halves = list(_plan(checkpoint, adapter, OUTTYPES[outtype][0]))
    writer = _describe(checkpoint, adapter, halves)
    for half in halves:  # with a ggml type given, the library ignores the numpy type
        size = encoded_size(half.shape, half.kind)
        writer.add_tensor_info(half.name, half.shape, np.dtype(np.float32), size, half.kind)
    check_space(output, sum(encoded_size(half.shape, half.kind) for half in halves))
    with whole_file(output) as part, part.open("wb") as file:
        write_head(writer, file)
        for half in halves:
            data = encode(half.name, _numbers(adapter, half), "F32", half.kind).data
            file.write(np.ascontiguousarray(data).data.cast("B"))
            file.write(bytes(-data.nbytes % ALIGNMENT))
        size = file.tell()
    changed = counted(len(adapter.pairs), "tensor")
    return Conversion(
        output=output,
        architecture=checkpoint.architecture,
        parameters=sum(math.prod(half.shape) for half in halves),
        outtype=outtype,
        bytes=size,
        template=None,
        seconds=time.perf_counter() - begun,
        peak_mb=peak_mb(),
        checks=(*adapter.notes, f"an adapter of {changed}, for GGUFs made from {checkpoint.name}"),
    )


def _check_expressible(checkpoint: Checkpoint, adapter: PeftAdapter) -> None:
    """Refuse an adapter that llama.cpp could not apply, or would apply wrongly."""
    pairs = adapter.pairs
    if adapter.scale != 1:
        raise LoadError(f"{adapter.name}: a scale belongs to the run (llama.cpp's --lora-scaled), not into the adapter")
    if replaced := [*adapter.whole, *adapter.rows]:
        raise LoadError(f"{adapter.name} replaces {some(replaced)} or rows of it, which no adapter can; {INSTEAD}")
    if any(pair.magnitude is not None for pair in pairs.values()):
        raise LoadError(f"{adapter.name}: llama.cpp's adapters know no DoRA; {INSTEAD}")
    if any(pair.bias is not None for pair in pairs.values()):
        raise LoadError(f"{adapter.name}: llama.cpp's adapters know no lora_bias; {INSTEAD}")
    tied = [name for name in (checkpoint.embedding, checkpoint.head) if name in pairs and checkpoint.tied]
    if tied:
        raise LoadError(
            f"{adapter.name} changes {some(tied)}, but the base model ties head and embedding, which llama.cpp cannot "
            f"tell apart in an adapter; {INSTEAD}"
        )
    if not np.float32(adapter.strength):
        raise LoadError(f"{SETTINGS}: lora_alpha is {adapter.alpha:g}, which llama.cpp would take for a scale of 1")


def _plan(checkpoint: Checkpoint, adapter: PeftAdapter, wanted: Type) -> Iterator[Half]:
    """List the file's tensors in order: for each pair A, then B."""
    outputs: dict[str, list[Output]] = {}
    for output in checkpoint.outputs():
        outputs.setdefault(output.tensor.name, []).append(output)
    for source, pair in adapter.pairs.items():
        a = pair.a.shape[::-1] if pair.embedding else pair.a.shape  # llama.cpp looks up rows of it, one a token
        for output in outputs[source]:  # several where the tensor is split: all have the same A
            b = pair.b.shape if pair.embedding else (output.shape[0], pair.b.shape[1])
            for suffix, shape in ((".lora_a", a), (".lora_b", b)):
                kind = choose_type(output.name, shape, wanted)
                yield Half(output.name + suffix, shape, kind, pair, output.transform)


def _describe(checkpoint: Checkpoint, adapter: PeftAdapter, halves: list[Half]) -> GGUFWriter:
    """Return a writer that holds all keys of the file, but no tensors yet."""
    writer = GGUFWriter(None, checkpoint.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    changed = sum(b.shape[0] * a.shape[-1] for a, b in zip(halves[::2], halves[1::2], strict=True))
    read_metadata(adapter.folder, -changed).set_gguf_meta_model(writer)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.strength)
    if adapter.invocation:
        writer.add_key_value(
            "adapter.alora.invocation_tokens",
            list(adapter.invocation),
            gguf.GGUFValueType.ARRAY,
            gguf.GGUFValueType.UINT32,
        )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _numbers(adapter: PeftAdapter, half: Half) -> Array:
    """Read one tensor as float32, in the layout and with the scale that llama.cpp expects."""
    pair = half.pair
    tensor = pair.a if half.name.endswith(".lora_a") else pair.b
    numbers = read_numbers(adapter.folder, tensor, 0, tensor.shape[0])
    if tensor is pair.a:
        return numbers.T if pair.embedding else numbers
    if pair.strength != adapter.strength:
        numbers = numbers * np.float32(pair.strength / adapter.strength)
    # The transforms pick and reorder rows: done to B, it is done to B @ A.
    return half.transform.apply(numbers) if half.transform else numbers
