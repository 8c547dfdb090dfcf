"""Answer a query under a preference; without a query, at a terminal, hold a conversation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

import metaalign_edge as edge
from metaalign_edge import STOPWATCH, Answer, Prompt, Request, Scheduler
from metaalign_edge_runtime.errors import NotFound, UsageError
from metaalign_edge_runtime.llama import memory
from metaalign_edge_runtime.stores import models, session_text, sessions
from metaalign_edge_runtime.stores.sessions import Conversation

from .options import command
from .options.groups import (
    ContinueOption,
    JsonOption,
    LogOption,
    MarkdownOption,
    MetaPrompt,
    ModelOptions,
    NoCacheOption,
    QueryArgument,
    RenderingOptions,
    SamplingOptions,
    SessionOption,
    StdinOption,
    StreamOption,
    StrengthOptions,
    Verbosity,
    gathered,
    prompt_cache,
    user_info_of,
)
from .options.loading import open_scheduler
from .options.query import read_query
from .terminal import report
from .terminal.repl import Repl
from .terminal.repl_state import dialog_of, turn_of
from .terminal.reply import AnswerPrinter
from .terminal.screen import ReasoningPrinter, Screen


def answer_once(
    scheduler: Scheduler,
    conversation: Conversation,
    query: str,
    screen: Screen,
    strict: bool,
    reply: AnswerPrinter | None,
) -> None:
    """Answer one query on stdout, as JSON if `reply` is None. A session keeps the answer, even an incomplete one.

    Raises:
        Interrupted: Ctrl-C; the part of the answer that was written is printed.
    """
    begun: list[Answer] = []

    def before(prompt: Prompt) -> None:
        report.warn(prompt, screen, strict)
        begun.append(prompt.answer)

    dialog = dialog_of(conversation, query)
    seed = scheduler.settings.seed
    show = reply.show if reply else lambda _: None
    request = Request(dialog, seed, show=show, think=ReasoningPrinter(screen).write)
    complete = False
    try:
        with scheduler.interrupt:
            answer = edge.answer_one(scheduler, request, before)
        complete = True
        if reply:
            reply.end(answer.response)
        else:
            screen.json({**asdict(answer), **({"session": conversation.name} if conversation.path else {})})
    finally:
        for answer in begun:
            answer.finish_reason = answer.finish_reason if complete else "interrupted"  # stdout was closed, say
            conversation.add(turn_of(answer, scheduler))
            conversation.save()
    screen.detail(report.describe(answer))
    screen.detail(f"time {STOPWATCH}; memory {memory.peak_mb():.0f} MB at most")
    scheduler.interrupt.check()
    report.check_answer(answer, scheduler.settings.schema, screen)


def go_on(name: str | None, newest: bool) -> Conversation:
    """Return the session of a name, or the one that was used last; without either, a conversation that is not kept.

    Raises:
        UsageError: both are asked for, the name is not valid, or the session's file is damaged.
        NotFound: no session exists yet.
    """
    if name is not None and newest:
        raise UsageError("--session and --continue both choose a session: give one")
    if name is not None:
        return Conversation.read(sessions.session_path(name))
    if not newest:
        return Conversation()
    if not (paths := sessions.session_paths()):
        begin, log = "`metaalign-edge chat --session NAME` begins one", "`metaalign-edge config set log true`"
        raise NotFound(f"no session to go on with: {begin}, and {log} keeps every answer")
    return Conversation.read(paths[0])


def set_meta_prompt(conversation: Conversation, meta_prompt: MetaPrompt, context: typer.Context) -> None:
    """Set the conversation's tiers from the command line; a tier that it does not give stays as in the session.

    Raises:
        UsageError, NotFound: as MetaPrompt does.
    """

    def stays(*names: str) -> bool:
        sources = [context.get_parameter_source(name) for name in names]
        return len(conversation.lines) > 1 and not any(source and source.name == "COMMANDLINE" for source in sources)

    latest, preferences = conversation.meta_prompt, meta_prompt.preferences()
    system_info = latest["system_info"] if stays("system", "system_file") else meta_prompt.system_info()
    if stays("pref", "pref_file", "no_pref"):
        conversation.set(system_info, latest["user_info"], conversation.label)
    else:
        label = session_text.label_of([one.given for one in preferences])
        conversation.set(system_info, user_info_of(preferences), label)


def model_of(conversation: Conversation, loaded: ModelOptions, context: typer.Context) -> ModelOptions:
    """Return the options with the model that answered last in a session, if it is still there and -m is not given."""
    source, (name, place) = context.get_parameter_source("model"), conversation.model()
    if not name or (source and source.name == "COMMANDLINE"):
        return loaded
    there = models.still_there(Path(place or name))
    return loaded._replace(model=str(there)) if there else loaded


@command
def chat(
    context: typer.Context,
    query: QueryArgument = None,
    *,
    meta_prompt: MetaPrompt,
    name: SessionOption = None,
    newest: ContinueOption = False,
    log: LogOption = False,
    rendered: RenderingOptions,
    strengths: StrengthOptions,
    loaded: ModelOptions,
    sampling: SamplingOptions,
    as_json: JsonOption = False,
    stream: StreamOption = True,
    markdown: MarkdownOption = False,
    no_cache: NoCacheOption = False,
    no_stdin: StdinOption = False,
    talk: Verbosity,
) -> None:
    """Answer a query under a preference; without a query, at a terminal, hold a conversation.

    Examples:

        metaalign-edge chat --pref "Answer in capital letters." "What is the moon?"

        echo "What is tea?" | metaalign-edge chat --pref "one sentence"

        metaalign-edge chat -m model.gguf --system "Be brief." --pref "I'm a zookeeper."

        metaalign-edge chat --json-schema "name, age int" "Who was the oldest human?"

        metaalign-edge chat --session garden "When do I sow peas?"

        metaalign-edge chat --continue "And beans?"
    """
    screen, conversation = talk.screen(), go_on(name, newest)
    set_meta_prompt(conversation, meta_prompt, context)
    settings = gathered(loaded, sampling, strengths, talk)
    asked = read_query(query, no_stdin, repl=not as_json)
    if log and asked is not None and conversation.path is None:
        conversation.path = sessions.log_path()
    loaded = model_of(conversation, loaded, context)
    with open_scheduler(loaded, rendered, settings, screen, prompt_cache(no_cache)) as scheduler:
        report.introduce(conversation, scheduler.model.file.path.name, screen, talking=asked is None)
        markdown = markdown and settings.schema is None  # JSON would lose its stars and underscores
        if asked is None:
            Repl(scheduler, conversation, screen, rendered.strict_tiers, markdown).run()
        else:
            reply = None if as_json else AnswerPrinter(screen, markdown, stream)
            answer_once(scheduler, conversation, asked, screen, rendered.strict_tiers, reply)
