"""Open a checkpoint: everything in it is checked and mapped to GGUF, but no weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from metaalign_edge_runtime.errors import LoadError, NotFound, counted, some

from . import pieces as pieces  # fills the registry
from .architectures import Architecture, Rule, Transform, find
from .chat import read_templates
from .config import Config
from .folder import Folder
from .patch import Patch
from .shards import STORED_AS, Tensor, list_tensors
from .vocabulary import Vocabulary, read_vocabulary

IGNORED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")  # buffers that old versions saved
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")  # of a vision model, beside its language model


@dataclass(frozen=True)
class Output:
    """A tensor of the GGUF file that comes from the checkpoint."""

    name: str  # in GGUF
    shape: tuple[int, ...]
    tensor: Tensor
    transform: Transform | None  # of the tensor's rows


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint that can be converted."""

    folder: Folder
    piece: Architecture
    config: Config
    mapped: list[tuple[Tensor, Rule]]  # every tensor with its rule, in the order of the shards
    tied_head: Tensor | None  # a head that was saved though it is tied to the embedding; it is left out
    vocabulary: Vocabulary
    templates: dict[str, str]
    notes: tuple[str, ...] = ()  # remarks for the user
    patches: Mapping[str, Patch] = field(default_factory=dict)  # tensor name -> changes of adapters

    @property
    def architecture(self) -> str:
        """Return the name of the architecture in GGUF."""
        return self.piece.name

    @property
    def name(self) -> str:
        """Return the name of the model: its id on the hub, or the name of the folder."""
        return self.folder.hub_id or self.folder.name

    @property
    def parameters(self) -> int:
        """Return the number of weights in the GGUF file."""
        made = sum(array.size for _, array in self.piece.extra(self.config))
        return made + sum(math.prod(tensor.shape) for tensor, _ in self.mapped)

    @property
    def chat_template(self) -> str | None:
        """Return the chat template of the checkpoint, None if it has none."""
        return self.templates.get("default")

    @property
    def tokens(self) -> frozenset[str]:
        """Return the texts of the added and special tokens."""
        return self.vocabulary.marked

    @cached_property
    def embedding(self) -> str:
        """Return the name of the embedding in the checkpoint."""
        return next(output.tensor.name for output in self.outputs() if output.name == "token_embd.weight")

    @cached_property
    def head(self) -> str:
        """Return the name of the output head in the checkpoint, even if it is tied to the embedding and absent."""
        return next((output.tensor.name for output in self.outputs() if output.name == "output.weight"), HEAD)

    @property
    def tied(self) -> bool:
        """Return whether head and embedding are one tensor."""
        return self.head not in self.piece.expected(self.config)

    def outputs(self) -> list[Output]:
        """Return the tensors of the GGUF file that come from the checkpoint, in the order of the file."""
        names = self.piece.gguf_names(self.config.integer("num_hidden_layers"))
        sizes = self.piece.sizes(self.config)
        found = []
        for tensor, rule in self.mapped:
            if not rule.parts:
                name = str(names.get_name(tensor.name, (".weight", ".bias")))
                transform = rule.transform(self.config, tensor.shape[0]) if rule.transform else None
                found.append(Output(name, tensor.shape, tensor, transform))
            for part in rule.parts:
                layer = next(word for word in tensor.name.split(".") if word.isdecimal())
                shape = (sizes[part.rows], *tensor.shape[1:])
                transform = part.transform(self.config, tensor.shape[0])
                found.append(Output(part.gguf.format(layer), shape, tensor, transform))
        return found


def text_model_name(name: str) -> str:
    """Return the name that a tensor of a vision model's language part has in a model without vision."""
    return name.replace("language_model.", "")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in the folder `path` and check everything but the weights.

    Raises NotFound if the folder holds none, LoadError if it cannot be converted.
    """
    try:
        return _open(path)
    except RecursionError:
        raise LoadError(f"{path}: a file in it is nested too deeply to be genuine") from None


def _open(path: Path) -> Checkpoint:
    folder = Folder(path)
    if not folder.has("config.json"):
        if folder.has("adapter_config.json"):
            raise LoadError(f"{path}: a LoRA adapter, not a model: convert its base model, with --lora {path}")
        raise NotFound(f"{path}: no config.json in the folder, so it holds no Hugging Face checkpoint")
    if folder.has("hf_quant_config.json"):
        raise LoadError("hf_quant_config.json: the weights are quantized already; convert the original checkpoint")
    raw = folder.json("config.json")
    piece, config, notes = find(raw)
    for pair in (pair for key in (piece.first, *piece.keys) for pair in key.pairs(config)):
        _check_range(*pair)
    expected = piece.expected(config)
    tensors = list_tensors(folder)
    if isinstance(raw.get("text_config"), dict):
        others = [name for name in tensors if name.removeprefix("model.").startswith(OTHER_PARTS)]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in set(others)}
        if others:
            seeing = counted(len(others), "tensor")
            notes = (*notes, f"only the language model is converted, without {seeing} for images")
    mapped, tied_head = _map(tensors, expected, config)
    vocabulary = read_vocabulary(folder, config.integer("vocab_size"), raw, piece.vocabulary)
    return Checkpoint(folder, piece, config, mapped, tied_head, vocabulary, read_templates(folder), notes)


def _check_range(key: str, value: object) -> None:
    if isinstance(value, float) and not 1e-38 < value < 3e38:
        raise LoadError(f"config.json: {key} would be {value}, which float32 cannot hold")


def _map(
    tensors: dict[str, Tensor], expected: dict[str, tuple[Rule, tuple[int, ...]]], config: Config
) -> tuple[list[tuple[Tensor, Rule]], Tensor | None]:
    """Map every tensor to its rule: none may be missing, left over or misshapen. Raises LoadError with their names.

    Returns the mapped tensors, and a head that was saved though it is tied.
    """
    named = (replace(tensor, name=text_model_name(tensor.name)) for tensor in tensors.values())
    kept = {tensor.name: tensor for tensor in named if not tensor.name.endswith(IGNORED)}
    tied_head = kept.pop(HEAD, None) if HEAD not in expected else None
    missing = [name for name in expected if name not in kept]
    if missing:
        raise LoadError(f"the checkpoint lacks {some(missing)}; download it again")
    surplus = [name for name in kept if name not in expected]
    if surplus:
        raise LoadError(f"{some(surplus)}: no place for this in the architecture {config.get('architectures')[0]}")
    mapped = []
    for name, tensor in kept.items():
        rule, shape = expected[name]
        _check(tensor, shape)
        mapped.append((tensor, rule))
    if tied_head is not None:
        _check(tied_head, expected[EMBEDDING][1])
    return mapped, tied_head


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise LoadError(
            f"{tensor.shard}: {tensor.name} has the shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
        )
    if tensor.dtype not in STORED_AS:
        raise LoadError(
            f"{tensor.shard}: {tensor.name} is stored as {tensor.dtype}; convert the original checkpoint, in float16, "
            "bfloat16 or float32"
        )
