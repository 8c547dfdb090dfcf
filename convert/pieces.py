"""All architectures: importing this module fills the registry. A new piece is one more name here."""

from . import gemma, granite, internlm, llama, olmo, phi, qwen, smollm, stablelm

PIECES = (llama, smollm, granite, qwen, gemma, phi, olmo, stablelm, internlm)
