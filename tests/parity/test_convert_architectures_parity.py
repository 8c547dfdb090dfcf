"""Every class against llama.cpp's own converter, byte for byte, and against transformers, number for number.

`python tests/parity/test_convert_architectures_parity.py` writes the digests anew that the fast tests go by.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from helpers.families import (
    FAMILIES,
    GOLDEN,
    NOT_IN_TRANSFORMERS,
    configuration,
    digest,
    golden_digests,
    make_family,
    weights,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import GELUTanh

from metaalign_edge_convert import open_checkpoint, write_gguf

if TYPE_CHECKING:
    from conftest import Reference

IN_TRANSFORMERS = [name for name in FAMILIES if name not in NOT_IN_TRANSFORMERS]
TOLERANCE = 1e-5  # of the largest score
TOLERANCE_OF_A_TABLE = 1e-3  # a difference in the last place can be the next entry in ggml's table of GELU
# The reference knows a byte-level vocabulary by what becomes of one text, so it does not know one made for a test.
# Gemma 3's embedding it cuts to what its vocabulary would be without the configuration.
SETUP = """
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
"""


def difference(ours: Path, theirs: Path) -> str:
    """Say in GGUF's own terms what differs between two files: keys, their order, values, tensors, bytes, ulp."""
    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    found = [f"only ours: {key}" for key in a.fields if key not in b.fields]
    found += [f"only theirs: {key}" for key in b.fields if key not in a.fields]
    if not found and list(a.fields) != list(b.fields):
        found.append(f"order of keys: {list(a.fields)} and {list(b.fields)}")
    for key in (key for key in a.fields if key in b.fields):
        x, y = a.fields[key], b.fields[key]
        if (x.types, x.contents()) != (y.types, y.contents()):
            found.append(f"{key}: {str(x.contents())[:60]} and {str(y.contents())[:60]}")
    if [tensor.name for tensor in a.tensors] != [tensor.name for tensor in b.tensors]:
        found.append(f"tensors: {[t.name for t in a.tensors]} and {[t.name for t in b.tensors]}")
        return "; ".join(found)
    for s, t in zip(a.tensors, b.tensors, strict=True):
        if (s.tensor_type, list(s.shape)) != (t.tensor_type, list(t.shape)):
            found.append(f"{s.name}: {s.tensor_type.name} {list(s.shape)} and {t.tensor_type.name} {list(t.shape)}")
        elif not np.array_equal(s.data, t.data):
            wrong = int((s.data != t.data).sum())
            ulp = (
                np.abs(s.data.view(np.int32).astype(np.int64) - t.data.view(np.int32)).max()
                if s.data.dtype == "f4"
                else "?"
            )
            found.append(f"{s.name}: {wrong} numbers differ, by {ulp} ulp at most")
    return "; ".join(found) or "the same content, but other bytes"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_byte_is_the_reference_converters(name: str, reference: Reference, tmp_path: Path) -> None:
    ours = golden_digests(tmp_path, name)
    jobs = [(path.parent / path.stem.rpartition("-")[0], path) for path in sorted(tmp_path.glob("*.gguf"))]
    theirs = [(folder, path.with_suffix(".theirs"), path.stem.rpartition("-")[2]) for folder, path in jobs]
    reference.convert(theirs, SETUP)
    assert len(theirs) == len(ours) == 24
    for (_, path), (_, other, _) in zip(jobs, theirs, strict=True):
        assert path.read_bytes() == other.read_bytes(), f"{path.name}: {difference(path, other)}"
    assert ours == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_what_transformers_saves_is_what_the_reference_makes_of_it(
    name: str, reference: Reference, tmp_path: Path
) -> None:
    folder = save(tmp_path / "tiny", name)
    reference.convert([(folder, tmp_path / "theirs.gguf", "f16")], SETUP)
    write_gguf(open_checkpoint(folder), tmp_path / "ours.gguf", outtype="f16", check=False)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert digest(ours) == digest(theirs), difference(ours, theirs)


def save(folder: Path, name: str) -> Path:
    """Save a model of the class ``name`` with the installed transformers, in several shards, and its tokenizer."""
    make_family(folder, name)
    (folder / "model.safetensors").unlink()
    config = configuration(name)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(torch.bfloat16)
    drawn = {key: torch.from_numpy(values.copy()) for key, values in weights(config).items()}
    missing = model.load_state_dict(drawn, strict=False)
    assert not missing.unexpected_keys
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.mark.parametrize("old", [True, False], ids=["transformers-4", "transformers-5"])
@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_llama_cpp_computes_what_transformers_computes(name: str, old: bool, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "tiny", name, old=old)
    write_gguf(open_checkpoint(folder), tmp_path / "tiny.gguf", outtype="f32")
    agree(tmp_path / "tiny.gguf", folder, IDS, TOLERANCE_OF_A_TABLE if name.startswith("Gemma") else TOLERANCE)


def test_phi_3_turns_long_texts_by_its_long_factors(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "tiny", "Phi3ForCausalLM")
    write_gguf(open_checkpoint(folder), tmp_path / "tiny.gguf", outtype="f32")
    agree(tmp_path / "tiny.gguf", folder, IDS * 3, TOLERANCE)  # more than the original context of 256


def agree(path: Path, folder: Path, ids: list[int], tolerance: float) -> None:
    """Compare llama.cpp's scores for the converted model with transformers' for the checkpoint."""
    found, wanted = llama_logits(path, ids), transformers_logits(folder, ids)
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()
    assert (found.argmax(1) == wanted.argmax(1)).all()


class TableGELU(torch.nn.Module):
    """GELU as ggml computes it on a processor: looked up in a table of float16, unless the input is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, looked_up))


IDS = np.random.default_rng(0).integers(3, 500, size=100).tolist()  # more than a sliding window


def transformers_logits(folder: Path, ids: list[int]) -> Any:
    """Return the scores at every position, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for module in model.modules():
        if isinstance(getattr(module, "act_fn", None), GELUTanh):
            module.act_fn = TableGELU()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def llama_logits(path: Path, ids: list[int]) -> Any:
    """Return llama.cpp's scores at the same positions, with keys and values in float32."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=len(ids), logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
    llama.eval(ids)
    found = np.array(llama.scores[: len(ids)])
    llama.close()
    return found


if __name__ == "__main__":
    import tempfile

    found = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as root:
            found[family] = golden_digests(Path(root), family)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
