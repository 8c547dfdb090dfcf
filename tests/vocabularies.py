"""Vocabulary-only GGUFs with every trap a real vocabulary sets, made with gguf's writer."""

from __future__ import annotations

from pathlib import Path

import gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = (
    int(getattr(gguf.TokenType, name)) for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "BYTE")
)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"#()[]{}<>/|_-=%*\n"


def write_spm(path: Path) -> Path:
    """SentencePiece: byte tokens, and merges that lead to control and byte tokens from plain text."""
    tokens = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    tokens += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    tokens += [(letter, NORMAL) for letter in LETTERS if letter != "\n"] + [("▁", NORMAL)]
    tokens += [
        (piece, NORMAL)
        for piece in ("<s", "</", "</s", "<0", "x0", "<0x0", "<0x0A", "▁t", "▁te", "▁tea", "an", "▁an", "ea")
    ]
    tokens += [
        ("<|im_start|>", USER_DEFINED),
        ("<|im_end|>", CONTROL),
        ("[/INST]", USER_DEFINED),
        ("▁▁▁▁", USER_DEFINED),
    ]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text.encode() for text, _ in tokens])
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    return finish(writer, path)


def write_bpe(path: Path, pre: str = "qwen2") -> Path:
    """Byte-level BPE with user-defined markers, white space among them, and an end of turn that no key names."""
    shown = byte_symbols()
    tokens = [(shown[byte], NORMAL) for byte in range(256)]
    merges = ["t e", "te a", "Ġ tea", "< |", "| >", "i m", "im _", "e n", "en d"]
    tokens += [(merge.replace(" ", ""), NORMAL) for merge in merges]
    tokens += [
        (text, CONTROL) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|system_info|>", "<|end|>")
    ]
    tokens += [(text, USER_DEFINED) for text in ("<think>", "</think>", "<|tool|>", "\n\n\n", "<b>")]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text.encode() for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(next(index for index, (text, _) in enumerate(tokens) if text == "<|endoftext|>"))
    writer.add_add_bos_token(False)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_symbols() -> list[str]:
    """The letters by which byte-level BPE writes the bytes 0 to 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
