"""Notes on stderr about an answer: what was chosen for it, what was dropped, whether it fits its schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import metaalign_edge as edge
from metaalign_edge import Answer, ChatTemplate, Model, Prompt, Settings
from metaalign_edge_runtime import structured
from metaalign_edge_runtime.errors import SchemaViolation, TierViolation, in_bytes
from metaalign_edge_runtime.llama import library
from metaalign_edge_runtime.stores import models, session_text
from metaalign_edge_runtime.stores.sessions import Conversation
from metaalign_edge_runtime.structured import Schema

from .screen import Screen


def check_answer(answer: Answer, schema: Schema | None, screen: Screen, whose: str = "the answer") -> None:
    """Warn of an answer that was cut while the model was thinking, and refuse one that does not fit its schema.

    Args:
        whose: how a message names the answer.

    Raises:
        SchemaViolation: the answer does not fit; says where.
    """
    cut = f"{whose} was cut at {answer.output_tokens:,} tokens"
    thinking = answer.finish_reason == "length" and answer.reasoning and not answer.response
    if thinking:
        cut += " while the model was still thinking"
    if schema is None or answer.finish_reason == "interrupted":
        if thinking:
            screen.note(f"metaalign-edge: warning: {cut}: raise -n or -c, or say --no-think")
        return
    wrong = structured.fault(answer.response, schema)
    if wrong and answer.finish_reason == "length":
        raise SchemaViolation(f"{cut}{'' if thinking else ' before the JSON was complete'}: raise -n or -c")
    if wrong:
        raise SchemaViolation(f"{whose} does not fit the schema: {wrong}")


def describe(answer: Answer) -> str:
    """Return an answer's figures as one line, for -v."""
    return (
        f"{answer.input_tokens} tokens in ({answer.cached_tokens} cached), {answer.output_tokens} out "
        f"({answer.finish_reason}), first after {answer.first_token_ms:.0f} ms, "
        f"{answer.tokens_per_second:.1f} tokens/s, loaded in {answer.load_ms:.0f} ms, seed {answer.seed}"
    )


def explain(model: Model, chosen: ChatTemplate, settings: Settings, screen: Screen) -> None:
    """Say with -v which model, template, device and settings are used, and why; warn if the weights fill the memory."""
    device = (
        "the GPU"
        if model.gpu_layers
        else "the CPU (this build of llama.cpp has no GPU)"
        if settings.gpu_layers != "0" and not library.gpus()
        else "the CPU"
    )
    plan = model.plan
    every = model.gpu_layers == len(plan.places)
    layers = "all layers" if every else f"{model.gpu_layers} layers" if model.gpu_layers else "everything"
    if plan.reads_from_disk:
        main = plan.needs[0]
        screen.note(
            f"metaalign-edge: warning: {in_bytes(sum(main))} are needed for {model.file.path.name}, and "
            f"{in_bytes(plan.free[0])} are free: its weights are read from the disk again and again, at a crawl; "
            "take a smaller quantisation"
        )
    screen.detail(f"model {model.file.path}: {model.file.architecture}")
    screen.detail(f"template {chosen.name}, {'native' if chosen.native else 'wrapped'}: {chosen.why}")
    screen.detail(f"memory for {plan}")
    screen.detail(f"{layers} on {device}, threads: {edge.threads_for(model, settings)}, seed {settings.seed}")
    if settings.adapters:
        screen.detail(f"adapters {edge.name_adapters(settings.adapters)}")
    if settings.schema and settings.schema.relaxed:
        relaxed = ", ".join(settings.schema.relaxed)
        screen.note(f"metaalign-edge: note: the answer is held to the schema but for {relaxed}, seen at the end only")
    if (settings.system_strength, settings.pref_strength) != (1.0, 1.0):
        screen.detail(f"guided: System Info {settings.system_strength:g}, User Info {settings.pref_strength}")


def warn(prompt: Prompt, screen: Screen, strict: bool) -> None:
    """Warn of turns that were dropped, and of tier text that imitates a template's marker.

    Raises:
        TierViolation: a marker is imitated, and `strict` is set.
    """
    if prompt.answer.truncated:
        screen.note(
            f"metaalign-edge: warning: {prompt.answer.truncated} of the oldest turns dropped to fit the context"
        )
    check_imitated(prompt.imitated_markers, screen, strict)


def check_imitated(imitated: Sequence[str], screen: Screen, strict: bool) -> None:
    """Warn of template markers in a tier's text that are not tokens of the model, so that ids cannot tell them apart.

    Raises:
        TierViolation: there are some, and `strict` is set.
    """
    if not imitated:
        return
    said = f"a tier's text contains {', '.join(imitated)}, by which this template marks its turns"
    if strict:
        raise TierViolation(f"{said}: take it out")
    screen.note(f"metaalign-edge: warning: {said} (--strict-tiers refuses)")


def shown_strengths(settings: Settings) -> str:
    """Return the strengths of both tiers as a text."""
    pref = "auto" if settings.pref_strength == "auto" else f"{settings.pref_strength:g}"
    return f"system {settings.system_strength:g}, pref {pref}"


def introduce(conversation: Conversation, model: str, screen: Screen, talking: bool) -> None:
    """Say which session is continued, and if another model answered last in it."""
    if conversation.path is not None:
        (screen.note if talking else screen.detail)(session_text.describe_session(conversation))
        note_other_model(conversation, model, screen)


def note_other_model(conversation: Conversation, model: str, screen: Screen) -> None:
    """Say if another model than this one answered last in a session, and if it is not there any more."""
    before, place = conversation.model()
    if before and before != model:
        gone = f", and is no longer at {place}" if place and not models.still_there(Path(place)) else ""
        screen.note(f"metaalign-edge: note: in this session {before} answered last{gone}; this is {model} (-m chooses)")
