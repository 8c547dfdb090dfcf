"""The options that commands share, in groups that a command takes as one parameter."""

from __future__ import annotations

import functools
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import metaalign_edge as edge
from metaalign_edge import Dialog, RenderOptions, Settings
from metaalign_edge_runtime import structured
from metaalign_edge_runtime.errors import UsageError
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.stores import download, files, models, profiles
from metaalign_edge_runtime.stores.prompt_cache import States
from metaalign_edge_runtime.structured import Schema

from ..terminal.progress import progress_bar
from ..terminal.screen import Screen


def read_schema(text: str) -> Schema:
    """Read a schema: a file's, JSON, or the short form `name, age int`.

    Raises:
        NotFound: the file is not there. UsageError: it is no JSON, or no schema that an answer can fit.
    """
    inline = text.lstrip().startswith("{")
    file = not inline and (
        files.looks_like_path(text, ".json") if not re.search(r"[\s,]", text) else text.endswith(".json")
    )
    if not (inline or file):
        return structured.expand_schema(text)
    if file:
        return structured.parse_schema(files.read_text(Path(text).expanduser(), "the schema"), f"the schema {text}")
    return structured.parse_schema(text)


def option(*names: str, help: str, panel: str | None = None, env: str | None = None, **more: Any) -> Any:
    """Declare a shared option; `env` names its variable METAALIGN_EDGE_…."""
    return typer.Option(*names, help=help, rich_help_panel=panel, envvar=env and f"METAALIGN_EDGE_{env}", **more)


DIALOG, MODEL, SAMPLING, OUTPUT = "Dialog", "Model", "Sampling", "Output"
QueryArgument = Annotated[
    str | None,
    typer.Argument(metavar="QUERY", help="The question. stdin, when piped, is put before it.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    option(
        "-m",
        "--model",
        help="A GGUF file, user/repo[:QUANT] on the hub, or a name of `models list`. Default: the embedded one.",
        panel=MODEL,
        env="MODEL",
    ),
]
OfflineOption = Annotated[
    bool,
    option(
        "--offline", help="Open no connection; what is not on this machine is an error.", panel=MODEL, env="OFFLINE"
    ),
]
SystemOption = Annotated[
    str | None, option("-s", "--system", help="System Info: what the provider wants.", panel=DIALOG, env="SYSTEM")
]
SystemFileOption = Annotated[Path | None, option("--system-file", help="Read System Info from a file.", panel=DIALOG)]
PrefOption = Annotated[
    list[str] | None, option("--pref", help="User Info: a text, or @concise and the like. Repeat to add.", panel=DIALOG)
]
PrefFileOption = Annotated[Path | None, option("--pref-file", help="Read User Info from a file.", panel=DIALOG)]
NoPrefOption = Annotated[bool, option("--no-pref", help="Ignore the preferences that stand.", panel=DIALOG)]
TemplateOption = Annotated[
    str, option("--template", help="auto, a shipped name, or a Jinja file.", panel=DIALOG, env="TEMPLATE")
]
StrictOption = Annotated[
    bool, option("--strict-tiers", help="Refuse text that imitates a marker which is no token.", panel=DIALOG)
]
RemindOption = Annotated[
    bool, option("--remind/--no-remind", help="Restate the priority next to the query (wrapped only).", panel=DIALOG)
]
SystemStrengthOption = Annotated[
    float,
    option(
        "--system-strength",
        help="How hard System Info pulls: 1 as the model was trained, 2 twice as far, 0 not at all.",
        panel=DIALOG,
        env="SYSTEM_STRENGTH",
    ),
]
PrefStrengthOption = Annotated[
    str,
    option(
        "--pref-strength",
        help="How hard User Info pulls, or auto: as hard as it changes each token.",
        panel=DIALOG,
        env="PREF_STRENGTH",
    ),
]
ThinkOption = Annotated[
    bool | None, option("--think/--no-think", help="Tell a thinking model's template.", panel=DIALOG)
]
StdinOption = Annotated[bool, option("--no-stdin", help="Leave stdin alone (in loops).", panel=DIALOG)]
MaxTokensOption = Annotated[
    int | None,
    option("-n", "--max-tokens", help="Tokens of the answer at most.", panel=SAMPLING, env="MAX_TOKENS", min=1),
]
ContextOption = Annotated[
    str | None,
    option(
        "-c",
        "--ctx-size",
        help="Tokens of the context, or auto: as many as the model knows and memory holds.",
        panel=MODEL,
        env="CTX_SIZE",
    ),
]
GpuOption = Annotated[
    str, option("-ngl", "--gpu-layers", help="Layers on the GPU: auto, all or a number.", panel=MODEL, env="GPU_LAYERS")
]
ThreadsOption = Annotated[
    int | None,
    option(
        "-t",
        "--threads",
        help="CPU threads. Default: one per core, one for a tiny model.",
        panel=MODEL,
        env="THREADS",
        min=1,
    ),
]
TempOption = Annotated[
    float | None, option("--temp", help="Temperature; 0 is greedy.", panel=SAMPLING, env="TEMP", min=0.0)
]
TopKOption = Annotated[
    int | None, option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.", panel=SAMPLING, env="TOP_K", min=0)
]
TopPOption = Annotated[
    float | None,
    option(
        "--top-p", help="Keep the likeliest tokens up to this share.", panel=SAMPLING, env="TOP_P", min=0.0, max=1.0
    ),
]
MinPOption = Annotated[
    float | None,
    option(
        "--min-p", help="Drop tokens below this share of the likeliest.", panel=SAMPLING, env="MIN_P", min=0.0, max=1.0
    ),
]
PenaltyOption = Annotated[
    float | None,
    option("--repeat-penalty", help="Above 1 discourages repetition.", panel=SAMPLING, env="REPEAT_PENALTY", min=0.1),
]
SeedOption = Annotated[
    int | None, option("--seed", help="Draw the same text again.", panel=SAMPLING, env="SEED", min=0, max=2**32 - 1)
]
SchemaOption = Annotated[
    str | None,
    option(
        "-j",
        "--json-schema",
        help="Answer in JSON of this schema: a file, JSON, or fields as 'name, age int'.",
        panel=SAMPLING,
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    option("--lora", help="Lay a GGUF adapter over the model: PATH or PATH:SCALE. Repeat to add.", panel=MODEL),
]
StopOption = Annotated[
    list[str] | None, option("--stop", help="End the answer before this text. Repeat to add.", panel=SAMPLING)
]
ParallelOption = Annotated[
    int, option("--parallel", help="Answers written at a time.", panel=MODEL, env="PARALLEL", min=1, max=256)
]
ForceOption = Annotated[bool, option("--force", help="Replace an output that exists.")]
NoCacheOption = Annotated[
    bool,
    option(
        "--no-cache",
        help="Neither load nor keep what was read of the meta-prompt.",
        panel=MODEL,
        env="NO_CACHE",
    ),
]
JsonOption = Annotated[bool, option("--json", help="One JSON document on stdout.", panel=OUTPUT)]
SessionOption = Annotated[
    str | None,
    option("--session", metavar="NAME", help="Go on with a conversation of this name, or begin it.", panel=DIALOG),
]
ContinueOption = Annotated[
    bool, option("-C", "--continue", help="Go on with the session that was used last.", panel=DIALOG)
]
MarkdownOption = Annotated[
    bool,
    option("--markdown/--no-markdown", help="On a terminal, render the answer when it is complete.", panel=OUTPUT),
]
StreamOption = Annotated[bool, option("--stream/--no-stream", help="Print text as it comes.", panel=OUTPUT)]
QuietOption = Annotated[bool, option("-q", "--quiet", help="Only errors on stderr.", panel=OUTPUT)]
VerboseOption = Annotated[
    bool, option("-v", "--verbose", help="Say what is chosen, and llama.cpp's log.", panel=OUTPUT)
]


class Preference(NamedTuple):
    """A preference as it was given, `@brief`, and its text."""

    given: str
    text: str


class MetaPrompt(NamedTuple):
    """What the two Info tiers say."""

    system: SystemOption = None
    system_file: SystemFileOption = None
    pref: PrefOption = None
    pref_file: PrefFileOption = None
    no_pref: NoPrefOption = False

    def system_info(self) -> str:
        """Return System Info.

        Raises:
            UsageError: it has two sources. NotFound: the file is not there.
        """
        if self.system is not None and self.system_file is not None:
            raise UsageError("--system and --system-file both give System Info: choose one")
        if self.system_file is not None:
            return files.read_text(self.system_file, "--system-file").removesuffix("\n")
        return self.system or ""

    def preferences(self) -> list[Preference]:
        """Return the preferences; profiles are looked up, and the file is read, once.

        Raises:
            UsageError: one is empty, or not UTF-8. NotFound: the file is not there, or no such profile.
        """
        given = list(self.pref or [])
        if self.pref_file is not None:
            given.append(files.read_text(self.pref_file, "--pref-file").removesuffix("\n"))
        if any(not one.strip() for one in given):
            raise UsageError("the preference is empty: say what you prefer, or leave --pref out")
        return [Preference(one, profiles.expand_profile(one)) for one in given]

    def dialog(self) -> Dialog:
        """Return a dialog without turns, the preferences joined.

        Raises:
            UsageError, NotFound: as above.
        """
        return Dialog(self.system_info(), "\n".join(one.text for one in self.preferences()))


class Rendered(NamedTuple):
    """How a dialog becomes a prompt."""

    template: TemplateOption = "auto"
    strict_tiers: StrictOption = False
    remind: RemindOption = True
    think: ThinkOption = None

    def options(self) -> RenderOptions:
        """Return those that concern the rendering."""
        return RenderOptions(self.remind, self.think)


class Loaded(NamedTuple):
    """Which model is loaded, and how."""

    model: ModelOption = None
    ctx_size: ContextOption = None
    gpu_layers: GpuOption = "auto"
    threads: ThreadsOption = None
    offline: OfflineOption = False
    lora: AdapterOption = None

    def path(self, screen: Screen) -> Path:
        """Return where the model is.

        Raises:
            EdgeError: as `find_model`.
        """
        return download.find_model(self.model, self.offline, screen.note, functools.partial(progress_bar, screen))

    def file(self, screen: Screen) -> ModelFile:
        """Read the model's metadata.

        Raises:
            EdgeError: as `find_model` and `open_model`.
        """
        return models.open_model(self.path(screen))

    def settings(self) -> Settings:
        """Return what the engine has to know.

        Raises:
            UsageError: the number of tokens or of layers is none, or a scale. NotFound, LoadError: an adapter is not
                there, or none.
        """
        layers, adapters = edge.checked_gpu_layers(self.gpu_layers), edge.find_adapters(self.lora or ())
        return Settings(edge.checked_context(self.ctx_size), layers, self.threads, adapters=adapters)


class Strengths(NamedTuple):
    """How hard each tier pulls."""

    system_strength: SystemStrengthOption = 1.0
    pref_strength: PrefStrengthOption = "1"

    def added(self, settings: Settings) -> Settings:
        """Return the settings with these strengths.

        Raises:
            UsageError: one is no strength.
        """
        system, pref = edge.checked_strength("--system-strength", self.system_strength), self.pref_strength
        return replace(
            settings,
            system_strength=system,
            pref_strength="auto" if pref == "auto" else edge.checked_strength("--pref-strength", pref),
        )


class Sampling(NamedTuple):
    """How tokens are drawn."""

    max_tokens: MaxTokensOption = None
    temp: TempOption = None
    top_k: TopKOption = None
    top_p: TopPOption = None
    min_p: MinPOption = None
    repeat_penalty: PenaltyOption = None
    seed: SeedOption = None
    stop: StopOption = None
    json_schema: SchemaOption = None

    def added(self, settings: Settings) -> Settings:
        """Return the settings with these; a seed is drawn unless there is one.

        Raises:
            UsageError, NotFound: the schema is none, or not there.
        """
        return replace(
            settings,
            max_tokens=self.max_tokens,
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            seed=random.SystemRandom().randrange(2**32) if self.seed is None else self.seed,
            stop=tuple(self.stop or ()),
            schema=None if self.json_schema is None else read_schema(self.json_schema),
        )


def kept_states(no_cache: bool, fills: bool = True) -> States | None:
    """Return the states on the disk, unless --no-cache."""
    return None if no_cache else States(fills=fills)


class Talk(NamedTuple):
    """How much is said on stderr."""

    quiet: QuietOption = False
    verbose: VerboseOption = False

    def screen(self) -> Screen:
        """Return the streams."""
        return Screen(self.quiet, self.verbose)


def gathered(loaded: Loaded, sampling: Sampling, strengths: Strengths, talk: Talk) -> Settings:
    """Return the settings of a command that answers."""
    return replace(strengths.added(sampling.added(loaded.settings())), verbose=talk.verbose)


ChartOption = Annotated[
    Path | None, option("--chart", help="Draw the rates: OUT.png or OUT.svg (matplotlib).", panel=OUTPUT)
]
