"""How real models tell reasoning from response: the format of every template that llama.cpp ships, and what it opens."""

from __future__ import annotations

import pytest
from conftest import Reference

from metaalign_edge import ChatTemplate, Dialog, RenderOptions, Turn, render, shipped_templates
from metaalign_edge_runtime.stores.files import package_folder, read_text
from metaalign_edge_templates.reasoning import ReasoningSplitter, formats_of
from metaalign_edge_templates.sandbox import Template

THINK, CLOSED = "</think>", "before"
FORMATS = {  # by template: the mark that closes the reasoning; templates that are not here have no format
    "Apertus-8B-Instruct": "<|inner_suffix|>",
    "Apriel-1.6-15b-Thinker-fixed": "[BEGIN FINAL RESPONSE]",
    "ByteDance-Seed-OSS": "</seed:think>",
    "Cohere2MoE": "<|END_THINKING|>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_THINKING|>",
    "Kimi-K3": "<|close|>think<|sep|>",
    "MiniMax-M3": "</mm:think>",
    "google-gemma-4-31B-it": "<channel|>",
    "google-gemma-4-31B-it-interleaved": "<channel|>",
    "meetkai-functionary-medium-v3.2": "",
    "mistralai-Ministral-3-14B-Reasoning-2512": "[/THINK]",
    "muse-glimmer": "<|eom|>",
    "openai-gpt-oss-120b": "<|end|>",
    "tencent-Hy3": "</think:*>",
    "unsloth-Apriel-1.5": "[BEGIN FINAL RESPONSE]",
    "upstage-Solar-Open-100B": "<|end|>",
    **dict.fromkeys(
        "Bielik-11B-v3.0-Instruct GLM-4.6 GLM-4.7-Flash HuggingFaceTB-SmolLM3-3B Kimi-K2-Thinking LFM2.5-8B-A1B "
        "LFM2.5-Instruct MiniMax-M2 NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 NVIDIA-Nemotron-Nano-v2 Qwen-QwQ-32B "
        "Qwen-Qwen3-0.6B Qwen3.5-4B Reka-Edge Spark2.5 StepFun3.5-Flash deepseek-ai-DeepSeek-R1-Distill-Llama-8B "
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B deepseek-ai-DeepSeek-V3.1 deepseek-ai-DeepSeek-V3.2 "
        "deepseek-ai-DeepSeek-V4 deepseek-ai-DeepSeek-V4-Flash-0731 ibm-granite-granite-3.3-2B-Instruct "
        "inclusionai-ling-3.0-flash llama-cpp-deepseek-r1 llama-cpp-rwkv-world openbmb-MiniCPM5-1B "
        "poolside-Laguna-S-2.1 poolside-Laguna-XS-2.1 poolside-Laguna-XS.2".split(),
        THINK,
    ),
}
OPENED = {  # by template: where an answer begins that is asked to think, and one that is asked not to
    "Apriel-1.6-15b-Thinker-fixed": ("inside", "inside"),
    "Cohere2MoE": ("inside", "inside"),
    "Kimi-K3": ("inside", "answer"),
    **dict.fromkeys(
        "MiniMax-M2 NVIDIA-Nemotron-Nano-v2 StepFun3.5-Flash deepseek-ai-DeepSeek-R1-Distill-Llama-8B "
        "llama-cpp-deepseek-r1".split(),
        ("inside", "inside"),
    ),
    **dict.fromkeys(
        "Bielik-11B-v3.0-Instruct GLM-4.7-Flash NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 Qwen-QwQ-32B Qwen3.5-4B Reka-Edge "
        "Spark2.5 deepseek-ai-DeepSeek-R1-Distill-Qwen-32B deepseek-ai-DeepSeek-V3.1 deepseek-ai-DeepSeek-V3.2 "
        "deepseek-ai-DeepSeek-V4 deepseek-ai-DeepSeek-V4-Flash-0731 inclusionai-ling-3.0-flash llama-cpp-rwkv-world "
        "openbmb-MiniCPM5-1B poolside-Laguna-S-2.1 poolside-Laguna-XS-2.1 poolside-Laguna-XS.2".split(),
        ("inside", CLOSED),
    ),
}


@pytest.fixture(scope="module")
def sources(reference: Reference) -> dict[str, str]:
    """Read the templates of real models, by name."""
    found = {path.stem: read_text(path, "") for path in (reference.llama_cpp / "models" / "templates").glob("*.jinja")}
    assert found.keys() > FORMATS.keys()
    return found


def test_every_template_has_its_format_or_none(sources: dict[str, str]) -> None:
    named = {name: formats_of(source, lambda _: False) for name, source in sources.items()}
    found = {name: "".join(formats[0].closes[:1]) for name, formats in named.items() if formats}
    assert found == FORMATS
    assert not any(formats_of(read_text(path, ""), lambda _: False) for path in shipped_templates().values())


@pytest.mark.parametrize("name", FORMATS)
def test_the_prompt_opens_the_reasoning_where_its_template_does(name: str, sources: dict[str, str]) -> None:
    folder, asked = package_folder("templates"), Dialog(turns=[Turn("a question")])
    wrap = [Template(read_text(folder / f"{one}.jinja", ""), one) for one in ("meta_prompt", "reminder")]
    chat = ChatTemplate(Template(sources[name], name), False, name, "", *wrap, bos_token="<s>", eos_token="</s>")
    states = []
    for think in (True, False):
        ending = str(render(asked, chat, RenderOptions(think=think)).prompt).rpartition("a question")[2]
        states.append(ReasoningSplitter(formats_of(sources[name], lambda _: False), ending).state)
    assert tuple(states) == OPENED.get(name, (CLOSED, CLOSED))
