"""Print exactly what the model is fed. --tokens loads the vocabulary only, so it is quick on any model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, cast

import typer

import metaalign_edge as edge
from metaalign_edge import Rendering, RenderOptions, Settings, Token, Turn
from metaalign_edge_runtime.llama.vocabulary import load_vocabulary
from metaalign_edge_templates.tier_text import TIERS

from .options import command
from .options.groups import (
    OUTPUT,
    JsonOption,
    JsonSchemaOption,
    MetaPrompt,
    ModelOption,
    ModelOptions,
    OfflineOption,
    QueryArgument,
    RenderingOptions,
    StdinOption,
    Verbosity,
    option,
    read_schema,
    sources_of,
)
from .options.query import read_query
from .terminal import effects, report

CountOption = Annotated[bool, option("--count", help="Only count the tokens; --json: of each tier.", panel=OUTPUT)]


def token_table(tokens: Sequence[Token]) -> str:
    """Lay out tokens as lines: id, tier, text."""
    width = max((len(token.tier or "scaffold") for token in tokens), default=0)
    return "".join(
        f"{token.id:>7}  {token.tier or 'scaffold':<{width}}  {json.dumps(token.text, ensure_ascii=False)}\n"
        for token in tokens
    )


@command
def render(
    context: typer.Context,
    query: QueryArgument = None,
    model: ModelOption = None,
    offline: OfflineOption = False,
    *,
    meta_prompt: MetaPrompt,
    rendered: RenderingOptions,
    json_schema: JsonSchemaOption = None,
    tokens: Annotated[bool, option("--tokens", help="Show each token, its id and its tier.", panel=OUTPUT)] = False,
    count: CountOption = False,
    as_json: JsonOption = False,
    no_stdin: StdinOption = False,
    talk: Verbosity,
) -> None:
    """Print exactly what the model is fed. --tokens loads the vocabulary only, so it is quick on any model.

    Examples:

        metaalign-edge render --pref "one sentence" "What is tea?"

        metaalign-edge render --tokens --json -m model.gguf "What is tea?"

        metaalign-edge render --count < long.txt
    """
    screen, dialog, schema = talk.screen(), meta_prompt.dialog(), read_schema(json_schema)
    dialog = replace(dialog, turns=(Turn(cast(str, read_query(query, no_stdin, repl=False))),))
    file = ModelOptions(model=model, offline=offline).file(screen)
    chosen = edge.choose_template(rendered.template, file)
    screen.detail(f"template {chosen.name}: {chosen.why}")
    options = rendered.options()
    rendering = edge.render(edge.tell_schema(dialog, schema if options.schema_hint else None), chosen, options)
    effects.note_without_effect(chosen, options, Settings(schema=schema, sources=sources_of(context)), screen)
    rows: list[Token] | None = None
    if tokens or count or rendered.strict_tiers:
        with load_vocabulary(file, talk.llama_log) as vocabulary:
            tokenized = edge.tokenize(rendering, vocabulary, file.context)
        report.check_imitated(tokenized.imitated_markers, screen, rendered.strict_tiers)
        rows = tokenized.tokens if tokens or count else None
    elif not as_json:
        screen.note("metaalign-edge: note: tiers are checked on token ids; --tokens shows and checks them")
    if rows is not None and count:
        screen.json(token_counts(rows)) if as_json else screen.write(f"{len(rows)}\n")
    elif as_json:
        screen.json(rendering_document(rendering, options, rows))
    elif rows is not None:
        screen.write(token_table(rows))
    else:
        screen.write(rendering.prompt + ("\n" if screen.terminal else ""))


def token_counts(tokens: Sequence[Token]) -> dict[str, Any]:
    """Count the tokens of each tier, and of the scaffold between them."""
    counts: Counter[str] = Counter(token.tier or "scaffold" for token in tokens)
    owners = (*TIERS, *(["template_arg"] if counts["template_arg"] else []), "scaffold")
    return {"total": len(tokens), **{owner: counts[owner] for owner in owners}}


def rendering_document(rendering: Rendering, options: RenderOptions, tokens: list[Token] | None) -> dict[str, Any]:
    """Make the JSON document of `render`."""
    return {
        "template": rendering.template,
        "native": rendering.native,
        "template_args": options.template_args,
        "messages": rendering.messages,
        "prompt": rendering.prompt,
        "tokens": tokens
        and [{"id": token.id, "text": token.text, "tier": token.tier or "scaffold"} for token in tokens],
    }
