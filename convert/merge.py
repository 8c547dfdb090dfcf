"""A checkpoint with LoRA adapters merged in. No weight is read yet: they are patched as they stream into the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import BinaryIO

from metaalign_edge_runtime.errors import LoadError, counted, some

from .architectures import Rule
from .chat import read_templates
from .checkpoint import Checkpoint
from .config import Config
from .folder import Folder
from .lora import PeftAdapter, label
from .lora_settings import SETTINGS
from .patch import LowRank, Patch, Replaced, Shift, Step, same_numbers
from .shards import Tensor
from .vocabulary import read_vocabulary

VOCABULARIES = ("tokenizer.json", "tokenizer.model")
TOKENIZER = {*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


class MergedFolder(Folder):
    """The base model's folder with the adapters' weights added, and the tokenizer of an adapter that brings one."""

    def __init__(self, base: Folder, adapters: Sequence[PeftAdapter], tokenizer: Folder | None) -> None:
        """Begin with the folder `base`; `tokenizer` is the folder of the adapter that brings one."""
        super().__init__(base.root)
        self.name = "-".join([label(base), *(adapter.name for adapter in adapters)])
        self.hub_id = None
        self._base, self._tokenizer = base, tokenizer
        self._beside: dict[str, tuple[Folder, str]] = {}

    def add(self, tensor: Tensor, folder: Folder) -> Tensor:
        """Make a tensor of another folder readable through this one; return it with the name that its file has here."""
        shard = f"{folder.name}/{tensor.shard}"
        self._beside[shard] = (folder, tensor.shard)
        return replace(tensor, shard=shard)

    def has(self, name: str) -> bool:
        """Say whether there is a file `name`."""
        folder, name = self._find(name)
        return folder.has(name)

    def open(self, name: str) -> BinaryIO:
        """Open the file `name` in the folder that it comes from. Raises LoadError."""
        folder, name = self._find(name)
        return folder.open(name)

    def _find(self, name: str) -> tuple[Folder, str]:
        if name in TOKENIZER and self._tokenizer is not None:  # all files of a tokenizer come from one folder
            return self._tokenizer, name
        return self._beside.get(name, (self._base, name))


def merge(checkpoint: Checkpoint, adapters: Sequence[PeftAdapter]) -> Checkpoint:
    """Return `checkpoint` with the `adapters` merged in: `W + scale * B @ A`, in float32, for each of them.

    Whole tensors of an adapter replace the base model's. Where an adapter changes the embedding or the head of a model
    that ties them, the two are told apart. A tokenizer in an adapter's folder replaces the base model's.

    Raises LoadError where adapters contradict each other, and for what cannot be merged.
    """
    for adapter in adapters:
        _check_alone(adapter, len(adapters))
    whole = _whole_tensors(adapters)
    steps = _steps(checkpoint, adapters)
    tokenizer = _tokenizer(adapters)
    folder = MergedFolder(checkpoint.folder, adapters, tokenizer.folder if tokenizer else None)
    config = next((adapter.config for adapter in adapters if checkpoint.embedding in adapter.whole), checkpoint.config)
    notes = [note for adapter in adapters for note in adapter.notes]
    notes += [f"merged with {adapter.name}, {_count(adapter)}, scale {adapter.scale:g}" for adapter in adapters]
    if checkpoint.tied and _tells_apart(checkpoint, adapters, whole):
        config = _untie(checkpoint, config, whole)
        notes.append("the head is no longer tied to the embedding: an adapter changes one of them alone")
    elif checkpoint.tied:
        for changes in (whole, steps):
            changes.pop(checkpoint.head, None)
    mapped = [(own, rule) for own, rule in _with_head(checkpoint, config) if own.name not in whole]
    expected = checkpoint.piece.expected(config)
    mapped += [
        (replace(folder.add(tensor, owner), name=name), expected[name][0]) for name, (owner, tensor) in whole.items()
    ]
    rows = config.integer("vocab_size")
    vocabulary, templates = checkpoint.vocabulary, checkpoint.templates
    if tokenizer or rows != checkpoint.config.integer("vocab_size"):
        vocabulary = read_vocabulary(folder, rows, folder.json("config.json"))
    if tokenizer:
        templates = read_templates(tokenizer.folder) or templates
        notes.append(f"the vocabulary is that of {tokenizer.name}")
    return replace(
        checkpoint,
        folder=folder,
        config=config,
        mapped=mapped,
        tied_head=None if checkpoint.embedding in whole else checkpoint.tied_head,
        vocabulary=vocabulary,
        templates=templates,
        patches={name: Patch(found) for name, found in steps.items()},
        notes=(*checkpoint.notes, *notes),
    )


def _check_alone(adapter: PeftAdapter, count: int) -> None:
    """Refuse an adapter that cannot be merged, or not together with others or with a scale."""
    if adapter.invocation:
        raise LoadError(
            f"{adapter.name}: an activated LoRA (alora_invocation_tokens) works only after its invocation, so it "
            "cannot be merged; convert it by itself with --lora-only"
        )
    if any(pair.magnitude is not None for pair in adapter.pairs.values()):
        if count > 1 or adapter.scale != 1:
            raise LoadError(f"{adapter.name}: a DoRA adapter sets the length of every row; merge it alone, unscaled")
        if any(pair.embedding for pair in adapter.pairs.values()):
            raise LoadError(
                f"{adapter.name}: DoRA on the embedding goes by columns, which do not stream; merge it with PEFT "
                "(merge_and_unload), save that, and convert the saved folder"
            )
    if (replaced := [*adapter.whole, *adapter.rows]) and adapter.scale != 1:
        raise LoadError(f"{adapter.name}: it replaces {some(replaced)}, which has no half-way; leave the scale out")


def _whole_tensors(adapters: Sequence[PeftAdapter]) -> dict[str, tuple[Folder, Tensor]]:
    """Collect the tensors that replace the base model's. Raises LoadError if two adapters change the same one."""
    whole: dict[str, tuple[Folder, Tensor]] = {}
    for adapter in adapters:
        for name in (*adapter.whole, *adapter.rows):
            for other in adapters:
                if other is not adapter and name in (*other.whole, *other.rows, *other.pairs):
                    raise LoadError(f"{adapter.name} replaces {name}, and {other.name} changes it; leave one out")
        whole |= {name: (adapter.folder, tensor) for name, tensor in adapter.whole.items()}
    return whole


def _steps(checkpoint: Checkpoint, adapters: Sequence[PeftAdapter]) -> dict[str, list[Step]]:
    """Return the steps that change each tensor, by its name, made from the adapters' pairs and rows."""
    steps: dict[str, list[Step]] = {}
    for adapter in adapters:
        rows = dict(adapter.rows)
        if checkpoint.tied and checkpoint.embedding in rows:  # PEFT trains one set of rows for both
            rows.setdefault(checkpoint.head, rows[checkpoint.embedding])
        for name, found in rows.items():
            steps.setdefault(name, []).append(Replaced(adapter.folder, found.values, found.tokens))
        for name, pair in adapter.pairs.items():
            scale = adapter.scale * pair.strength / pair.rank
            change = LowRank(adapter.folder, pair.a, pair.b, scale, pair.embedding, pair.magnitude)
            steps.setdefault(name, []).append(change)
            if pair.bias is not None:
                shift = Shift(adapter.folder, pair.bias, scale)
                steps.setdefault(name.replace(".weight", ".bias"), []).append(shift)
    return steps


def _count(adapter: PeftAdapter) -> str:
    replaced = f" and replaces {len(adapter.whole)}" if adapter.whole else ""
    return f"which changes {counted(len(adapter.pairs) + len(adapter.rows), 'tensor')}{replaced}"


def _tokenizer(adapters: Sequence[PeftAdapter]) -> PeftAdapter | None:
    """Return the adapter that brings a tokenizer, if any. Raises LoadError if several bring different ones."""
    bringing = [adapter for adapter in adapters if any(adapter.folder.has(name) for name in VOCABULARIES)]
    if not bringing:
        return None
    first = bringing[0]
    for other in bringing[1:]:
        for name in sorted(TOKENIZER):
            if _content(first.folder, name) != _content(other.folder, name):
                raise LoadError(
                    f"{first.name} and {other.name} bring different tokenizers ({name}); remove one from its folder"
                )
    return first


def _content(folder: Folder, name: str) -> bytes | None:
    return folder.bytes(name, 2**28) if folder.has(name) else None


# -- the head, which many models tie to the embedding -----------------------------------------------------------------


def _tells_apart(
    checkpoint: Checkpoint, adapters: Sequence[PeftAdapter], whole: Mapping[str, tuple[Folder, Tensor]]
) -> bool:
    """Say whether the adapters change a tied head and its embedding differently, so that they can no longer be one."""
    embedding, head = checkpoint.embedding, checkpoint.head
    for adapter in adapters:
        if embedding in adapter.pairs or head in adapter.pairs:
            return True
        rows, others = adapter.rows.get(embedding), adapter.rows.get(head)
        if others is not None:
            same = rows is not None and rows.tokens == others.tokens
            if rows is None or not (same and same_numbers(adapter.folder, rows.values, adapter.folder, others.values)):
                return True
    if embedding in whole and head in whole:
        return not same_numbers(*whole[embedding], *whole[head])
    return embedding in whole or head in whole


def _untie(checkpoint: Checkpoint, config: Config, whole: Mapping[str, tuple[Folder, Tensor]]) -> Config:
    """Return the configuration of the untied model. Raises LoadError if it must be tied, or if no head fits it."""
    apart = config.changed(tie_word_embeddings=False)
    if checkpoint.head not in checkpoint.piece.expected(apart):
        raise LoadError(
            f"{SETTINGS}: the adapter changes head or embedding alone, but in {checkpoint.architecture} they are one"
        )
    rows = config.integer("vocab_size")
    if checkpoint.head not in whole and rows != checkpoint.config.integer("vocab_size"):
        raise LoadError(
            f"{SETTINGS}: the adapter's embedding has {rows} rows and its head was not saved; train with "
            'modules_to_save=["embed_tokens", "lm_head"]'
        )
    return apart


def _with_head(checkpoint: Checkpoint, config: Config) -> list[tuple[Tensor, Rule]]:
    """Return the base model's tensors; if `config` wants a head that the model lacks, a copy of its embedding too."""
    expected = checkpoint.piece.expected(config)
    head = checkpoint.head
    if head not in expected or any(own.name == head for own, _ in checkpoint.mapped):
        return checkpoint.mapped
    embedding = next(own for own, _ in checkpoint.mapped if own.name == checkpoint.embedding)
    return [(replace(embedding, name=head), expected[head][0]), *checkpoint.mapped]
