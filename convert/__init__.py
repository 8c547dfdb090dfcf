"""Hugging Face checkpoints to GGUF, without torch.

    from metaalign_edge_convert import open_checkpoint, write_gguf

    checkpoint = open_checkpoint(Path("my-model"))        # everything but the weights is read and checked
    write_gguf(checkpoint, Path("my-model.gguf"))         # the weights stream through

An architecture is one small piece of data (``llama.py``), a pre-tokenizer one row of a table (``pretokenizers.py``).
"""

from .architectures import ARCHITECTURES
from .checkpoint import Checkpoint, open_checkpoint
from .encode import OUTTYPES as _OUTTYPES
from .errors import CannotWrite, ConvertError, OutputExists, SourceNotFound
from .output import check_output
from .prove import prove_pre_tokenizer
from .quantize import Options, canonical
from .writer import Conversion, Plan, peak_mb, plan_checkpoint, plan_gguf, write_gguf, write_plan

OUTTYPES = tuple(_OUTTYPES)

__all__ = [
    "ARCHITECTURES",
    "OUTTYPES",
    "CannotWrite",
    "Checkpoint",
    "Conversion",
    "ConvertError",
    "Options",
    "OutputExists",
    "Plan",
    "SourceNotFound",
    "canonical",
    "check_output",
    "open_checkpoint",
    "peak_mb",
    "plan_checkpoint",
    "plan_gguf",
    "prove_pre_tokenizer",
    "write_gguf",
    "write_plan",
]
