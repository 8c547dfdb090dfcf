"""Notes on stderr about an answer: what was chosen for it, what was dropped, whether it fits its schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import metaalign_edge as edge
from metaalign_edge import Answer, ChatTemplate, Model, Prompt, Settings
from metaalign_edge_runtime import structured
from metaalign_edge_runtime.errors import (
    EdgeError,
    NoAnswer,
    SchemaViolation,
    TierViolation,
    counted,
    in_bytes,
    one_line,
    say,
)
from metaalign_edge_runtime.llama import library
from metaalign_edge_runtime.stores import models, session_text
from metaalign_edge_runtime.stores.sessions import Conversation
from metaalign_edge_runtime.structured import Schema
from metaalign_edge_templates.reasoning import unknown_mark

from .screen import Screen


def check_answer(answer: Answer, schema: Schema | None, screen: Screen, whose: str = "the answer") -> None:
    """Refuse an answer that is empty or does not fit its schema, and warn of one that was cut.

    Args:
        whose: how a message names the answer.

    Raises:
        NoAnswer, SchemaViolation: as `refuse_answer`.
    """
    refuse_answer(answer, schema, whose)
    if answer.finish_reason == "length":
        screen.note(f"metaalign-edge: warning: {whose} {how_cut(answer)}: {how_longer(answer)}")
    note_unknown_mark(answer, schema, screen, whose)


def refuse_answer(answer: Answer, schema: Schema | None, whose: str) -> None:
    """Refuse an answer that is empty or does not fit its schema; what Ctrl-C ended is taken as it is.

    Raises:
        NoAnswer: the model ended, or was still thinking when it was cut. SchemaViolation: it does not fit; says where.
    """
    if answer.finish_reason == "interrupted":
        return
    cut = answer.finish_reason == "length"
    if answer.finish_reason == "empty" or (cut and is_thinking(answer)):
        raise NoAnswer(f"{whose} {why_empty(answer)}")
    wrong = structured.fault(answer.response, schema) if schema else None
    if wrong and cut:
        raise SchemaViolation(f"{whose} {how_cut(answer)} before the JSON was complete: {how_longer(answer)}")
    if wrong:
        raise SchemaViolation(f"{whose} does not fit the schema: {wrong}")


def note_unknown_mark(answer: Answer, schema: Schema | None, screen: Screen, whose: str) -> None:
    """Say, once for each mark, that a response begins with a mark of no format: reasoning may stand in it."""
    if schema is None and (mark := unknown_mark(answer.response)):
        screen.note_once(
            f"unknown mark {mark}",
            f"metaalign-edge: note: {whose} begins with {mark}, a mark of no format that is known here: if the model "
            "reasons behind it, that is part of the answer",
        )


def is_thinking(answer: Answer) -> bool:
    """Tell whether an answer ended before its response began, but not before its reasoning."""
    return answer.reasoning is not None and not answer.response.strip()


def how_cut(answer: Answer) -> str:
    """Say where an answer was cut."""
    return f"was cut at {counted(answer.output_tokens, 'token')}"


def how_longer(answer: Answer) -> str:
    """Say what lets an answer that was cut be longer."""
    return "the context is full, raise -c" if answer.context_is_full else "raise -n"


def why_empty(answer: Answer) -> str:
    """Say why an answer is empty, and what to do next."""
    if answer.finish_reason == "length":
        return f"{how_cut(answer)} while the model was still thinking: {how_longer(answer)}, or say --no-think"
    if is_thinking(answer):
        return "is empty: the model ended while it was thinking: say --no-think, or ask otherwise"
    return "is empty: the model ended at once: ask otherwise, or look at the prompt with `metaalign-edge render`"


def check_answers(answers: Sequence[tuple[Answer, str]], schema: Schema | None, screen: Screen) -> None:
    """Do as `check_answer` for several answers, each with its name; what is wrong with each is said.

    Raises:
        NoAnswer, SchemaViolation: of the last answer that has something wrong.
    """
    wrong: list[EdgeError] = []
    for answer, whose in answers:
        try:
            check_answer(answer, schema, screen, whose)
        except (NoAnswer, SchemaViolation) as error:
            wrong.append(error)
    for one in wrong[:-1]:
        say(f"metaalign-edge: {one_line(one)}")
    if wrong:
        raise wrong[-1]


def describe(answer: Answer) -> str:
    """Return an answer's figures as one line, for -v."""
    return (
        f"{counted(answer.input_tokens, 'token')} in ({answer.cached_tokens} cached), {answer.output_tokens} out "
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
    layers = "all layers" if every else counted(model.gpu_layers, "layer") if model.gpu_layers else "everything"
    if plan.reads_from_disk:
        main = plan.needs[0]
        screen.note(
            f"metaalign-edge: warning: {in_bytes(sum(main))} are needed for {model.file.path.name}, and "
            f"{in_bytes(plan.free[0])} are free: its weights are read from the disk again and again, at a crawl; "
            "take a smaller quantization"
        )
    screen.detail(f"model {model.file.path}: {model.file.architecture}")
    screen.detail(f"template {chosen.name}, {'native' if chosen.native else 'wrapped'}: {chosen.why}")
    screen.detail(f"memory for {plan}")
    screen.detail(f"{layers} on {device}, threads: {edge.threads_for(model, settings)}, seed {settings.seed}")
    screen.detail(shown_sampling(model, settings))
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


def shown_sampling(model: Model, settings: Settings) -> str:
    """Return by what tokens are drawn, and what gave each value, as one line for -v."""
    drawn = [f"{name} {one['value']:g} ({one['from']})" for name, one in settings.sampling(model.file).items()]
    origin = settings.sources.get("max_tokens", "call") if settings.max_tokens else "built-in"
    return f"sampling: {', '.join(drawn)}; at most {settings.max_tokens or edge.USUAL_MAX_TOKENS:,} tokens ({origin})"


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
