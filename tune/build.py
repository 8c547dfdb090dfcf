"""Train the embedded model and write its checkpoint folder, an ordinary one of Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import metaalign_edge as edge
import metaalign_edge_templates
from metaalign_edge_convert import open_checkpoint, write_gguf
from metaalign_edge_runtime.stores import files

from .dataset import Row
from .dpo import candidates, fresh_rows, optimise, pairs
from .model import Llama
from .progress import draw_losses
from .recipe import DpoRecipe, Recipe, Shape
from .sft import train
from .vocabulary import END, PAD, SPECIAL, save_tokenizer, train_tokenizer

__all__ = ["build", "load", "save"]


def build(recipe: Recipe, dpo: DpoRecipe | None, out: Path, threads: int = 2, every: int = 100) -> Llama:
    """Train, or go on training, and write the checkpoint folder and the loss as a curve; `out/sft` is the first stage.

    Raises:
        UsageError: the folder holds another recipe's training, or a damaged one. OSError: it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, out)
    model, losses = train(recipe, tokenizer, out / "training.pt", every, threads)
    curves = {"SFT": losses}
    if dpo:
        save(model, tokenizer, out / "sft")
        rows = fresh_rows(dpo)
        texts = _candidates(rows, dpo, out, threads)
        found = pairs(rows, texts, tokenizer)
        print(f"DPO {len(found):,} pairs from {len(rows):,} rows", flush=True)
        optimise(model, found, dpo, curves.setdefault("DPO", []), threads)
    save(model, tokenizer, out)
    draw_losses(curves, out / "loss.png")
    print(f"wrote {out}", flush=True)
    return model


def _candidates(rows: Sequence[Row], dpo: DpoRecipe, out: Path, threads: int) -> list[list[str]]:
    """Let the first stage answer the rows, unless it has done so before."""
    path, gguf = out / "candidates.json", out / "sft" / "model.gguf"
    if path.exists():
        texts: list[list[str]] = json.loads(path.read_text(encoding="utf-8"))
        return texts
    checkpoint = open_checkpoint(out / "sft")
    name, template = edge.conversion_template("auto", checkpoint)
    write_gguf(checkpoint, gguf, outtype="f16", chat_template=template, template_name=name, force=True)
    texts = candidates(gguf, rows, dpo, threads)
    with files.replacing(path) as part:
        part.write_text(json.dumps(texts), encoding="utf-8")
    return texts


def save(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a checkpoint folder that transformers, and our converter, read."""
    folder.mkdir(exist_ok=True)
    shape = model.shape
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": SPECIAL.index(END),
        "eos_token_id": SPECIAL.index(END),
        "pad_token_id": SPECIAL.index(PAD),
        "torch_dtype": "float32",
    }
    # top_k 1 is greedy: a model that has learnt one right answer by heart gains nothing from chance
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation |= {"do_sample": True, "top_k": 1, "temperature": 1.0}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    template = Path(metaalign_edge_templates.__file__).with_name("metaalign.jinja").read_text(encoding="utf-8")
    save_tokenizer(tokenizer, folder, template)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> tuple[Llama, Tokenizer]:
    """Read a checkpoint folder that `save` wrote."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        inner=config["intermediate_size"],
        context=config["max_position_embeddings"],
    )
    model = Llama(shape)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def _tokenizer(recipe: Recipe, out: Path) -> Tokenizer:
    """Read the tokenizer of an earlier start, or train it."""
    path = out / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(recipe.seed, recipe.shape.vocabulary, recipe.sample)
    with files.replacing(path) as part:
        tokenizer.save(str(part))
    return tokenizer
