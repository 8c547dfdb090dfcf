"""Models on this machine: what -m means, `models list`, `show`, `rm` and `default`, and GGUFs in several parts."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import huggingface_hub
import pytest
from helpers.gguf_files import finish
from helpers.hub import keep

import metaalign_edge as edge
from metaalign_edge_runtime.llama import memory
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.stores import models

Refuses = Callable[..., str]
Says = Callable[..., str]
REPOSITORY = "some/tiny-GGUF"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"  # a commit


@pytest.fixture
def says(capfd: pytest.CaptureFixture[str]) -> Says:
    """Run a command that must succeed; return what it prints."""

    def run(*arguments: str) -> str:
        code = edge.run(arguments)
        out, error = capfd.readouterr()
        assert code == 0, error
        return out

    return run


@pytest.fixture
def cached(tiny: Path) -> Path:
    """A model in the hub's cache, as huggingface_hub leaves it there."""
    return keep(models.hub_folder(), REPOSITORY, "tiny-Q8_0.gguf", tiny.read_bytes())


def write_gguf(path: Path, architecture: str = "llama", **metadata: object) -> Path:
    """Write a GGUF of a single weight."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key.replace("__", "."), value)
    writer.add_tensor("a", gguf.np.zeros((32,), dtype="float32"))
    return finish(writer, path)


# ---- where models lie


def test_the_hubs_cache_is_where_huggingface_hub_has_it() -> None:
    settings = [
        {},
        {"HF_HOME": "/a"},
        {"HF_HUB_CACHE": "/b", "HF_HOME": "/a"},
        {"HUGGINGFACE_HUB_CACHE": "/c"},
        {"XDG_CACHE_HOME": "/d"},
        {"HF_HOME": "~/e"},
        {"HF_HUB_CACHE": "$HOME/f"},
    ]
    code = f"""
import importlib, os, huggingface_hub.constants as constants, metaalign_edge
from metaalign_edge_runtime.stores import models
for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
for setting in {settings!r}:
    os.environ.update(setting)
    importlib.reload(constants)
    assert str(models.hub_folder()) == constants.HF_HUB_CACHE, (setting, models.hub_folder(), constants.HF_HUB_CACHE)
    for name in setting:
        del os.environ[name]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_a_home_there_is_no_cache_but_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    monkeypatch.setenv("HF_HOME", "~nobody-of-this-name/hub")
    assert models.model_names() == ["metaalign-demo"]
    assert "models list" in refuses(3, "chat", "-m", "zzz", "tea?")


@pytest.mark.parametrize("name, quantization", [
    ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
    ("Llama-3.2-1B-Instruct-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
    ("model.Q8_0.gguf", "Q8_0"),
    ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
    ("Phi-3-mini-4k-instruct-fp16.gguf", "F16"),
    ("Qwen3-0.6B-BF16.gguf", "BF16"),
    ("x-Q4_K_M-imat.gguf", "Q4_K_M"),
    ("Q4_K_M/model-00001-of-00002.gguf", "Q4_K_M"),
    ("IQ3_XXS/a-IQ3_XXS-00001-of-00003.gguf", "IQ3_XXS"),
    ("Qwen3-Q-model.gguf", ""),
])  # fmt: skip
def test_a_files_name_tells_its_quantisation(name: str, quantization: str) -> None:
    assert models.quantization_of(name) == quantization


@pytest.mark.parametrize("name, model", [
    ("a.gguf", True), ("A-Q8_0.GGUF", True), ("explorations.gguf", True), ("a-00001-of-00003.gguf", True),
    ("a-00002-of-00003.gguf", False), ("mmproj-a-f16.gguf", False), ("a.mmproj-Q8_0.gguf", False), ("imatrix.gguf", False),
    ("a-lora-f16.gguf", False), ("nomic-embed-text-v1.5.Q4_K_M.gguf", False), ("bge-reranker-v2.gguf", False),
    ("ggml-vocab-llama.gguf", False), ("._a.gguf", False), ("model.safetensors", False),
])  # fmt: skip
def test_side_files_are_told_from_models_by_name(name: str, model: bool) -> None:
    assert models.is_main_part(name) is model


def test_what_a_file_says_of_itself_outweighs_its_name(tmp_path: Path, says: Says, refuses: Refuses) -> None:
    home = tmp_path / "home/.lmstudio/models/some/things"
    adapter = write_gguf(home / "one.gguf", general__type="adapter")
    write_gguf(home / "two.gguf", "clip")
    write_gguf(home / "three.gguf", "bert", bert__pooling_type=1)
    assert [row["name"] for row in json.loads(says("models", "list", "--json"))] == ["metaalign-demo"]
    assert "adapter" in refuses(5, "chat", "-m", str(adapter), "tea?")


def test_models_of_other_programs_are_listed_and_never_removed(
    tiny: Path, tmp_path: Path, says: Says, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, llama = tmp_path / "home", tmp_path / "llama"
    places = {
        "llama_tiny-q4_0": llama / "llama_tiny-q4_0.gguf",
        "pub/tiny:Q8_0": home / ".lmstudio/models/pub/tiny/tiny-Q8_0.gguf",
        "old/tiny:F16": home / ".cache/lm-studio/models/old/tiny/tiny-f16.gguf",
    }
    for path in places.values():
        path.parent.mkdir(parents=True)
        shutil.copy(tiny, path)
    monkeypatch.setenv("LLAMA_CACHE", str(llama))
    in_llamas_hub = keep(
        llama, "new/tiny", "tiny-Q6_K.gguf", tiny.read_bytes()
    )  # newer versions keep a hub's cache there
    found = {row["name"]: row["path"] for row in json.loads(says("models", "list", "--json"))}
    assert found.pop("metaalign-demo") == str(models.embedded_model())
    assert found == {**{name: str(path) for name, path in places.items()}, "new/tiny:Q6_K": str(in_llamas_hub)}
    for name, path in places.items():
        assert models.resolve_model(name) == path
        assert "only what is there" in refuses(2, "models", "rm", name)
    assert all(path.is_file() for path in places.values())


def test_llama_cpps_own_cache_is_found_without_its_variable(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    path = tmp_path / "home/.cache/llama.cpp/a.gguf"
    path.parent.mkdir(parents=True)
    shutil.copy(tiny, path)
    assert models.resolve_model("a") == path


# ---- what -m means


def test_a_path_comes_before_the_cache_and_the_cache_before_the_hub(
    tiny: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    for name in (
        REPOSITORY,
        f"{REPOSITORY}:Q8_0",
        f"{REPOSITORY}:q8_0",
        f"{REPOSITORY}:tiny-Q8_0.gguf",
        REPOSITORY.upper(),
    ):
        assert models.resolve_model(name) == cached, name
    assert models.resolve_model(f"{REPOSITORY}:Q4_K_M") is None and models.resolve_model("some/none") is None
    monkeypatch.chdir(tmp_path)
    Path("some").mkdir()
    shutil.copy(tiny, REPOSITORY)
    assert models.resolve_model(REPOSITORY) == Path(REPOSITORY)
    assert "no model file" in refuses(3, "render", "-m", "./some/none", "tea?")
    assert "no model file" in refuses(3, "render", "-m", "some/none.gguf", "tea?")


def test_a_name_that_does_not_exist_says_which_are_near(cached: Path, refuses: Refuses) -> None:
    assert "do you mean metaalign-demo?" in refuses(3, "chat", "-m", "metalign-demo", "tea?")
    assert "models list" in refuses(3, "chat", "-m", "zzz", "tea?")


def test_of_several_the_one_that_came_last_is_meant(tiny: Path, cached: Path) -> None:
    newer = keep(models.hub_folder(), REPOSITORY, "tiny-f16.gguf", tiny.read_bytes() + bytes(1))
    os.utime(cached, (1, 1), follow_symlinks=False)
    assert models.resolve_model(REPOSITORY) == newer


def test_names_are_had_without_anything_heavy(cached: Path) -> None:
    code = "import sys, metaalign_edge; from metaalign_edge_runtime.stores import models; print(*models.model_names()); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert out[0].split() == [f"{REPOSITORY}:Q8_0", "metaalign-demo"]
    assert not {"huggingface_hub", "llama_cpp", "numpy", "gguf", "jinja2"} & set(out[1].split())


def test_files_of_one_quantisation_are_told_apart_by_their_names(tiny: Path, cached: Path) -> None:
    keep(models.hub_folder(), REPOSITORY, "other-Q8_0.gguf", tiny.read_bytes())
    assert sorted(models.model_names())[1:] == [f"{REPOSITORY}:other-Q8_0.gguf", f"{REPOSITORY}:tiny-Q8_0.gguf"]


# ---- list and show


def test_the_list_has_one_row_a_model_with_what_matters(cached: Path, tiny: Path, says: Says) -> None:
    row = json.loads(says("models", "list", "--json"))[0]
    weights = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(tiny).tensors)
    assert row == {
        "name": f"{REPOSITORY}:Q8_0", "path": str(cached), "bytes": tiny.stat().st_size, "architecture": "llama",
        "parameters": weights, "quantization": "F32", "context": 512, "template": "metaalign", "error": None,
    }  # fmt: skip
    table = says("models", "list").splitlines()
    assert table[1].split()[0] == f"{REPOSITORY}:Q8_0" and table[1].endswith("metaalign")


@pytest.mark.parametrize("cut, word", [(0, "empty"), (100, "damaged"), (0.7, "ends before its weights")])
def test_a_damaged_model_is_listed_as_such_and_the_others_too(
    cut: float, word: str, tiny: Path, cached: Path, says: Says
) -> None:
    data = tiny.read_bytes()
    keep(models.hub_folder(), "some/half", "half-Q4_0.gguf", data[: int(cut * len(data)) if cut < 1 else int(cut)])
    rows = {row["name"]: row for row in json.loads(says("models", "list", "--json"))}
    assert word in rows["some/half:Q4_0"]["error"] and rows["some/half:Q4_0"]["architecture"] is None
    assert rows[f"{REPOSITORY}:Q8_0"]["error"] is None
    assert "damaged: " in says("models", "list")


def test_readings_of_one_file_do_not_disturb_each_other(demo: Path) -> None:
    file, alone = ModelFile(demo), ModelFile(demo)  # a thread loads the model, one chooses its template
    words, infos = file.items("tokenizer.ggml.tokens"), file.tensor_infos()
    read = [(next(words), next(infos), file.token("eos")) for _ in range(3)]
    assert [word for word, _, _ in read] == list(alone.items("tokenizer.ggml.tokens"))[:3]
    assert [info for _, info, _ in read] == list(alone.tensor_infos())[:3] and read[0][2] == alone.token("eos") != ""


def test_metadata_that_make_no_sense_are_damage(tmp_path: Path, says: Says) -> None:
    odd = {"split__count": "three", "llama__context_length": "long", "general__alignment": 32}
    write_gguf(tmp_path / "home/.lmstudio/models/some/odd/odd.gguf", **odd)
    assert [bool(row["error"]) for row in json.loads(says("models", "list", "--json"))] == [True, False]


def test_a_link_that_leads_nowhere_is_damaged_too(cached: Path, says: Says) -> None:
    cached.resolve().unlink()
    assert "cannot read" in json.loads(says("models", "list", "--json"))[0]["error"]


def test_show_says_what_a_model_is_and_what_its_context_takes(demo: Path, says: Says) -> None:
    shown = json.loads(says("models", "show", "--json"))
    assert shown["name"] == "metaalign-demo" and shown["native"] and shown["template"] == "metaalign"
    assert set(shown["marker_tokens"]) == {"<|system_info|>", "<|user_info|>", "<|user|>", "<|assistant|>", "<|end|>"}
    assert shown["marker_words"] == []
    assert shown["kv_bytes_per_1000_tokens"] == 1000 * sum(memory.cache_bytes(ModelFile(demo)) or ())
    text = says("models", "show")
    assert "native" in text and "2.0 MB for each 1,000" in text and f"{shown['parameters']:,}" in text


def test_show_tells_markers_that_are_tokens_from_mere_words(tiny: Path, tmp_path: Path, says: Says) -> None:
    template = "{% for m in messages %}[INST]{{ m.content }}<|end|>{% endfor %}"
    path = write_gguf(tmp_path / "a.gguf", general__license="mit", tokenizer__chat_template=template)
    shown = json.loads(says("models", "show", str(path), "--json"))
    assert (shown["native"], shown["marker_words"], shown["licence"]) == (False, ["[INST]", "<|end|>"], "mit")
    assert shown["kv_bytes_per_1000_tokens"] is None
    assert "wrapped" in says("models", "show", str(path))


def test_show_of_what_is_not_here_asks_no_network(refuses: Refuses) -> None:
    assert "not on this machine" in refuses(3, "models", "show", "some/none")
    assert "models list" in refuses(3, "models", "show", "zzz")


# ---- rm


def test_rm_frees_what_no_other_file_needs(
    tiny: Path, cached: Path, says: Says, capfd: pytest.CaptureFixture[str]
) -> None:
    twin = keep(models.hub_folder(), REPOSITORY, "twin.gguf", tiny.read_bytes())  # the same bytes, so the same blob
    old = keep(models.hub_folder(), REPOSITORY, "tiny-Q8_0.gguf", b"GGUF of an older version", commit=OTHER)
    assert edge.run(["models", "rm", f"{REPOSITORY}:Q8_0"]) == 0
    assert capfd.readouterr().err == "0.0 MB freed\n"
    assert not cached.exists() and not old.exists() and twin.read_bytes() == tiny.read_bytes()
    assert edge.run(["models", "rm", f"{REPOSITORY}:twin.gguf"]) == 0
    assert capfd.readouterr().err == f"{tiny.stat().st_size / 1e6:.1f} MB freed\n"
    assert huggingface_hub.scan_cache_dir(models.hub_folder()).size_on_disk == 0


def test_rm_removes_nothing_where_one_name_is_wrong(cached: Path, tiny: Path, refuses: Refuses) -> None:
    assert "models list" in refuses(3, "models", "rm", REPOSITORY, "zzz")
    assert "only what is there" in refuses(2, "models", "rm", REPOSITORY, "metaalign-demo")
    assert "a path is removed with rm" in refuses(3, "models", "rm", REPOSITORY, str(tiny))
    assert "name the models" in refuses(2, "models", "rm")
    keep(models.hub_folder(), REPOSITORY, "tiny-f16.gguf", b"GGUF")
    assert "several" in refuses(2, "models", "rm", REPOSITORY)
    assert cached.is_file() and tiny.is_file()


def test_what_stopped_downloads_left_is_reported_and_removed(
    cached: Path, says: Says, capfd: pytest.CaptureFixture[str]
) -> None:
    left = cached.resolve().with_name("0" * 64 + ".incomplete")
    left.write_bytes(bytes(10**6))
    assert edge.run(["models", "list"]) == 0
    assert "1.0 MB" in capfd.readouterr().err
    assert edge.run(["models", "rm", "--unfinished"]) == 0
    assert capfd.readouterr().err == "1.0 MB freed\n" and not left.exists() and cached.is_file()


# ---- default


def test_the_default_is_what_was_chosen(cached: Path, demo: Path, tmp_path: Path, says: Says) -> None:
    assert says("models", "default") == "metaalign-demo\n"
    assert says("models", "default", REPOSITORY) == f"{REPOSITORY}:Q8_0\n"
    assert models.resolve_model(None) == cached
    assert json.loads(says("models", "default", "--json")) == {"name": f"{REPOSITORY}:Q8_0", "path": str(cached)}
    assert says("models", "default", "--none") == "metaalign-demo\n"
    assert models.resolve_model(None) == demo
    shutil.copy(demo, tmp_path / "mine.gguf")
    assert says("models", "default", str(tmp_path / "mine.gguf")) == f"{tmp_path / 'mine.gguf'}\n"
    assert models.resolve_model(None) == tmp_path / "mine.gguf"


def test_a_default_that_is_gone_is_an_error_that_names_it(cached: Path, says: Says, refuses: Refuses) -> None:
    says("models", "default", REPOSITORY)
    shutil.rmtree(models.hub_folder())
    assert f"{REPOSITORY}:Q8_0 is not on this machine" in refuses(4, "chat", "--offline", "tea?")
    assert "not on this machine" in refuses(3, "models", "default", "some/none")
    assert "takes no name" in refuses(2, "models", "default", "--none", REPOSITORY)


def test_rm_of_the_default_goes_back_to_the_embedded_model(cached: Path, demo: Path, says: Says) -> None:
    says("models", "default", REPOSITORY)
    says("models", "rm", REPOSITORY)
    assert models.resolve_model(None) == demo


# ---- in several parts


def test_a_model_in_parts_is_one_model(parts: list[Path], tiny: Path, says: Says) -> None:
    file, whole = ModelFile(parts[0]), ModelFile(tiny)
    assert file.paths == parts and len(parts) == 3
    assert file.bytes == sum(part.stat().st_size for part in parts) and file.parameters == whole.parameters
    before = file.identity
    os.utime(parts[2], (1, 1))
    assert file.identity != before
    answers = [
        says("chat", "-m", str(path), "--temp", "0", "--no-stdin", "-n", "8", "tea?") for path in (tiny, parts[0])
    ]
    assert answers[0] == answers[1] != "\n"
    assert "2 more parts" in says("models", "show", str(parts[0]))


def test_a_part_that_is_missing_or_not_the_first_is_named(parts: list[Path], tmp_path: Path, refuses: Refuses) -> None:
    copies = [Path(shutil.copy(part, tmp_path)) for part in parts]
    assert f"give the first, {copies[0].name}" in refuses(5, "chat", "-m", str(copies[1]), "tea?")
    copies[2].unlink()
    assert copies[2].name in refuses(5, "chat", "-m", str(copies[0]), "tea?")
    copies[0].rename(tmp_path / "renamed.gguf")
    assert "00001-of-00003" in refuses(5, "chat", "-m", str(tmp_path / "renamed.gguf"), "tea?")


def test_a_list_of_tensors_without_end_is_damage(tiny: Path, tmp_path: Path, refuses: Refuses) -> None:
    data = tiny.read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[:8] + struct.pack("<Q", 2**62) + data[16:])
    assert "damaged in its list" in refuses(5, "models", "show", str(tmp_path / "a.gguf"))
