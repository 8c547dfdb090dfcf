"""Hugging Face checkpoints to GGUF, without torch.

    from metaalign_edge_convert import open_checkpoint, write_gguf

    checkpoint = open_checkpoint(Path("my-model"))        # reads and checks everything but the weights
    write_gguf(checkpoint, Path("my-model.gguf"))         # the weights stream through

    adapter = open_adapter(Path("my-lora"), checkpoint)
    write_gguf(merge(checkpoint, [adapter]), Path("my-tuned-model.gguf"))
    write_adapter(checkpoint, adapter, Path("my-lora.gguf"))

An architecture is one small piece of data (`llama.py`), a pre-tokenizer one row of a table (`pretokenizers.py`).
"""

from .adapter import write_adapter
from .architectures import ARCHITECTURES
from .checkpoint import Checkpoint, open_checkpoint
from .encode import OUTTYPES as _OUTTYPES
from .lora import PeftAdapter, open_adapter
from .merge import merge
from .output import check_output
from .plan import ConversionPlan, plan_checkpoint, plan_gguf
from .prove import prove_pre_tokenizer
from .quantize import QuantizeOptions, canonical_outtype, known_outtypes
from .writer import Conversion, write_gguf, write_plan

OUTTYPES = tuple(_OUTTYPES)

__all__ = [
    "ARCHITECTURES",
    "OUTTYPES",
    "Checkpoint",
    "Conversion",
    "ConversionPlan",
    "PeftAdapter",
    "QuantizeOptions",
    "canonical_outtype",
    "check_output",
    "known_outtypes",
    "merge",
    "open_adapter",
    "open_checkpoint",
    "plan_checkpoint",
    "plan_gguf",
    "prove_pre_tokenizer",
    "write_adapter",
    "write_gguf",
    "write_plan",
]
