"""Whether a model fits: what it takes is computed from its metadata, before anything is loaded.

Weights and KV cache are exact to the byte, compute buffers to some per cent. Which layer goes where is llama.cpp's own
rule.
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

PREFILL_CHUNK = 512  # tokens between two looks at the interrupt flag where llama.cpp has no abort callback (GPUs)


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


def trim_memory() -> None:
    """Give back to the system what is free: glibc keeps it for the thread that freed it, 20 MB after a vocabulary."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, another system
        ctypes.CDLL(None).malloc_trim(0)


SPARE = 1 << 29  # bytes of a GPU that -ngl auto leaves free: for its driver, and for what others take meanwhile
SHARE = 0.9  # of what is free that -c auto, and advice, use
CELLS = 256  # tokens; llama.cpp makes a context a multiple of it
MOST_LAYERS = 512  # that llama.cpp loads
UNFORETOLD = (  # what architectures have whose cache is of another kind: compressed, shared by layers, recurrent
    "attention.kv_lora_rank attention.key_length_swa attention.shared_kv_layers attention.indexer.head_count "
    "attention.recurrent_layers nextn_predict_layers ssm.state_size wkv.head_size kda.head_dim altup.num_inputs"
).split()


class Device(NamedTuple):
    """A device of llama.cpp's."""

    name: str
    description: str
    kind: int  # 0 is the CPU, 1 a GPU, 2 one that shares main memory (ggml-backend.h)
    free: int  # bytes, here and below
    total: int


class Need(NamedTuple):
    """What a place has to hold."""

    weights: int
    cache: int  # keys and values, and states that do not grow
    compute: int  # numbers between layers, and logits


def cache_bytes(file: ModelFile) -> tuple[int, ...] | None:
    """Return what a token takes in the KV cache, layer by layer, in bytes: keys and values, 16 bits a number.

    A sliding window saves nothing: we let llama.cpp keep all tokens, so that a conversation can be cut anywhere.
    None where it is not foretold: caches that are compressed, or shared by layers, and most recurrent states.
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
    """Return what a sequence takes however long it is, layer by layer, in bytes: the inputs of a convolution (LFM2)."""
    state = 4 * max(0, file.number("shortconv.l_cache") - 1) * file.number("embedding_length")
    return tuple(0 if grows else state for grows in cache)


def step_numbers(file: ModelFile) -> int:
    """Return how many 32-bit numbers llama.cpp keeps of a token while it computes, at most: found by trying.

    The widest place of a layer decides: its feed-forward network, what its experts say together, or its attention.
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
    """What decides how much memory a model takes."""

    weights: tuple[int, ...]  # bytes of each layer and, last, of the output
    embedding: int  # bytes of the input's weights, which stay in main memory
    tied: bool  # the output multiplies by them, too
    cache: tuple[int, ...]  # bytes of a token, by layer
    states: tuple[int, ...]  # bytes of a sequence, by layer
    foretold: bool  # those are known; otherwise they count as nothing
    numbers: int  # see `step_numbers`
    masks: int  # of attention: a sliding window has its own
    vocabulary: int  # tokens

    @classmethod
    def of(cls, file: ModelFile) -> Footprint:
        """Read it from a model's metadata.

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
        """Return the size of all weights."""
        return sum(self.weights) + self.embedding

    def needs(self, places: Sequence[int], context: int, sequences: int) -> list[Need]:
        """Return what each place has to hold if the layers lie there: main memory, then the devices.

        Args:
            places: of each layer and of the output, as `placed` gives them.
        """
        cells, last = -(-context * sequences // CELLS) * CELLS, len(places) - 1
        batch, logits = min(cells, max(PREFILL_CHUNK, sequences)), 4 * self.vocabulary * sequences
        compute = logits + max(logits, batch * (4 * self.numbers + 2 * cells * self.masks))
        stay = max((self.weights[layer] for layer, place in enumerate(places) if not place), default=0)
        found = [Need(self.embedding, 0, compute)]
        found += [Need(0, 0, compute + stay)] * max(places)  # a long prompt visits the GPU for every layer
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
    """Return where llama.cpp puts each of the layers, the output the last of them: 0 is main memory, 1 a first device.

    The last ones go to the devices, to each a share that is as large as what it has free (`load_tensors`).
    """
    offloaded = min(offloaded, layers) if free else 0
    ends = list(itertools.accumulate(free))
    shares = [end / max(1, ends[-1]) for end in ends]
    on = [min(bisect.bisect_right(shares, number / offloaded), len(free) - 1) + 1 for number in range(offloaded)]
    return [0] * (layers - offloaded) + on


@dataclass(frozen=True)
class Plan:
    """Where a model goes, what that takes, and what is free there."""

    footprint: Footprint
    places: tuple[int, ...]
    context: int  # tokens of each sequence
    sequences: int
    free: tuple[float, ...]  # bytes of main memory, and of each device
    names: tuple[str, ...] = ()  # of the devices
    sequences_per_answer: int = 1  # sequences of an answer
    loaded: bool = False  # what is free on a device is what the weights left

    @property
    def offloaded(self) -> int:
        """Return how many layers lie on devices, the output counted as one."""
        return sum(place > 0 for place in self.places)

    @property
    def needs(self) -> list[Need]:
        """Return what main memory has to hold, then each device that is used."""
        return self.footprint.needs(self.places, self.context, self.sequences)

    def over_budget(self, roomy: bool = False, whole: bool = False) -> list[int]:
        """List the places that cannot hold their part, or with `roomy` not with some room to spare.

        Weights in main memory count with `whole` only: what of the file does not stay there is read again.
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
        """Tell whether main memory cannot keep the weights besides: they are read from the disk for every token."""
        return sum(self.needs[0]) > self.free[0]

    def largest(self, most: int) -> int:
        """Return the largest context that fits with some room to spare, of `most` tokens at most; 0 if none does."""
        contexts = range(CELLS, most + CELLS, CELLS)
        return min(most, self._last(contexts, lambda context: replace(self, context=context)))

    def largest_parallel(self) -> int:
        """Return how many answers at a time fit with some room to spare, if not all of them; 0 if none does."""
        answers = range(1, self.sequences // self.sequences_per_answer)
        return self._last(answers, lambda count: replace(self, sequences=count * self.sequences_per_answer))

    @staticmethod
    def _last(counts: range, planned: Callable[[int], Plan]) -> int:
        """Return the largest count whose plan fits, if possible beside the weights; 0 if none does."""

        def too_large(whole: bool, count: int) -> bool:
            return bool(planned(count).over_budget(roomy=True, whole=whole))

        for whole in (True, False):
            if fits := bisect.bisect_left(counts, True, key=functools.partial(too_large, whole)):
                return counts[fits - 1]
        return 0

    def check(self, path: Path) -> None:
        """Refuse what does not fit: the system would grant it, and end the process later.

        Raises:
            LoadError: with the numbers, and what would fit.
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
        """Return the context in words."""
        return f"{self.sequences} times {self.context:,} tokens" if self.sequences > 1 else f"{self.context:,} tokens"

    def __str__(self) -> str:
        places = zip(("in main memory", *(f"on {name}" for name in self.names)), self.needs, self.free, strict=False)
        return f"{self.size}: " + "; ".join(
            f"{in_bytes(need.weights)} of weights, {in_bytes(need.cache)} of cache and {in_bytes(need.compute)} "
            f"to compute in, of {in_bytes(free)} free {name}"
            for name, need, free in places
        )


def make_plan(
    footprint: Footprint, main: float, devices: Sequence[Device], context: int, sequences: int, wish: str = "auto"
) -> Plan:
    """Plan where a model goes: with `auto`, as many layers on the devices as fit there with their part of the cache.

    Args:
        main: bytes that are free in main memory.
        wish: auto, all, or a number of layers.
    """
    layers, free = len(footprint.weights), [device.free for device in devices]
    nowhere = Plan(footprint, (), context, sequences, (main, *free), tuple(device.name for device in devices))

    def laid_out(offloaded: int) -> Plan:
        return replace(nowhere, places=tuple(placed(layers, offloaded, free)))

    if wish != "auto":
        return laid_out(layers if wish == "all" else int(wish))
    plans = (laid_out(offloaded) for offloaded in range(layers if devices else 0, 0, -1))
    return next((plan for plan in plans if not any(plan.over_budget(roomy=True))), laid_out(0))


def usable(devices: Sequence[Device]) -> list[Device]:
    """List the devices that llama.cpp offloads layers to: those with memory of their own, else those without."""
    found = [device for device in devices if device.kind in (1, 2)]
    found = [one if one.total else one._replace(free=int(free_memory())) for one in found]  # it does not say
    return [device for device in found if device.kind == 1] or found


def memory_limits() -> dict[str, float]:
    """Return how many bytes can still be taken, swap apart: of the system, and of the container, as far as they say."""
    found = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (free,) = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        found["free"] = free
    with contextlib.suppress(OSError, ValueError, KeyError):  # a container's share; "max" is none
        group = Path("/sys/fs/cgroup")
        limit, taken = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        found["free for this container"] = limit - taken + float(counts["file"])  # what copies files makes room
    return found


def physical_memory() -> float:
    """Return how many bytes of main memory there are; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def free_memory() -> float:
    """Return how many bytes can still be taken, swap apart; where no one says, all there are, or infinity."""
    return min(memory_limits().values(), default=physical_memory())
