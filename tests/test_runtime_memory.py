"""Will it fit? What is foretold of a model's memory is what llama.cpp takes, and plans hold on every invented machine."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.families import make_family
from helpers.gguf_files import copy_model
from test_scheduler import memories  # noqa: F401  a fixture

import metaalign_edge as edge
from metaalign_edge import BatchEntry, Engine, Model, Settings
from metaalign_edge_runtime.errors import LoadError, UsageError
from metaalign_edge_runtime.llama import library, memory
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.library import LOG
from metaalign_edge_runtime.llama.memory import CELLS, PREFILL_CHUNK, SHARE, SPARE, UNFORETOLD, Device, Footprint, Plan
from metaalign_edge_runtime.stores import models

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Refuses = Callable[..., str]
CPU = Settings(threads=1, gpu_layers="0")
MIB, GB = 1 << 20, 10**9


def allocated(path: Path, contexts: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """Say what llama.cpp would allocate for contexts of so many tokens and sequences: it plans, and no more."""
    llama, found = library.llama_cpp(), []
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, 0, 0
    LOG.attach(verbose=True)
    with contextlib.redirect_stderr(io.StringIO()):
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
    for context, sequences in contexts:
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = context * sequences, sequences, sequences > 1
        options.n_batch = options.n_ubatch = max(PREFILL_CHUNK, sequences)
        options.n_outputs_max = sequences
        with contextlib.redirect_stderr(io.StringIO()) as log:
            llama.llama_free(llama.llama_init_from_model(model, options))

        def total(pattern: str, said: str = log.getvalue()) -> float:
            return MIB * sum(map(float, re.findall(rf"{pattern}\s*=\s*([\d.]+) MiB", said)))

        cache, logits = total("llama_kv_cache: size") + total("RS buffer size"), total("output buffer size")
        takes = {"cache": cache, "compute": total("compute buffer size") + logits}
        found.append({"weights": llama.llama_model_size(model), **takes})
    llama.llama_model_free(model)
    LOG.attach(verbose=False)
    return found


# architecture, layers, width, inner, heads, heads of keys, a head's size, vocabulary, tied, experts, of them used
SHAPES = {
    "Qwen2.5-0.5B": ("qwen2", 24, 896, 4864, 14, 2, 64, 151936, True, 0, 0),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False, 0, 0),
    "Llama-2-7B": ("llama", 32, 4096, 11008, 32, 32, 128, 32000, False, 0, 0),
    "Qwen3-4B": ("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True, 0, 0),
    "gemma-3-4b": ("gemma3", 34, 2560, 10240, 8, 4, 256, 262144, True, 0, 0),
    "Qwen3-30B-A3B": ("qwen3moe", 4, 2048, 768, 32, 4, 128, 151936, False, 128, 8),
    "Mixtral-8x7B": ("llama", 4, 4096, 14336, 32, 8, 128, 32000, False, 8, 2),
    "small": ("llama", 4, 256, 512, 4, 4, 64, 4096, False, 0, 0),
    "attention only, almost": ("llama", 2, 512, 512, 32, 4, 128, 512, False, 0, 0),
}


def hollow(path: Path, name: str) -> Path:
    """Write a model of this shape whose weights are a hole in the file: it has the size, and takes no room."""
    kind, layers, width, inner, heads, keys, each, rows, tied, experts, used = SHAPES[name]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(131072)
    writer.add_block_count(layers)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_key_length(each)
    writer.add_value_length(each)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("no_vocab")
    if kind == "gemma3":
        writer.add_sliding_window(1024)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(used)
        writer.add_expert_feed_forward_length(inner)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (rows, width), "output_norm": (width,)}
    shapes |= {} if tied else {"output": (rows, width)}
    for layer in range(layers):
        block: dict[str, tuple[int, ...]] = {"attn_norm": (width,), "ffn_norm": (width,)}
        block |= {"attn_q": (heads * each, width), "attn_k": (keys * each, width), "attn_v": (keys * each, width)}
        block |= {"attn_output": (width, heads * each)}
        block |= {"attn_q_norm": (each,), "attn_k_norm": (each,)} if kind in ("qwen3", "qwen3moe", "gemma3") else {}
        block |= {"post_attention_norm": (width,), "post_ffw_norm": (width,)} if kind == "gemma3" else {}
        ends = (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner)))
        block |= {"ffn_gate_inp": (experts, width)} if experts else {}
        block |= {f"ffn_{end}_exps": (experts, *shape) for end, shape in ends} if experts else {}
        block |= {} if experts else {f"ffn_{end}": shape for end, shape in ends}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    room = 0
    for name, shape in shapes.items():
        half = len(shape) > 1
        size = int(np.prod(shape)) * (2 if half else 4)
        writer.add_tensor_info(f"{name}.weight", list(shape), np.dtype(np.float16 if half else np.float32), size)
        room += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + room)
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_real_shape_takes_is_foretold(name: str, tmp_path: Path) -> None:
    path = hollow(tmp_path / "hollow.gguf", name)
    footprint = Footprint.of(ModelFile(path))
    contexts = [(256, 1), (4096, 1), (32768, 1), (1024, 8), (512, 64)]
    for (context, sequences), takes in zip(contexts, allocated(path, contexts), strict=True):
        (need,) = footprint.needs([0] * len(footprint.weights), context, sequences)
        assert need.weights == takes["weights"]
        assert need.cache == pytest.approx(takes["cache"], abs=MIB / 100)
        compute = need.compute / takes["compute"]
        assert 0.995 < compute < (1.16 if name in ("small", "attention only, almost") else 1.03), (context, sequences)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo3ForCausalLM"])
def test_the_cache_of_a_converted_model_is_foretold(name: str, tmp_path: Path) -> None:
    made = make_family(tmp_path / "made", name, max_position_embeddings=512)
    assert edge.run(["convert", str(made), "-o", str(tmp_path / "made.gguf"), "--no-check", "-q"]) == 0
    footprint, contexts = Footprint.of(ModelFile(tmp_path / "made.gguf")), [(1 << 17, 1), (1 << 15, 3)]
    for (context, sequences), takes in zip(contexts, allocated(tmp_path / "made.gguf", contexts), strict=True):
        (need,) = footprint.needs([0] * len(footprint.weights), context, sequences)
        assert footprint.foretold and need.weights == takes["weights"]
        assert need.cache == pytest.approx(takes["cache"], abs=MIB / 50)


@pytest.mark.parametrize("kind", ["full", "window", "hybrid", "demo"])
def test_the_bytes_of_a_token_and_of_a_sequence_are_what_llama_cpp_stores_of_them(
    kind: str,
    memories: dict[str, Path],  # noqa: F811
    demo: Path,
) -> None:
    file = ModelFile(demo if kind == "demo" else memories[kind])
    footprint, sizes = Footprint.of(file), []
    with Model(file, CPU) as model, Engine(model, CPU, Interrupt(), 256) as engine:
        (sequence,) = engine.sequences
        for _ in range(2):
            engine.decode([BatchEntry(sequence, [7] * 20, False)])
            sizes.append(len(engine.state(sequence)))
    about, each = (sizes[1] - sizes[0]) / 20, sum(footprint.cache)
    assert each and each <= about <= each + 16 * footprint.masks  # its position, and whose it is
    assert sum(footprint.states) <= sizes[0] - 20 * about <= sum(footprint.states) + 200
    assert bool(sum(footprint.states)) == (kind == "hybrid")
    assert sum(1 for bytes_ in footprint.cache if not bytes_) == (1 if kind == "hybrid" else 0)


@pytest.mark.parametrize("arguments, context, sequences", [
    (("chat",), 1024, 1),
    (("chat", "-c", "300", "--pref-strength", "2"), 300, 2),
    (("compare", "-c", "512", "--pref", "a", "--pref", "b"), 512, 3),
])  # fmt: skip
def test_what_verbose_foretells_is_what_llama_cpp_then_logs(
    arguments: tuple[str, ...], context: int, sequences: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert edge.run([*arguments, "-vv", "-ngl", "0", "-n", "2", "--pref", "short", "--no-stdin", "tea?"]) == 0
    said = capfd.readouterr().err
    size = f"{sequences} times {context:,}" if sequences > 1 else f"{context:,}"
    foretold = rf"^memory for {size} tokens: ([\d.]+) MB of weights, ([\d.]+) MB of cache and ([\d.]+) MB to compute in"
    ((weights, cache, compute),) = re.findall(foretold, said, re.MULTILINE)

    def logged(what: str) -> float:
        return sum(float(size) for size in re.findall(rf"{what} buffer size\s*=\s*([\d.]+) MiB", said)) * MIB / 1e6

    assert float(weights) == pytest.approx(logged("model"), abs=0.1)
    assert float(cache) == pytest.approx(logged("KV"), abs=0.1)
    assert float(compute) == pytest.approx(logged("compute") + logged("output"), rel=0.08)


@pytest.mark.parametrize("key", UNFORETOLD)
def test_what_is_not_known_is_not_foretold(
    key: str, tiny: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ModelFile(tiny)
    file.metadata[f"llama.{key}"] = 1
    footprint = Footprint.of(file)
    assert memory.cache_bytes(file) is None and not footprint.foretold and not sum(footprint.cache)
    with pytest.raises(UsageError, match="-c a number"):
        edge.plan_for(file, replace(CPU, context="auto"))


def uniform(layers: int, weights: int = GB, cache: int = 1000, **changes: object) -> Footprint:
    """Return the footprint of an invented model with layers that are all alike."""
    known: dict[str, object] = {
        "embedding": weights // 2,
        "tied": False,
        "foretold": True,
        "numbers": 40960,
        "masks": 1,
    }
    known |= {"weights": (*[weights] * layers, weights // 2), "cache": (cache,) * layers, "states": (0,) * layers}
    return Footprint(**{**known, "vocabulary": 100_000, **changes})  # type: ignore[arg-type]


def machine(*gigabytes: float) -> list[Device]:
    return [
        Device(f"GPU{place}", "invented", 1, int(free * GB), int(free * GB)) for place, free in enumerate(gigabytes)
    ]


def test_every_layer_has_a_place_the_last_ones_on_devices_in_order_and_in_proportion() -> None:
    for layers, offloaded in itertools.product(range(1, 40), range(42)):
        for free in ([], [8], [24, 8], [1, 1, 1], [5, 80, 11], [0, 8], [0]):
            places = memory.placed(layers, offloaded, free)
            on = [place for place in places if place]
            assert len(places) == layers and len(on) == (min(offloaded, layers) if free else 0)
            assert places == sorted(places) and max(places) <= len(free)
            for place, share in enumerate(free, 1):
                assert sum(free) == 0 or abs(on.count(place) - len(on) * share / sum(free)) <= 1
    assert memory.placed(33, 33, [24, 8]) == [1] * 25 + [2] * 8  # llama.cpp: upper_bound of number / offloaded
    assert memory.placed(33, 99, [24]) == [1] * 33 and memory.placed(33, 2, [24, 8]) == [0] * 31 + [1, 1]


MACHINES = [(), (2,), (6,), (12,), (24,), (80,), (8, 8), (24, 8), (4, 12, 4)]


@pytest.mark.parametrize("gigabytes", MACHINES)
@pytest.mark.parametrize("context, sequences", [(512, 1), (8192, 1), (65536, 1), (4096, 16)])
def test_auto_offloads_as_many_layers_as_fit_with_their_part_of_the_cache(
    gigabytes: tuple[float, ...], context: int, sequences: int
) -> None:
    for layers, tied in itertools.product((1, 2, 7, 30), (False, True)):
        footprint, devices = uniform(layers, GB // 3, 4096, tied=tied), machine(*gigabytes)
        plan = memory.make_plan(footprint, 64 * GB, devices, context, sequences, "auto")

        def holds(offloaded: int, footprint: Footprint = footprint, devices: list[Device] = devices) -> bool:
            """Add up by hand what each device would hold."""
            count = len(footprint.weights)
            places, cells = memory.placed(count, offloaded, [device.free for device in devices]), context * sequences
            batch, logits = min(cells, max(512, sequences)), 4 * 100_000 * sequences
            compute = max(logits, batch * (4 * 40960 + 2 * cells)) + logits
            compute += max((w for w, place in zip(footprint.weights, places, strict=True) if not place), default=0)
            for number, device in enumerate(devices, 1):
                mine = [layer for layer, place in enumerate(places) if place == number]
                taken = sum(footprint.weights[layer] for layer in mine) + compute * (number <= max(places))
                taken += 4096 * cells * len([layer for layer in mine if layer < count - 1])
                taken += footprint.embedding if footprint.tied and count - 1 in mine else 0
                if taken > device.free - SPARE:
                    return False
            return True

        best = max((offloaded for offloaded in range(1, layers + 2) if devices and holds(offloaded)), default=0)
        assert plan.offloaded == best and not any(plan.over_budget(roomy=True))
        everything = memory.make_plan(footprint, 64 * GB, devices, context, sequences, "all")
        assert everything.offloaded == (layers + 1 if devices else 0)
        assert memory.make_plan(footprint, 64 * GB, devices, context, sequences, "2").offloaded == (2 if devices else 0)


@pytest.mark.parametrize("gigabytes", MACHINES)
@pytest.mark.parametrize("main", [0.2, 1, 4, 16, 64])
def test_the_largest_context_fits_beside_the_weights_if_any_does_and_a_larger_one_does_not(
    main: float, gigabytes: tuple[float, ...]
) -> None:
    for most, sequences in itertools.product((100, 4096, 5000, 131072), (1, 8)):
        plan = memory.make_plan(uniform(8, GB // 4, 8192), main * GB, machine(*gigabytes), min(most, 4096), sequences)
        beside = not replace(plan, context=CELLS).over_budget(roomy=True, whole=True)
        largest = plan.largest(most)
        assert largest == most or (largest % CELLS == 0 and largest < most)
        assert not largest or not replace(plan, context=largest).over_budget(roomy=True, whole=beside)
        assert largest == most or replace(plan, context=largest + CELLS).over_budget(roomy=True, whole=beside)
        more = replace(plan, sequences=sequences + 1)
        beside = not replace(more, sequences=1).over_budget(roomy=True, whole=True)
        count = more.largest_parallel()
        assert not count or not replace(plan, sequences=count).over_budget(roomy=True, whole=beside)
        assert count == sequences or replace(plan, sequences=count + 1).over_budget(roomy=True, whole=beside)


def test_what_does_not_fit_is_refused_with_numbers_and_with_what_would_fit() -> None:
    def said(plan: Plan) -> str:
        with pytest.raises(LoadError) as refused:
            plan.check(Path("a.gguf"))
        return str(refused.value)

    footprint, path = uniform(8, GB // 4, 8192), Path("a.gguf")
    plan = memory.make_plan(footprint, 4 * GB, [], 16384, 4, "auto")
    line = said(plan)
    numbers = r"4 times 16,384 tokens takes ([\d.]+) GB of cache and ([\d.]+) MB .* a\.gguf, and 4\.0 GB are free: -c (\d+) or --parallel (\d) would fit"
    cache, compute, context, parallel = re.search(numbers, line).groups()  # type: ignore[union-attr]
    assert float(cache) == pytest.approx(8 * 8192 * 65536 / GB, abs=0.05) and 100 < float(compute) < 200
    replace(plan, context=int(context)).check(path)
    replace(plan, sequences=int(parallel)).check(path)
    assert "take a smaller model, or end other programs" in said(replace(plan, free=(1e6,)))
    on_gpu = memory.make_plan(footprint, 64 * GB, machine(2), 1024, 1, "all")
    line = said(on_gpu)
    assert "2.1 GB of weights" in line and "2.0 GB are free on GPU0: -ngl auto would fit" in line
    memory.make_plan(footprint, 64 * GB, machine(2), 1024, 1, "auto").check(path)
    replace(on_gpu, loaded=True).check(path)  # the weights are there, and what is free is the rest
    grown = replace(on_gpu, loaded=True, context=1 << 17)
    (context,) = re.findall(r"on GPU0: -c (\d+) would fit", said(grown))
    replace(grown, context=int(context)).check(path)


def test_weights_that_main_memory_cannot_keep_are_a_warning_and_what_must_stay_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (need,) = edge.plan_for(ModelFile(tiny), replace(CPU, context=256), []).needs
    arguments = ["chat", "-m", str(tiny), "-c", "256", "-n", "2", "--seed", "1", "--no-stdin", "tea?"]
    outputs = []
    for free, code in ((GB, 0), (need.cache + need.compute + 1, 0), (need.cache + need.compute - 1, 5)):
        monkeypatch.setattr("metaalign_edge_runtime.llama.memory.free_memory", lambda free=free: float(free))
        assert edge.run(arguments) == code
        outputs.append(capfd.readouterr())
    assert outputs[0].err == "" and outputs[0].out == outputs[1].out
    assert re.search(r"warning: .* MB are needed for tiny\.gguf, and .* MB are free: .*quantisation", outputs[1].err)
    assert outputs[1].err.count("\n") == outputs[2].err.count("\n") == 1
    assert re.search(r"a context of 256 tokens takes .* MB are free: take a smaller model", outputs[2].err)


def test_the_command_line_refuses_it_in_one_line_before_weights_are_loaded(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = library.llama_cpp().llama_model_load_from_file

    def only_vocabularies(path: bytes, params: Any) -> Any:
        assert params.vocab_only
        return load(path, params)

    monkeypatch.setattr(library.llama_cpp(), "llama_model_load_from_file", only_vocabularies)
    line = refuses(5, "chat", "-ngl", "0", "-c", "2000000000", "What is tea?")
    assert re.search(r"a context of 2,000,000,000 tokens takes [\d,.]+ GB .*, and [\d,.]+ [GM]B are free: -c \d+", line)


def test_c_auto_takes_the_models_own_context_or_the_largest_that_fits(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def context(*arguments: str) -> int:
        assert edge.run(["chat", "-v", "-m", str(tiny), "-n", "2", "--no-stdin", *arguments, "tea?"]) == 0
        return int(re.findall(r"^memory for ([\d,]+) tokens", capfd.readouterr().err, re.MULTILINE)[0].replace(",", ""))

    assert context("-c", "auto") == 512 and context() == 512 and context("-c", "64") == 64
    monkeypatch.setenv("METAALIGN_EDGE_CTX_SIZE", "auto")
    (need,) = edge.plan_for(ModelFile(tiny), replace(CPU, context=256), []).needs
    monkeypatch.setattr(
        "metaalign_edge_runtime.llama.memory.free_memory", lambda: (need.cache + need.compute) / SHARE + 1
    )
    assert context() == 256 and context("-c", "128") == 128
    monkeypatch.setattr("metaalign_edge_runtime.llama.memory.free_memory", lambda: float(need.compute / 2))
    assert edge.run(["chat", "-m", str(tiny), "--no-stdin", "tea?"]) == 5
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", ["15", "0", "-1", "", "many", "1.5", "4k"])
def test_a_context_that_is_none_is_exit_2(value: str, refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-c takes auto or a number" in refuses(2, "chat", f"--ctx-size={value}", "tea?")
    if value:
        monkeypatch.setenv("METAALIGN_EDGE_CTX_SIZE", value)
        assert "-c takes auto or a number" in refuses(2, "eval")


def test_the_devices_are_read_from_ggml_and_a_build_for_the_cpu_offloads_nothing(tiny: Path) -> None:
    (processor,) = [device for device in library.devices() if device.kind == 0]
    assert processor.name == "CPU" and processor.description
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert processor.total == pytest.approx(total, rel=0.05) and processor.free <= processor.total
    assert library.gpus() == [] and not library.llama_cpp().llama_supports_gpu_offload()
    for wish in ("auto", "all", "7"):
        plan = edge.plan_for(ModelFile(tiny), Settings(gpu_layers=wish), library.gpus())
        assert plan.offloaded == 0 and len(plan.needs) == 1


def test_the_parts_of_a_split_model_count_together_and_a_missing_one_is_named(
    tiny: Path, tmp_path: Path, here: Run, refuses: Refuses
) -> None:
    copy_model(tiny, tmp_path / "parts.gguf", part=7)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2 and ModelFile(parts[0]).paths == parts and ModelFile(tiny).paths == [tiny]
    assert Footprint.of(ModelFile(parts[0])) == Footprint.of(ModelFile(tiny))
    assert here("chat", "-m", str(parts[0]), "-n", "2", "--seed", "1", "tea?").returncode == 0
    parts[1].unlink()
    assert parts[1].name in refuses(5, "chat", "-m", str(parts[0]), "tea?")


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length", "feed_forward_length", "split.count", "general.alignment"])  # fmt: skip
@pytest.mark.parametrize("value", ["many", -5, 0, 2**62, 1.5, None])
def test_metadata_without_sense_are_left_to_llama_cpp(key: str, value: object, tiny: Path) -> None:
    file = ModelFile(tiny)
    file.metadata[key if key.startswith(("split", "general")) else f"llama.{key}"] = value
    plan = edge.plan_for(file, CPU, machine(8))
    assert len(plan.places) == len(plan.footprint.weights) <= 513 and str(plan)
    assert min(*plan.needs[0], *plan.footprint.weights) >= 0


def test_only_options_that_there_are_are_advised(
    refuses: Refuses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaalign_edge_runtime.llama.memory.free_memory", lambda: 20.0 * GB)
    strong = ("--pref-strength", "2", "-c")
    assert "--parallel" not in refuses(5, "chat", *strong, "20000000", "tea?")
    assert "--parallel" not in refuses(5, "compare", *strong, "20000000", "--pref", "a", "--pref", "b", "tea?")
    (tmp_path / "rows.jsonl").write_text('{"query": "tea?"}\n')
    line = refuses(5, "batch", str(tmp_path / "rows.jsonl"), *strong, "20000", "--parallel", "256")
    (answers,) = re.findall(r"512 times 20,000 tokens .* and 20\.0 GB are free: .* or --parallel (\d+) would fit", line)
    settings = Settings(context=20000, pref_strength=2.0, gpu_layers="0")
    plan = edge.plan_for(ModelFile(models.resolve_model(None)), settings, [], answers=int(answers))
    assert plan.over_budget(roomy=True) == []


def test_a_damaged_list_of_tensors_is_one_line(tiny: Path, tmp_path: Path, refuses: Refuses) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[: ModelFile(tiny)._infos + 100])
    assert "list of tensors" in refuses(5, "chat", "-m", str(cut), "tea?")
