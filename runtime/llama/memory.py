"""Whether a model fits into memory, computed from its metadata before anything is loaded.

The sizes of weights and KV cache are exact; those of compute buffers are off by a few per cent. Layers are assigned to
devices by llama.cpp's own rule.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ..errors import LoadError, in_bytes
from .gguf import GGUFArray, ModelFile

PREFILL_CHUNK = 512  # tokens per call: GPUs have no abort callback, so Ctrl-C is checked between calls


def peak_mb() -> float:
    """Return the process's peak memory use in MB; 0 if the system does not report it."""
    try:  # Linux: getrusage would include the parent's memory at the time of the fork
        (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, other systems kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def trim_memory() -> None:
    """Return freed memory to the system: glibc keeps it per thread, 20 MB after loading a vocabulary."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, another system
        ctypes.CDLL(None).malloc_trim(0)


SPARE = 1 << 29  # bytes of a GPU's memory that -ngl auto leaves free for the driver and other programs
SHARE = 0.9  # share of the free main memory that -c auto and the advice in errors use
CELLS = 256  # tokens; llama.cpp rounds a context up to a multiple of it
MOST_LAYERS = 512  # llama.cpp's limit
UNFORETOLD = (  # metadata keys of architectures with another kind of cache: compressed, shared by layers, recurrent
    "attention.kv_lora_rank attention.key_length_swa attention.shared_kv_layers attention.indexer.head_count "
    "attention.recurrent_layers nextn_predict_layers ssm.state_size wkv.head_size kda.head_dim altup.num_inputs"
).split()


class Device(NamedTuple):
    """A device that llama.cpp can compute on."""

    name: str
    description: str
    kind: int  # 0: CPU, 1: GPU, 2: GPU that shares main memory (ggml-backend.h)
    free: int  # bytes
    total: int  # bytes


class Need(NamedTuple):
    """The bytes that main memory or a device has to hold."""

    weights: int
    cache: int  # keys and values, and recurrent states of a fixed size
    compute: int  # intermediate results and logits


def cache_bytes(file: ModelFile) -> tuple[int, ...] | None:
    """Return the bytes of KV cache per token for each layer: keys and values, 16 bits a number.

    A sliding window saves nothing: llama.cpp is told to keep all tokens, so that a conversation can be cut anywhere.
    None if the size cannot be computed: the cache is compressed, shared by layers, or recurrent (except for LFM2).
    """
    if any(f"{file.architecture}.{key}" in file.metadata for key in UNFORETOLD):
        return None
    layers, heads = min(file.number("block_count"), MOST_LAYERS), file.number("attention.head_count", 1)
    each = file.number("embedding_length") // max(1, heads)
    width = file.number("attention.key_length", each) + file.number("attention.value_length", each)
    by_layer = [count for count in file.items(f"{file.architecture}.attention.head_count_kv") if isinstance(count, int)]
    if len(by_layer) != layers:
        by_layer = [file.number("attention.head_count_kv", heads)] * layers
    return tuple(2 * width * count for count in by_layer)


def state_bytes(file: ModelFile, cache: Sequence[int]) -> tuple[int, ...]:
    """Return the bytes per sequence, whatever its length, for each layer: the inputs of a convolution (LFM2)."""
    state = 4 * max(0, file.number("shortconv.l_cache") - 1) * file.number("embedding_length")
    return tuple(0 if grows else state for grows in cache)


def step_numbers(file: ModelFile) -> int:
    """Return the most 32-bit numbers that llama.cpp holds per token while it computes; the formula is empirical.

    The widest part of a layer decides: its feed-forward network, the outputs of its experts, or its attention.
    """
    width, heads = file.number("embedding_length"), file.number("attention.head_count", 1)
    each = file.number("attention.key_length", width // max(1, heads))
    queries, keys = heads * each, file.number("attention.head_count_kv", heads) * each
    experts, inner = file.number("expert_used_count"), file.number("feed_forward_length")
    expert = file.number("expert_feed_forward_length", inner)
    forward = 3 * max(inner, experts * expert) + 3 * width + max(width, queries)
    return max(forward, 2 * experts * (width + expert), 2 * (queries + keys + 2 * width))


@dataclass(frozen=True)
class Footprint:
    """The sizes that decide how much memory a model takes."""

    weights: tuple[int, ...]  # bytes of each layer and, last, of the output
    embedding: int  # bytes of the input embeddings, which stay in main memory
    tied: bool  # the output layer uses the input embeddings as its weights
    cache: tuple[int, ...]  # bytes per token, by layer
    states: tuple[int, ...]  # bytes per sequence, by layer
    foretold: bool  # whether `cache` and `states` are known; otherwise they are 0
    numbers: int  # per token, see `step_numbers`
    masks: int  # attention masks: 2 with a sliding window, which has a mask of its own
    vocabulary: int  # tokens

    @classmethod
    def of(cls, file: ModelFile) -> Footprint:
        """Compute the footprint from a model's metadata.

        Raises:
            LoadError: the list of tensors is damaged. NotFound: a part of the model is missing.
        """
        layers = min(file.number("block_count"), MOST_LAYERS)
        weights, embedding, tied = [0] * (layers + 1), 0, True
        for part in file.files():
            for name, size in part.tensors().items():
                number = name.split(".")[1] if name.startswith("blk.") else ""
                if name.startswith("token_embd."):
                    embedding += size
                else:
                    weights[min(int(number), layers) if number.isdecimal() else layers] += size
                tied = tied and name != "output.weight"
        cache, names = cache_bytes(file), file.metadata.get("tokenizer.ggml.tokens")
        known = cache or (0,) * layers
        return cls(
            weights=tuple(weights),
            embedding=embedding,
            tied=tied,
            cache=known,
            states=state_bytes(file, known) if cache else known,
            foretold=cache is not None,
            numbers=step_numbers(file),
            masks=2 if file.number("attention.sliding_window") else 1,
            vocabulary=names.length if isinstance(names, GGUFArray) else file.number("vocab_size"),
        )

    @property
    def bytes(self) -> int:
        """The bytes of all weights."""
        return sum(self.weights) + self.embedding

    def needs(self, places: Sequence[int], context: int, sequences: int) -> list[Need]:
        """Return the needs of main memory, then of each device.

        Args:
            places: the place of each layer and, last, of the output, as `placed` returns them.
        """
        cells, last = -(-context * sequences // CELLS) * CELLS, len(places) - 1
        batch, logits = min(cells, max(PREFILL_CHUNK, sequences)), 4 * self.vocabulary * sequences
        compute = logits + max(logits, batch * (4 * self.numbers + 2 * cells * self.masks))
        stay = max((self.weights[layer] for layer, place in enumerate(places) if not place), default=0)
        found = [Need(self.embedding, 0, compute)]
        found += [Need(0, 0, compute + stay)] * max(places)  # for a long prompt, llama.cpp copies each layer to the GPU
        for layer, place in enumerate(places):
            weights, cache, compute = found[place]
            weights += self.weights[layer]
            if layer < last:
                cache += self.cache[layer] * cells + self.states[layer] * sequences
            elif place and self.tied:
                weights += self.embedding
            found[place] = Need(weights, cache, compute)
        return found


def placed(layers: int, offloaded: int, free: Sequence[int]) -> list[int]:
    """Return the place of each layer and, last, of the output: 0 is main memory, 1 the first device.

    As in llama.cpp's `load_tensors`, the last layers go to the devices, in proportion to each device's free memory.
    """
    offloaded = min(offloaded, layers) if free else 0
    ends = list(itertools.accumulate(free))
    shares = [end / max(1, ends[-1]) for end in ends]
    on = [min(bisect.bisect_right(shares, number / offloaded), len(free) - 1) + 1 for number in range(offloaded)]
    return [0] * (layers - offloaded) + on


@dataclass(frozen=True)
class Plan:
    """The places of a model's layers, with the memory that is needed and free there."""

    footprint: Footprint
    places: tuple[int, ...]  # as `placed` returns them
    context: int  # tokens of each sequence
    sequences: int
    free: tuple[float, ...]  # bytes of main memory, and of each device
    names: tuple[str, ...] = ()  # the devices' names
    sequences_per_answer: int = 1
    loaded: bool = False  # the weights are on the devices already, and not counted in `free`

    @property
    def offloaded(self) -> int:
        """The number of layers on devices, including the output."""
        return sum(place > 0 for place in self.places)

    @property
    def needs(self) -> list[Need]:
        """The needs of main memory, then of each device that is used."""
        return self.footprint.needs(self.places, self.context, self.sequences)

    def over_budget(self, roomy: bool = False, whole: bool = False) -> list[int]:
        """List the places that cannot hold their part.

        Args:
            roomy: leave a reserve free: SPARE on devices, 1 - SHARE of main memory.
            whole: count the weights in main memory; without room for them, they are read from the file again.
        """
        found = []
        for place, (need, free) in enumerate(zip(self.needs, self.free, strict=False)):
            counted = not self.loaded if place else whole
            room = free if not roomy else free - SPARE if place else SHARE * free
            if need.weights * counted + need.cache + need.compute > room:
                found.append(place)
        return found

    @property
    def reads_from_disk(self) -> bool:
        """Whether the weights do not fit into main memory, so that they are read from the disk for every token."""
        return sum(self.needs[0]) > self.free[0]

    def largest(self, most: int) -> int:
        """Return the largest context in tokens, at most `most`, that fits with a reserve; 0 if none fits."""
        contexts = range(CELLS, most + CELLS, CELLS)
        return min(most, self._last(contexts, lambda context: replace(self, context=context)))

    def largest_parallel(self) -> int:
        """Return how many answers at a time, fewer than planned, fit with a reserve; 0 if not even one does."""
        answers = range(1, self.sequences // self.sequences_per_answer)
        return self._last(answers, lambda count: replace(self, sequences=count * self.sequences_per_answer))

    @staticmethod
    def _last(counts: range, planned: Callable[[int], Plan]) -> int:
        """Return the largest count whose plan fits with the weights, else without them in main memory; 0 if none."""

        def too_large(whole: bool, count: int) -> bool:
            return bool(planned(count).over_budget(roomy=True, whole=whole))

        for whole in (True, False):
            if fits := bisect.bisect_left(counts, True, key=functools.partial(too_large, whole)):
                return counts[fits - 1]
        return 0

    def check(self, path: Path) -> None:
        """Refuse a plan that does not fit: the system would grant the memory, and kill the process later.

        Raises:
            LoadError: the plan does not fit; the message advises a smaller one.
        """
        for place in self.over_budget()[:1]:
            need, where = self.needs[place], f" on {self.names[place - 1]}" if place else ""
            weights = f"{in_bytes(need.weights)} of weights, " if place and not self.loaded else ""
            takes = f"{weights}{in_bytes(need.cache)} of cache and {in_bytes(need.compute)} to compute in"
            ways = [f"-c {fits}"] if (fits := self.largest(self.context)) else []
            ways += [f"--parallel {fits}"] if (fits := self.largest_parallel()) else []
            ways += ["-ngl auto"] if weights else []
            advice = f"{' or '.join(ways)} would fit" if ways else "take a smaller model, or end other programs"
            free = f"{in_bytes(self.free[place])} are free{where}"
            raise LoadError(f"a context of {self.size} takes {takes} for {path}, and {free}: {advice}")

    @property
    def size(self) -> str:
        """The size of the context in words."""
        return f"{self.sequences} times {self.context:,} tokens" if self.sequences > 1 else f"{self.context:,} tokens"

    def __str__(self) -> str:
        places = zip(("in main memory", *(f"on {name}" for name in self.names)), self.needs, self.free, strict=False)
        return f"{self.size}: " + "; ".join(
            f"{in_bytes(need.weights)} of weights, {in_bytes(need.cache)} of cache and {in_bytes(need.compute)} "
            f"to compute in, of {in_bytes(free)} free {name}"
            for name, need, free in places
        )


def make_plan(
    footprint: Footprint, main: float, devices: Sequence[Device], context: int, sequences: int, gpu_layers: str = "auto"
) -> Plan:
    """Plan the places of a model's layers.

    Args:
        main: free bytes of main memory.
        gpu_layers: the layers on devices: a number, `all`, or `auto` for as many as fit with their part of the cache.
    """
    layers, free = len(footprint.weights), [device.free for device in devices]
    nowhere = Plan(footprint, (), context, sequences, (main, *free), tuple(device.name for device in devices))

    def laid_out(offloaded: int) -> Plan:
        return replace(nowhere, places=tuple(placed(layers, offloaded, free)))

    if gpu_layers != "auto":
        return laid_out(layers if gpu_layers == "all" else int(gpu_layers))
    plans = (laid_out(offloaded) for offloaded in range(layers if devices else 0, 0, -1))
    return next((plan for plan in plans if not any(plan.over_budget(roomy=True))), laid_out(0))


def usable(devices: Sequence[Device]) -> list[Device]:
    """List the devices that llama.cpp offloads layers to: GPUs with memory of their own, else GPUs without."""
    found = [device for device in devices if device.kind in (1, 2)]
    found = [one if one.total else one._replace(free=int(free_memory())) for one in found]  # size unknown
    return [device for device in found if device.kind == 1] or found


def memory_limits() -> dict[str, float]:
    """Return the free bytes of the system and of the container, without swap, as far as the system reports them."""
    found = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (free,) = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        found["free"] = free
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max" means no limit
        group = Path("/sys/fs/cgroup")
        limit, taken = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        found["free for this container"] = limit - taken + float(counts["file"])  # cached files can be dropped
    return found


def physical_memory() -> float:
    """Return the bytes of main memory; infinity if the system does not report them."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def free_memory() -> float:
    """Return the free bytes of main memory, without swap; if unknown, all its bytes, or infinity."""
    return min(memory_limits().values(), default=physical_memory())
