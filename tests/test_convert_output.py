"""What `convert` writes: the types and their bytes, the plan, the memory, and nothing where something went wrong."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from helpers.checkpoints import CONFIG, edit_json, make_checkpoint, random_weights, write_container, write_weights
from helpers.gguf_files import finish, types
from llama_cpp import Llama, llama_cpp

import metaalign_edge as edge
import metaalign_edge_convert.ggml as ggml
import metaalign_edge_convert.plan as planning
from metaalign_edge_convert import QuantizeOptions, open_checkpoint, plan_checkpoint, plan_gguf, write_gguf, write_plan
from metaalign_edge_convert.container import read_head
from metaalign_edge_convert.encode import encode, magnitude
from metaalign_edge_convert.quantize import MIXTURES
from metaalign_edge_runtime.errors import CannotWrite, LoadError, NotFound, UsageError

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}  # K types take 256


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows are long enough for every type, in bfloat16."""
    return make_checkpoint(tmp_path_factory.mktemp("wide") / "tiny-chat", dtype="BF16", **WIDE)


@pytest.fixture(scope="module")
def source(wide: Path) -> Path:
    """It as a GGUF file, as it is stored."""
    path = wide.parent / "tiny-chat-bf16.gguf"
    write_gguf(open_checkpoint(wide), path, outtype="bf16", check=False, template_name="metaalign")
    return path


def llama_quantize(source: Path, output: Path, name: str, **changes: Any) -> None:
    """Quantize with llama.cpp itself."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = int(MIXTURES[name]), 1, True
    for key, value in changes.items():
        setattr(params, key, value)
    with silence():
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params)) == 0


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep llama.cpp's log from the test's output."""
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(callback, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(before, data)


def write_imatrix(path: Path, source: Path, old: bool = False) -> dict[str, np.ndarray]:
    """Write an importance matrix for a GGUF file; return what each column weighs."""
    draw = np.random.default_rng(3)
    matrices = [t for t in gguf.GGUFReader(source).tensors if len(t.shape) == 2 and t.name != "token_embd.weight"]
    sums = {t.name: draw.uniform(1, 100, int(t.shape[0])).astype(np.float32) for t in matrices}
    if old:
        data = struct.pack("<i", len(sums))
        for name, values in sums.items():
            data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 4, values.size) + values.tobytes()
        path.write_bytes(data + struct.pack("<ii", 7, 8) + b"wiki.txt")
        return {name: values / np.float32(4) for name, values in sums.items()}
    out = gguf.GGUFWriter(path, "")
    out.add_array("imatrix.datasets", ["wiki.txt"])
    out.add_uint32("imatrix.chunk_count", 7)
    out.add_uint32("imatrix.chunk_size", 512)
    for name, values in sums.items():
        out.add_tensor(f"{name}.in_sum2", values)
        out.add_tensor(f"{name}.counts", np.array([[4.0]], np.float32))
    finish(out, path)
    return {name: values / np.float32(4) for name, values in sums.items()}


# -- numbers ----------------------------------------------------------------------------------------------------------


def hard_numbers() -> np.ndarray:
    """Float32 numbers of every size: ties, denormals, both zeros, the largest of each type, and random bits."""
    low = np.arange(1 << 14, dtype=np.uint32)
    edges = [low << 18, (low << 18) | 0x8000, (low << 18) | 0x1000, (low << 18) | 0x7FFF, low, low | 0x33000000]
    bits = np.concatenate([*edges, np.random.default_rng(1).integers(0, 2**32, 1 << 16, dtype=np.uint32)])
    numbers = np.concatenate([bits.view(np.float32), np.float32([0.0, -0.0, 65504, -65519.996, 1e-45, 6e-8, 3e38])])
    numbers = numbers[np.isfinite(numbers)]
    return numbers[: numbers.size // 32 * 32].reshape(-1, 32)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0])
def test_ggml_and_numpy_make_the_same_bytes(kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ggml.library() is not None
    numbers = hard_numbers()
    if kind is Type.Q8_0:
        numbers = numbers[np.abs(numbers).max(axis=1) < 8e6]  # beyond, the scale is no float16
    ours = ggml.from_float32(numbers, kind).tobytes()
    monkeypatch.setattr(ggml, "library", lambda: None)
    with np.errstate(all="ignore"):
        assert ours == ggml.from_float32(numbers, kind).tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "Q8_0"])
def test_ggml_and_numpy_read_the_same_numbers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    rows = patterns if dtype == "BF16" else patterns.view(np.float16)
    if dtype == "Q8_0":
        rows = np.frombuffer(ggml.from_float32(hard_numbers()[:2000] % 100, Type.Q8_0), np.uint8).reshape(-1, 34)
    ours = ggml.to_float32(rows, dtype)
    monkeypatch.setattr(ggml, "library", lambda: None)
    theirs = ggml.to_float32(rows, dtype)
    finite = np.isfinite(theirs)
    assert finite.sum() > 60_000
    assert (ours[finite].view(np.uint32) == theirs[finite].view(np.uint32)).all()


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", Type.F16), ("F16", Type.BF16)])
def test_the_short_cut_between_16_bit_types_is_the_long_way(dtype: str, kind: Type) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    rows = patterns if dtype == "BF16" else patterns.view(np.float16)
    rows = rows[np.isfinite(ggml.to_float32(rows, dtype))]
    wanted = ggml.from_float32(ggml.to_float32(rows, dtype), kind)
    assert encode("x", rows, dtype, kind).data.tobytes() == wanted.tobytes()


def test_the_largest_magnitude_is_found_in_the_bits() -> None:
    for values in ([0.0, -0.0], [1, -3, 2], [-5.5], [1e-45, -1e-44], [65504, -1], [-2, -1], [np.inf, 1], [-np.inf, 1]):
        numbers = np.array(values, np.float32)
        assert magnitude(numbers, "F32") == np.abs(numbers).max()
        with np.errstate(under="ignore"):
            assert magnitude(numbers.astype(np.float16), "F16") == np.abs(numbers.astype(np.float16)).max()
        cut = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        assert magnitude(cut, "BF16") == np.abs(ggml.to_float32(cut, "BF16")).max()
    for bad in ([np.nan, 1], [-np.nan, -1], [1, -np.inf]):
        assert not np.isfinite(magnitude(np.array(bad, np.float32), "F32"))


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_without_ggml_the_file_is_the_same(
    dtype: str, outtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "tiny", dtype=dtype)
    files = []
    for _ in range(2):
        write_gguf(open_checkpoint(folder), tmp_path / "x.gguf", outtype=outtype, check=False, force=True)
        files.append((tmp_path / "x.gguf").read_bytes())
        monkeypatch.setattr(ggml, "library", lambda: None)
    assert files[0] == files[1]


def test_without_ggml_other_types_say_what_they_take(wide: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['llama_cpp'] = None; from pathlib import Path; import metaalign_edge; from metaalign_edge_convert import *\n"
        "write_gguf(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), outtype='Q4_K_M', check=False)"
    )
    command = [sys.executable, "-c", script, str(wide), str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "LoadError: llama-cpp-python is not installed: pip install llama-cpp-python" in done.stderr
    assert list(tmp_path.iterdir()) == []


# -- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_K_M", "q5_k_m", "Q6_K", "Q2_K", "Q3_K", "Q4_0", "Q5_1", "TQ2_0", "MXFP4_MOE"])
def test_a_quantized_checkpoint_is_what_llama_cpp_makes_of_the_unquantized_one(
    name: str, wide: Path, source: Path, tmp_path: Path
) -> None:
    done = write_gguf(
        open_checkpoint(wide), tmp_path / "ours.gguf", outtype=name, check=False, template_name="metaalign"
    )
    llama_quantize(source, tmp_path / "theirs.gguf", done.outtype)
    ours = (tmp_path / "ours.gguf").read_bytes()
    assert ours == (tmp_path / "theirs.gguf").read_bytes()
    assert done.bytes == len(ours)
    assert {path.name for path in tmp_path.iterdir()} == {"ours.gguf", "theirs.gguf"}


@pytest.mark.parametrize("stored", ["F32", "F16"])
def test_how_the_weights_are_stored_does_not_matter_to_the_mixtures(stored: str, wide: Path, tmp_path: Path) -> None:
    files = []
    for folder in (wide, make_checkpoint(tmp_path / "tiny-chat", dtype=stored, **WIDE)):
        write_gguf(open_checkpoint(folder), tmp_path / "x.gguf", outtype="Q4_K_M", check=False, force=True)
        files.append((tmp_path / "x.gguf").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["f32", "f16", "q8_0", "Q4_K_M"])
@pytest.mark.parametrize("first", ["BF16", "Q8_0"])
def test_a_gguf_file_is_quantized_anew_as_llama_cpp_does_it(
    first: str, name: str, source: Path, tmp_path: Path
) -> None:
    if first != "BF16":
        llama_quantize(source, tmp_path / "first.gguf", first)
        source = tmp_path / "first.gguf"
    done = write_plan(plan_gguf(source, name), tmp_path / "ours.gguf")
    llama_quantize(source, tmp_path / "theirs.gguf", name.upper())
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert (done.template, done.architecture, done.checks) == ("metaalign", "llama", ())


def test_what_was_quantized_before_is_pointed_out(source: Path, tmp_path: Path) -> None:
    llama_quantize(source, tmp_path / "small.gguf", "Q4_K_M")
    plan = plan_gguf(tmp_path / "small.gguf", "Q6_K")
    assert plan.checks == ("warning: quantized already (Q4_K): an original in F16 gives better results",)
    llama_quantize(tmp_path / "small.gguf", tmp_path / "theirs.gguf", "Q6_K")
    write_plan(plan, tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"pure": True}, {"pure": True}),
        ({"leave_output_tensor": True}, {"quantize_output_tensor": False}),
        (
            {"output_tensor_type": "f16", "token_embedding_type": "q8_0"},
            {"output_tensor_type": int(Type.F16), "token_embedding_type": int(Type.Q8_0)},
        ),
    ],
)
def test_the_options_do_what_llama_quantizes_do(
    options: dict[str, Any], params: dict[str, Any], wide: Path, source: Path, tmp_path: Path
) -> None:
    checkpoint, how = open_checkpoint(wide), QuantizeOptions(**options)
    for name in ("Q4_K_M", "q8_0"):
        output = tmp_path / f"{name}.gguf"
        write_gguf(checkpoint, output, outtype=name, check=False, template_name="metaalign", options=how)
        llama_quantize(source, tmp_path / "theirs.gguf", name.upper(), **params)
        assert output.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_single_tensors_can_be_given_a_type(wide: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(wide)
    how = QuantizeOptions(tensor_types=("attn_v=q8_0", "blk.1.ffn_.*=Q6_K"))
    write_gguf(checkpoint, tmp_path / "x.gguf", outtype="Q4_0", check=False, options=how)
    found = types(tmp_path / "x.gguf")
    assert (found["blk.0.attn_v.weight"], found["blk.0.ffn_up.weight"], found["blk.1.ffn_up.weight"]) == (
        "Q8_0",
        "Q4_0",
        "Q6_K",
    )
    for wrong, message in (
        ("attn_v", "write PATTERN=TYPE"),
        ("attn_v=q9", "'q9' is no type of a tensor"),
        ("(=q8_0", r"llama\.cpp cannot quantize this to Q4_0"),
    ):
        with pytest.raises(LoadError, match=message):
            plan_checkpoint(checkpoint, "Q4_0", check=False, options=QuantizeOptions(tensor_types=(wrong,)))


@pytest.mark.parametrize(("name", "old"), [("Q4_K_M", False), ("IQ4_NL", True)])
def test_an_importance_matrix_weighs_the_errors_as_it_does_in_llama_cpp(
    name: str, old: bool, wide: Path, source: Path, tmp_path: Path
) -> None:
    weights = write_imatrix(tmp_path / "tiny.imatrix", source, old)
    write_gguf(
        open_checkpoint(wide),
        tmp_path / "ours.gguf",
        outtype=name,
        check=False,
        options=QuantizeOptions(imatrix=tmp_path / "tiny.imatrix"),
    )
    rows = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
    for row, (tensor, values) in zip(rows, weights.items(), strict=False):
        row.name, row.size = tensor.encode(), values.size
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    llama_quantize(source, tmp_path / "theirs.gguf", name, imatrix=rows)
    ours, theirs = gguf.GGUFReader(tmp_path / "ours.gguf"), gguf.GGUFReader(tmp_path / "theirs.gguf")
    for x, y in zip(ours.tensors, theirs.tensors, strict=True):
        assert (x.name, x.tensor_type) == (y.name, y.tensor_type)
        assert np.array_equal(x.data, y.data), x.name
    found = {key: field.contents() for key, field in ours.fields.items() if key.startswith("quantize.")}
    assert found == {
        "quantize.imatrix.file": "tiny.imatrix",
        "quantize.imatrix.dataset": "wiki.txt",
        "quantize.imatrix.entries_count": len(weights),
        "quantize.imatrix.chunks_count": 7,
    }


def test_an_importance_matrix_that_does_not_fit_is_refused(wide: Path, source: Path, tmp_path: Path) -> None:
    checkpoint, path = open_checkpoint(wide), tmp_path / "x.imatrix"

    def plan(name: str = "Q4_K_M") -> None:
        plan_checkpoint(checkpoint, name, check=False, options=QuantizeOptions(imatrix=path))

    with pytest.raises(LoadError, match=r"IQ2_XXS needs an importance matrix for blk\.0\..*llama-imatrix"):
        plan_checkpoint(checkpoint, "IQ2_XXS", check=False)
    with pytest.raises(NotFound, match="no such importance matrix"):
        plan()
    write_imatrix(path, source, old=True)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], b"\xff" * 40, struct.pack("<ii", 1, -5), struct.pack("<iii", 1, 2**30, 0)):
        path.write_bytes(damaged)
        with pytest.raises(LoadError, match=r"not an importance matrix, or cut short|nothing in it"):
            plan()
    path.write_bytes(whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_X.weight"))
    with pytest.raises(LoadError, match=r"IQ2_XXS needs an importance matrix for blk\.0\.attn_q\.weight"):
        plan("IQ2_XXS")
    path.write_bytes(source.read_bytes())
    with pytest.raises(LoadError, match="a GGUF file, but no importance matrix"):
        plan()
    other = make_checkpoint(tmp_path / "other", **{**WIDE, "intermediate_size": 768})
    write_gguf(open_checkpoint(other), tmp_path / "other.gguf", outtype="f16", check=False)
    write_imatrix(path, tmp_path / "other.gguf")
    with pytest.raises(LoadError, match=r"768 values for blk\.0\.ffn_down\.weight, which has 512 columns"):
        plan()


def test_every_type_of_llama_quantize_has_its_name() -> None:
    known = {
        "Q4_K_M",
        "Q5_K_S",
        "Q6_K",
        "IQ4_XS",
        "IQ2_XXS",
        "IQ1_M",
        "Q2_K_S",
        "Q3_K_L",
        "TQ1_0",
        "Q4_0",
        "Q8_0",
        "F32",
    }
    assert known < set(MIXTURES)
    assert MIXTURES["F32"] == 0
    with pytest.raises(UsageError, match="outtype 'Q4_K_X' is not one of f32, f16, bf16, q8_0, IQ1_M"):
        write_gguf(open_checkpoint, Path("x.gguf"), outtype="Q4_K_X")  # type: ignore[arg-type]


# -- GGUF files of others ---------------------------------------------------------------------------------------------


def damaged(change: Callable[[bytearray], Any]) -> Callable[[bytes], bytes]:
    """Change a copy."""

    def apply(whole: bytes) -> bytes:
        data = bytearray(whole)
        change(data)
        return bytes(data)

    return apply


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda whole: whole[:-64], "ends before .* does; download"),
    "cut in the head": (lambda whole: whole[:500], "truncated or damaged in its head"),
    "version": (damaged(lambda data: data.__setitem__(4, 9)), "GGUF version 9"),
    "tensors": (damaged(lambda data: data.__setitem__(15, 9)), "tensors and .* keys"),
    "a long key": (damaged(lambda data: data.__setitem__(30, 0x7F)), "truncated or damaged"),
    "nothing else": (lambda whole: whole[:8] + bytes(16), "without a model in it"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_gguf_file_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(change(source.read_bytes()))
    with pytest.raises(LoadError, match=message):
        plan_gguf(tmp_path / "x.gguf", "Q8_0")


def test_a_damaged_head_never_leads_to_anything_but_a_convert_error(source: Path, tmp_path: Path) -> None:
    whole, draw = source.read_bytes(), np.random.default_rng(5)
    path = tmp_path / "x.gguf"
    for _ in range(100):
        data = bytearray(whole)
        data[int(draw.integers(4, 2000))] = int(draw.integers(256))
        path.write_bytes(data)
        with contextlib.suppress(LoadError):
            read_head(path)


def test_a_part_of_a_split_model_is_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-00002.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_uint16("split.count", 2)
    out.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    finish(out, path)
    with pytest.raises(LoadError, match=r"one of several parts; join them first with llama\.cpp's llama-gguf-split"):
        plan_gguf(path)


def test_a_model_that_llama_cpp_does_not_know_is_refused(source: Path, tmp_path: Path) -> None:
    data = source.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lamla", 1)
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(LoadError, match=r"llama\.cpp cannot quantize this to Q8_0: .*lamla"):
        plan_gguf(tmp_path / "x.gguf")


def test_nan_in_a_gguf_file_is_refused(source: Path, tmp_path: Path) -> None:
    data = bytearray(source.read_bytes())
    data[-2:] = b"\xff\x7f"
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(LoadError, match=r"blk\.1\.ffn_up\.weight|output.* holds NaN or infinity"):
        write_plan(plan_gguf(tmp_path / "x.gguf", "Q4_K_M"), tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


# -- reading and writing ----------------------------------------------------------------------------------------------


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(planning, "CHUNK", 5000)

    def shrink(name: str, done: int, total: int) -> None:
        os.truncate(folder / "model.safetensors", 5000)

    with pytest.raises(LoadError, match=r"model\.safetensors: shorter than it was a moment ago"):
        write_gguf(open_checkpoint(folder), tmp_path / "x.gguf", check=False, progress=shrink)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")

    def touch(name: str, done: int, total: int) -> None:
        os.utime(folder / "model.safetensors", (1, 1))

    with pytest.raises(LoadError, match=r"model\.safetensors: changed while it was read"):
        write_gguf(open_checkpoint(folder), tmp_path / "x.gguf", check=False, progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_file_that_changed_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    checkpoint = open_checkpoint(folder)
    write_weights(folder, {"x": np.zeros(300_000, np.float32)})
    with pytest.raises(LoadError, match=r"model\.safetensors: changed since it was opened"):
        write_gguf(checkpoint, tmp_path / "x.gguf", check=False)


def test_weights_that_changed_places_after_they_were_opened_are_noticed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    checkpoint = open_checkpoint(folder)
    data = (folder / "model.safetensors").read_bytes()
    one, other = b'"model.layers.0.mlp.gate_proj.weight"', b'"model.layers.0.mlp.up_proj.weight"  '
    assert one in data and other.strip() in data
    swapped = data.replace(one, b"?" * len(one)).replace(other.strip(), one).replace(b"?" * len(one), other.strip())
    assert len(swapped) == len(data)
    (folder / "model.safetensors").write_bytes(swapped)
    with pytest.raises(LoadError, match=r"model\.safetensors: changed since it was opened"):
        write_gguf(checkpoint, tmp_path / "x.gguf", check=False)


def test_what_killed_processes_left_behind_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    checkpoint = open_checkpoint(folder)
    (tmp_path / ".dead.gguf.metaalign-part").write_bytes(b"GGUF half")
    (tmp_path / ".other.gguf.part").write_text("somebody else's")
    seen = set()

    def inside(name: str, done: int, total: int) -> None:
        write_gguf(checkpoint, tmp_path / "second.gguf", check=False, force=True)
        seen.update(path.name for path in tmp_path.iterdir())

    write_gguf(checkpoint, tmp_path / "first.gguf", check=False, progress=inside)
    assert len(seen) == 4 and {name for name in seen if not name.endswith(".metaalign-part")} == {
        "tiny",
        ".other.gguf.part",
        "second.gguf",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", ".other.gguf.part", "first.gguf", "second.gguf"}


def test_the_result_is_looked_at_before_it_gets_its_name(tmp_path: Path) -> None:
    checkpoint, output = open_checkpoint(make_checkpoint(tmp_path / "tiny")), tmp_path / "x.gguf"

    def look(path: Path) -> list[str]:
        assert not output.exists()
        Llama(str(path), n_ctx=16, verbose=False).close()
        return ["seen"]

    done = write_gguf(checkpoint, output, check=False, verify=look)
    assert done.checks == ("seen",)

    def refuse(path: Path) -> list[str]:
        raise LoadError("no good")

    before = output.read_bytes()
    with pytest.raises(LoadError, match="no good"):
        write_gguf(checkpoint, output, outtype="f16", check=False, force=True, verify=refuse)
    assert output.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "x.gguf"}


def test_a_gguf_file_is_not_written_over_itself(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(CannotWrite, match="the source itself"):
        write_plan(plan_gguf(source, "q8_0"), source, force=True)
    assert source.read_bytes() == before
    with pytest.raises(UsageError):
        write_plan(plan_gguf(source, "q8_0"), source)


def sparse_checkpoint(folder: Path, **changes: Any) -> Path:
    """Make a checkpoint of any size that takes no room: its weights are zeros that nobody wrote."""
    config = {**CONFIG, "num_hidden_layers": 1, **changes}
    make_checkpoint(folder, num_hidden_layers=1)
    edit_json(folder / "config.json", **changes)
    header, end = {}, 0
    for name, values in random_weights({**CONFIG, "num_hidden_layers": 1}).items():
        sizes = {CONFIG["intermediate_size"]: config["intermediate_size"], CONFIG["vocab_size"]: config["vocab_size"]}
        shape = [sizes.get(size, size) for size in values.shape]
        length = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + length]}
        end += length
    write_container(folder / "model.safetensors", json.dumps(header).encode(), b"")
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size + end)
    return folder


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "tiny", intermediate_size=600_000)  # three matrices of 77 MB
    script = (
        "import sys; from pathlib import Path; import metaalign_edge; from metaalign_edge_runtime.llama.memory import peak_mb; from metaalign_edge_convert import *\n"
        "plan = plan_checkpoint(open_checkpoint(Path(sys.argv[1])), sys.argv[3], check=False)\n"
        "before = peak_mb(); done = write_plan(plan, Path(sys.argv[2])); print(done.peak_mb - before, plan.memory / 1e6)"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "big.gguf"), "Q4_0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, said = map(float, done.stdout.split())
    assert grown < said + 10
    assert said < 40 + 8 * planning.WORKERS


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_plan_is_what_is_written_then(wide: Path, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(wide), "--outtype", "q4_k_m"]
    assert edge.run([*command, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(empty.iterdir()) == []
    assert edge.run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {
        "output", "architecture", "parameters", "outtype", "bytes", "template", "seconds", "peak_mb", "checks",
    }  # fmt: skip
    same = ("output", "architecture", "parameters", "outtype", "bytes", "template")
    assert {key: planned[key] for key in same} == {key: result[key] for key in same}
    assert result["output"] == "tiny-chat-Q4_K_M.gguf"
    assert (empty / result["output"]).stat().st_size == result["bytes"]
    found = list(types(empty / result["output"]).values())
    assert {kind: row["count"] for kind, row in planned["tensors"].items()} == {
        kind: found.count(kind) for kind in found
    }
    assert planned["free_bytes"] > planned["bytes"]
    assert result["checks"][1:] == [
        "loads, with 512 tokens and the end token <|endoftext|>",
        "the template metaalign renders 33 tier-safe tokens",
        "a token is decoded",
    ]
    assert edge.run([*command, "--dry-run", "--force"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("tiny-chat-Q4_K_M.gguf: llama, ")
    assert "MB needed" in text


def test_a_gguf_file_is_a_source_too(source: Path, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edge.run(["convert", str(source), "--outtype", "Q6_K"]) == 0
    assert capsys.readouterr().err.startswith("tiny-chat-Q6_K.gguf: llama, ")
    assert gguf.GGUFReader(empty / "tiny-chat-Q6_K.gguf").fields["metaalign.template"].contents() == "metaalign"
    for arguments, code, message in (
        (["--template", "metaalign"], 2, "is a GGUF file and keeps what it has"),
        (["--outtype", "Q6_K"], 2, "tiny-chat-Q6_K.gguf: exists already; use --force"),
        (["--outtype", "q2"], 2, "is not one of f32"),
        (["--outtype", "iq2_xs"], 5, "IQ2_XS needs an importance matrix"),
    ):
        assert edge.run(["convert", str(source), *arguments]) == code
        assert message in capsys.readouterr().err
    assert [path.name for path in empty.iterdir() if path.name != "home"] == ["tiny-chat-Q6_K.gguf"]


def test_weights_too_large_for_float16_are_told_of_without_being_asked(
    empty: Path, says: Callable[..., tuple[str, str]]
) -> None:
    folder = make_checkpoint(empty / "tiny")
    weights = random_weights(CONFIG)
    weights["model.layers.0.mlp.up_proj.weight"][:] = 3e38
    write_weights(folder, weights)
    first, second, _ = says("convert", str(folder), "--outtype", "f16")[1].splitlines()
    assert first.startswith("metaalign-edge: warning: model.layers.0.mlp.up_proj.weight hold numbers up to 3e+38")
    assert second.startswith("metaalign-edge: warning: what the result computes are no numbers; use --outtype bf16")


def test_a_result_that_does_not_load_is_not_kept(empty: Path, refuses: Callable[..., str]) -> None:
    folder = make_checkpoint(empty / "tiny")
    template = empty / "bad.jinja"
    template.write_text("{{ raise_exception('never') }}{{ messages }}")
    said = refuses(7, "convert", str(folder), "--template", str(template))
    assert "the result fails its check, so it was removed (--no-check keeps it)" in said
    assert {path.name for path in empty.iterdir() if path.name != "home"} == {"tiny", "bad.jinja"}


def test_ctrl_c_stops_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "tiny", intermediate_size=16_000_000)
    edit_json(folder / "config.json", hidden_size=64)
    command = [sys.executable, "-m", "metaalign_edge", "convert", str(folder), "--outtype", "IQ4_XS", "--no-check"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(
        part.stat().st_size > 1_000_000 for part in tmp_path.glob(".*.metaalign-part")
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "")
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["tiny"]
