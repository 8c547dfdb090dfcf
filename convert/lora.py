"""The folder of a LoRA adapter, as PEFT writes it. Every tensor in it must belong to a tensor of the base model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from metaalign_edge_runtime.errors import LoadError, NotFound, some

from .checkpoint import Checkpoint, text_model_name
from .config import Config
from .folder import Folder
from .lora_settings import INSTEAD, SETTINGS, WEIGHTS, PeftSettings
from .patch import same_numbers
from .shards import PICKLED, STORED_AS, Tensor, read_header

PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"
PART = re.compile(
    rf"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector|{re.escape(ROWS)})(?:\.weight)?"
)
BASE = re.compile(r"(?:\.token_adapter)?\.base_layer(?=\.)")  # PEFT puts it into the names of the layers that it wraps


@dataclass(frozen=True)
class Pair:
    """Two small matrices that change a matrix of the base model by `alpha / rank * B @ A`.

    With rsLoRA the change is `alpha / sqrt(rank) * B @ A`.
    """

    a: Tensor
    b: Tensor
    rank: int
    alpha: float
    strength: float  # the change is strength / rank * B @ A: alpha, or with rsLoRA alpha * sqrt(rank)
    magnitude: Tensor | None  # of DoRA: the length of each row after the change
    bias: Tensor | None  # added to the base model's bias with the same scale
    embedding: bool  # it changes the embedding, which is stored transposed: `(B @ A).T` is added


@dataclass(frozen=True)
class Rows:
    """Rows that replace those of some tokens in the embedding or the head."""

    tokens: tuple[int, ...]  # their ids
    values: Tensor  # one row for each of them


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter, checked against its base model. The keys are names of the base model's tensors."""

    folder: Folder
    scale: float  # factor that the user asks for; 1 applies the adapter as it was trained
    alpha: float
    strength: float  # of all pairs to which no rank_pattern or alpha_pattern applies; see Pair
    pairs: Mapping[str, Pair]
    rows: Mapping[str, Rows]
    whole: Mapping[str, Tensor]  # tensors that replace the base model's and differ from them
    config: Config  # the base model's; vocab_size is that of the adapter's embedding if it brings one
    invocation: tuple[int, ...]  # ids of the tokens that switch an activated LoRA (aLoRA) on
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The adapter's name: the folder's, or the last part of the hub's id."""
        return label(self.folder)


def open_adapter(path: Path, checkpoint: Checkpoint, scale: float = 1.0) -> PeftAdapter:
    """Open the PEFT adapter in the folder `path` and check it against its base model, `checkpoint`.

    scale: the factor for its changes when it is merged.

    Raises NotFound if the folder holds no adapter, LoadError if it is damaged, does not fit the base model, or is more
    than LoRA.
    """
    if not math.isfinite(scale) or scale == 0:
        raise LoadError(f"{path}: the scale {scale:g} is no use; give a number such as 0.5, or leave the adapter out")
    folder = _folder(path)
    settings = PeftSettings(folder.json(SETTINGS))
    tensors = {tensor.name: tensor for tensor in sorted(read_header(folder, WEIGHTS), key=lambda tensor: tensor.start)}
    parts, whole = _sort(tensors)
    config = _config(checkpoint, whole)
    shapes = _shapes(checkpoint, config, parts, whole)
    rows = {
        f"{module}.weight": _rows(module, parts, shapes, settings) for module in list(parts) if ROWS in parts[module]
    }
    pairs = {
        f"{module}.weight": _pair(module, found, shapes, settings, f"{module}.weight" == checkpoint.embedding)
        for module, found in parts.items()
    }
    settings.check_contents(pairs, rows, whole, [name for name in shapes if name.endswith(".bias")])
    whole = {name: tensor for name, tensor in whole.items() if not _unchanged(checkpoint, name, folder, tensor)}
    if not pairs and not rows and not whole:
        raise LoadError(f"{WEIGHTS}: nothing in it changes the base model")
    return PeftAdapter(
        folder=folder,
        scale=scale,
        alpha=settings.alpha,
        strength=settings.strength(settings.alpha, settings.rank),
        pairs=pairs,
        rows=rows,
        whole=whole,
        config=config,
        invocation=settings.invocation,
        notes=settings.notes(label(folder)),
    )


def label(folder: Folder) -> str:
    """Return the name of a folder, or the last part of its id on the hub."""
    return (folder.hub_id or folder.name).rpartition("/")[2]


def _folder(path: Path) -> Folder:
    """Open the folder and make sure that it holds an adapter in safetensors."""
    if not os.path.isdir(path):
        raise NotFound(f"{path}: no such folder; give the one that holds {SETTINGS}")
    folder = Folder(path)
    if not folder.has(SETTINGS):
        if folder.has("config.json"):
            raise LoadError(f"{path}: a whole model, not a LoRA adapter (no {SETTINGS})")
        raise NotFound(f"{path}: no {SETTINGS} in the folder, so it holds no LoRA adapter of PEFT's")
    if not folder.has(WEIGHTS):
        pickled = [name for name in folder.names() if name.startswith("adapter_model") and name.endswith(PICKLED)]
        if pickled:
            raise LoadError(
                f"{pickled[0]}: pickled weights can run any code when read, so they never are; load the adapter with "
                "PEFT and save it again (save_pretrained), which writes safetensors"
            )
        raise LoadError(f"{path}: no {WEIGHTS} in the folder; download the adapter again")
    return folder


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tell the parts of LoRA (module -> part -> tensor) from tensors that replace one of the base model's whole."""
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise LoadError(f"{WEIGHTS}: {name} does not begin with {PREFIX}, as PEFT names tensors; save it with PEFT")
        if tensor.dtype not in STORED_AS:
            raise LoadError(f"{WEIGHTS}: {name} is stored as {tensor.dtype}; save the adapter in float32 or bfloat16")
        inner = text_model_name(name.removeprefix(PREFIX))
        match = PART.fullmatch(inner)
        owner, key = (parts.setdefault(match[1], {}), match[2]) if match else (whole, BASE.sub("", inner))
        if key in owner:
            raise LoadError(f"{WEIGHTS}: {name} stands there twice, under two spellings; save the adapter again")
        owner[key] = tensor
    return parts, whole


def _config(checkpoint: Checkpoint, whole: Mapping[str, Tensor]) -> Config:
    """Return the base model's configuration, with the number of rows in the adapter's embedding if it brings one."""
    embedding = whole.get(checkpoint.embedding)
    if embedding is None or not embedding.shape:
        return checkpoint.config
    return checkpoint.config.changed(vocab_size=embedding.shape[0])


def _shapes(
    checkpoint: Checkpoint, config: Config, parts: Mapping[str, Mapping[str, Tensor]], whole: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base model's tensors by name, a tied head like the embedding.

    Raises LoadError if the adapter has a part or a whole tensor for something else, or one of another shape.
    """
    shapes = {name: shape for name, (_, shape) in checkpoint.piece.expected(config).items()}
    shapes.setdefault(checkpoint.head, shapes[checkpoint.embedding])
    homeless = [name for name in whole if name not in shapes]
    homeless += [
        f"{module}.{part}" for module, found in parts.items() for part in found if f"{module}.weight" not in shapes
    ]
    if homeless:
        raise LoadError(f"{WEIGHTS}: {some(homeless)}: no place for this in the base model; is it another one's?")
    for name, tensor in whole.items():
        _check(tensor, shapes[name])
    return shapes


def _pair(
    module: str,
    found: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    settings: PeftSettings,
    embedding: bool,
) -> Pair:
    """Build the pair of a module out of its tensors. Raises LoadError if one is missing, unexpected or misshapen."""
    shape = shapes[f"{module}.weight"]
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    wanted = {a, b}
    wanted |= {"lora_magnitude_vector"} if settings.dora else set()
    wanted |= {"lora_B.bias"} if settings.lora_bias and not embedding else set()
    missing, surplus = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    if missing:
        raise LoadError(f"{WEIGHTS}: {module} lacks {some(missing)}; save the adapter again, gathered on one machine")
    if surplus:
        raise LoadError(f"{WEIGHTS}: {module} has {some(surplus)}, which {SETTINGS} does not announce")
    if len(shape) != 2:
        raise LoadError(f"{WEIGHTS}: {module} is no matrix in the base model, so LoRA has no place there")
    rank, alpha = settings.rank_of(module), settings.alpha_of(module)
    rows, columns = reversed(shape) if embedding else shape
    _check(found[a], (rank, columns))
    _check(found[b], (rows, rank))
    magnitude, bias = found.get("lora_magnitude_vector"), found.get("lora_B.bias")
    if magnitude is not None:
        _check(magnitude, (rows,))
    if bias is not None:
        if f"{module}.bias" not in shapes:
            raise LoadError(f"{WEIGHTS}: {module} has lora_B.bias, but the base model has no bias to add it to")
        _check(bias, (rows,))
    return Pair(found[a], found[b], rank, alpha, settings.strength(alpha, rank), magnitude, bias, embedding)


def _rows(
    module: str, parts: dict[str, dict[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], settings: PeftSettings
) -> Rows:
    """Take the trained rows of a module out of `parts`, which holds them no longer. Raises LoadError."""
    values, tokens = parts[module].pop(ROWS), settings.tokens_of(module)
    if parts[module]:
        raise LoadError(f"{WEIGHTS}: {module} has {ROWS} and LoRA's matrices too; {INSTEAD}")
    del parts[module]
    count, *columns = shapes[f"{module}.weight"]
    _check(values, (len(tokens), *columns))
    if len(set(tokens)) < len(tokens) or max(tokens, default=0) >= count:
        raise LoadError(f"{SETTINGS}: trainable_token_indices names a token twice, or one beyond the {count} rows")
    return Rows(tokens, values)


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise LoadError(
            f"{WEIGHTS}: {tensor.name} has the shape {list(tensor.shape)}, but the base model and {SETTINGS} "
            f"ask for {list(shape)}; is it another model's?"
        )


def _unchanged(checkpoint: Checkpoint, name: str, folder: Folder, tensor: Tensor) -> bool:
    """Say whether a whole tensor equals the base model's: PEFT often saves an embedding that was not trained."""
    own = {own.name: own for own, _ in checkpoint.mapped}
    base = own.get(name) or own[checkpoint.embedding]  # a tied head is the embedding
    return same_numbers(checkpoint.folder, base, folder, tensor)
