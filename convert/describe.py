"""The keys of a GGUF file, in the order of llama.cpp's converter (MIT): general, architecture, tokenizer."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import BinaryIO

import gguf
from gguf.gguf_writer import GGUFWriter, WriterState

from metaalign_edge_runtime.errors import LoadError

from .architectures import FILE_TYPE, Value
from .checkpoint import Checkpoint
from .container import Packer
from .encode import OUTTYPES
from .metadata import read_metadata, read_sampling
from .vocabulary import Vocabulary

TEMPLATE_KEY = "metaalign.template"  # key for the name of our template, so that a model is known to use three tiers


def describe(
    checkpoint: Checkpoint, outtype: str, pre: str, templates: Mapping[str, str], template_name: str | None
) -> GGUFWriter:
    """Return a writer that holds all keys of the file, but no tensors yet."""
    writer = Packer(None, checkpoint.architecture)
    for name, value in checkpoint.piece.first.pairs(checkpoint.config):
        _add(writer, f"{checkpoint.architecture}.{name}", value, writer.add_uint32)
    writer.add_type(gguf.GGUFType.MODEL)
    for name, value in read_sampling(checkpoint.folder):
        _add(writer, name, value, writer.add_int32)
    read_metadata(checkpoint.folder, checkpoint.parameters).set_gguf_meta_model(writer)
    for key in checkpoint.piece.keys:
        if key is FILE_TYPE:
            writer.add_file_type(OUTTYPES[outtype][1])
        for name, value in key.pairs(checkpoint.config):
            _add(writer, f"{checkpoint.architecture}.{name}", value, writer.add_uint32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, checkpoint.vocabulary, pre, templates)
    if template_name:
        writer.add_string(TEMPLATE_KEY, template_name)
    return writer


def _add(writer: GGUFWriter, name: str, value: Value, add_int: Callable[[str, int], None]) -> None:
    """Add a key with a value of any type; GGUF has several types of integers, so `add_int` adds those."""
    if isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        add_int(name, value)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, pre: str, templates: Mapping[str, str]) -> None:
    """Add the keys of the tokenizer, which include the chat templates."""
    special = vocabulary.special
    _add_space_prefix(writer, vocabulary, "first")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    _add_space_prefix(writer, vocabulary, "middle")
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for role, number in special.ids.items():
        if role != "cls":  # GGUF has no key for it
            getattr(writer, f"add_{role}_token_id")(number)
    _add_what_is_added(writer, special.adds)
    _add_templates(writer, templates)
    if special.eot is not None:
        writer.add_eot_token_id(special.eot)
    _add_what_is_added(writer, special.unsaid)
    _add_space_prefix(writer, vocabulary, "last")
    for role, number in special.extra_stops.items():
        getattr(writer, f"add_{role}_token_id")(number)


def _add_space_prefix(writer: GGUFWriter, vocabulary: Vocabulary, place: str) -> None:
    """Add the key add_space_prefix if it belongs to this place among the keys."""
    if vocabulary.space_prefix is not None and vocabulary.space_prefix[0] == place:
        writer.add_add_space_prefix(vocabulary.space_prefix[1])


def _add_what_is_added(writer: GGUFWriter, adds: Mapping[str, bool]) -> None:
    for role, value in adds.items():
        if role in ("bos", "eos", "sep"):  # GGUF has no such keys for other roles
            getattr(writer, f"add_add_{role}_token")(value)


def _add_templates(writer: GGUFWriter, templates: Mapping[str, str]) -> None:
    others = sorted(name for name in templates if name != "default")
    for name in others:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), templates[name])
    if others:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, others)
    if "default" in templates:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE, templates["default"])


def write_head(writer: GGUFWriter, file: BinaryIO) -> None:
    """Write the head with its padding into an open file. Raises LoadError for values that GGUF cannot hold."""
    writer.fout = [file]  # type: ignore[list-item]  # given a path, the library would open it by itself
    writer.state = WriterState.EMPTY
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except UnicodeEncodeError as error:
        raise LoadError(f"a text of the checkpoint is not valid Unicode ({error.object[:40]!r})") from None
    except (struct.error, TypeError, ValueError) as error:
        raise LoadError(f"a value of the checkpoint cannot be written as GGUF ({error})") from None
    writer.write_padding(file, file.tell())
