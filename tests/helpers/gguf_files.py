"""GGUF files read and written by the gguf package, which the project's own reader and writer are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def keys(path: Path) -> dict[str, Any]:
    """Read the keys of a GGUF file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def types(path: Path) -> dict[str, str]:
    """Read the types of a GGUF file's tensors."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def weights_in(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a GGUF file as float32."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    """Write all that the writer was given, and return the file's path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def copy_model(
    source: Path, path: Path, *, drop: Sequence[str] = (), add: Mapping[str, str] | None = None, part: int = 0
) -> Path:
    """Copy a model without the keys that begin with `drop`, with other strings, in parts of so many tensors each."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=part)
    for name, entry in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", *drop)):
            writer.add_key_value(name, entry.contents(), *entry.types[:2])
    for name, text in (add or {}).items():
        writer.add_string(name, text)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return finish(writer, path)
