"""The types of what a program needs: a module that is one file cannot carry them itself (PEP 561)."""

import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from typing_extensions import Unpack

__all__ = [
    "Answer", "ContextOverflow", "Dialog", "EdgeError", "LoadError", "Model", "NetworkError", "NotFound",
    "TemplateError", "TierViolation", "Turn", "UsageError", "compare", "generate", "stream",
]  # fmt: skip

__version__: str

class EdgeError(Exception):
    exit_code: int
    def __init__(self, message: object = "") -> None: ...

class UsageError(EdgeError): ...
class NotFound(EdgeError): ...
class NetworkError(EdgeError): ...
class LoadError(EdgeError): ...
class ContextOverflow(EdgeError): ...
class TemplateError(EdgeError): ...
class TierViolation(EdgeError): ...

@dataclass(frozen=True)
class Turn:
    query: str
    response: str | None = None

@dataclass(frozen=True)
class Dialog:
    system_info: str = ""
    user_info: str = ""
    turns: Sequence[Turn] = ()
    def then(self, response: str, query: str) -> Dialog: ...

SamplingValue = TypedDict("SamplingValue", {"value": float, "from": str})

@dataclass
class Answer:
    model: str
    template: str
    system_info: str
    user_info: str
    query: str
    response: str = ""
    reasoning: str | None = None
    finish_reason: Literal["stop", "length", "interrupted"] = "stop"
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    load_ms: float = 0.0
    first_token_ms: float = 0.0
    duration_ms: float = 0.0
    tokens_per_second: float = 0.0
    seed: int = 0
    truncated: int = 0
    sampling: dict[str, SamplingValue] = ...

class Options(TypedDict, total=False):
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    seed: int | None
    stop: Sequence[str]
    system_strength: float
    pref_strength: float | Literal["auto"]
    schema: Mapping[str, Any] | str | None
    remind: bool
    think: bool | None
    template_args: Mapping[str, Any]
    schema_hint: bool

class Model:
    def __init__(self, file: Any, settings: Any, interrupt: Any = None, plan: Any = None) -> None: ...
    @classmethod
    def open(
        cls,
        name: str | os.PathLike[str] | None = None,
        *,
        template: str = "auto",
        context: int | None = None,
        gpu_layers: str | int = "auto",
        threads: int | None = None,
        lora: Sequence[str] = (),
        verbose: bool = False,
    ) -> Model: ...
    def __enter__(self) -> Model: ...
    def __exit__(self, *_: object) -> None: ...
    def close(self) -> None: ...

def stream(
    model: Model, query: str | Dialog, *, system: str = "", pref: str = "", **options: Unpack[Options]
) -> Generator[str, None, Answer]: ...
def generate(
    model: Model, query: str | Dialog, *, system: str = "", pref: str = "", **options: Unpack[Options]
) -> Answer: ...
def compare(
    model: Model,
    query: str | Dialog,
    preferences: Sequence[str],
    *,
    system: str = "",
    **options: Unpack[Options],
) -> list[Answer]: ...
