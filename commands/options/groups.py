"""The options that commands share: alone, or in groups that a command takes as one parameter."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Iterable
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
from metaalign_edge_runtime.stores.prompt_cache import PromptCache
from metaalign_edge_runtime.structured import Schema

from ..terminal.progress import progress_bar
from ..terminal.screen import Screen

DIALOG, MODEL, SAMPLING, OUTPUT = "Dialog", "Model", "Sampling", "Output"  # the headings of --help


def finite(value: float | None) -> float | None:
    """Return the value of an option as it is. Raises typer.BadParameter for nan and infinity."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def option(*names: str, help: str, panel: str | None = None, env: bool = False, **more: Any) -> Any:
    """Declare an option. `panel`: its heading in --help. `env`: a variable gives it, too, METAALIGN_EDGE_<its name>."""
    name = names[-1].removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *names, help=help, rich_help_panel=panel, envvar=f"METAALIGN_EDGE_{name}" if env else None, **more
    )


dialog_option, model_option, sampling_option, output_option = (
    functools.partial(option, panel=panel) for panel in (DIALOG, MODEL, SAMPLING, OUTPUT)
)


# Options that more than one command or group has.

QueryArgument = Annotated[
    str | None,
    typer.Argument(metavar="QUERY", help="The question. stdin, when piped, is put before it.", show_default=False),
]
StdinOption = Annotated[bool, dialog_option("--no-stdin", help="Do not read stdin (in loops that do).")]
SessionOption = Annotated[
    str | None, dialog_option("--session", metavar="NAME", help="Continue the conversation of this name, or begin it.")
]
ContinueOption = Annotated[bool, dialog_option("-C", "--continue", help="Continue the session that was used last.")]
TemplateOption = Annotated[
    str,
    dialog_option("--template", help="auto (the model's own), the name of a shipped one, or a Jinja file.", env=True),
]
RemindOption = Annotated[
    bool,
    dialog_option("--remind/--no-remind", help="Wrapped templates: add to the query that System Info wins a conflict."),
]
ThinkOption = Annotated[
    bool | None, dialog_option("--think/--no-think", help="Let a thinking model think. Default: as its template does.")
]
ModelOption = Annotated[
    str | None,
    model_option(
        "-m",
        "--model",
        help="A GGUF file, user/repo[:QUANT] of the hub, or a name of `models list`. Default: the embedded one.",
        env=True,
    ),
]
OfflineOption = Annotated[
    bool, model_option("--offline", help="Open no connection; what is not on this machine is an error.", env=True)
]
ParallelOption = Annotated[
    int, model_option("--parallel", help="How many answers are written at the same time.", env=True, min=1, max=256)
]
NoCacheOption = Annotated[
    bool, model_option("--no-cache", help="Neither load nor store prompt states on the disk.", env=True)
]
MaxTokensOption = Annotated[
    int | None, sampling_option("-n", "--max-tokens", help="Longest answer, in tokens.", env=True, min=1)
]
TempOption = Annotated[
    float | None,
    sampling_option(
        "--temp", help="Temperature; 0 always takes the likeliest token.", env=True, min=0.0, callback=finite
    ),
]
JsonOption = Annotated[bool, output_option("--json", help="One JSON document on stdout.")]
StreamOption = Annotated[bool, output_option("--stream/--no-stream", help="Print the answer as it is written.")]
MarkdownOption = Annotated[
    bool,
    output_option(
        "--markdown/--no-markdown", help="On a terminal, show the answer when it is complete, rendered as Markdown."
    ),
]
ChartOption = Annotated[
    Path | None, output_option("--chart", help="Draw the figures: OUT.png or OUT.svg (needs matplotlib).")
]
ForceOption = Annotated[bool, option("--force", help="Replace an output that exists.")]
QuietOption = Annotated[bool, output_option("-q", "--quiet", help="Only errors on stderr.")]
VerboseOption = Annotated[
    bool, output_option("-v", "--verbose", help="Say what was chosen and why, and show llama.cpp's log.")
]


class Preference(NamedTuple):
    """A preference of the command line, or of settings."""

    given: str  # as it was written: a text, `@brief`, `@json+@child`, or a lone -, which is none
    text: str  # what the model reads


class MetaPrompt(NamedTuple):
    """The two Info tiers."""

    system: Annotated[
        str | None, dialog_option("-s", "--system", help="System Info: what the provider of the model wants.", env=True)
    ] = None
    system_file: Annotated[Path | None, dialog_option("--system-file", help="Read System Info from a file.")] = None
    pref: Annotated[
        list[str] | None,
        dialog_option("--pref", help="User Info: a text, a profile such as @concise, or - for none. Repeat to add."),
    ] = None
    pref_file: Annotated[Path | None, dialog_option("--pref-file", help="Read User Info from a file.")] = None
    no_pref: Annotated[
        bool, dialog_option("--no-pref", help="Ignore the preferences that settings or a project give.")
    ] = False

    def system_info(self) -> str:
        """Return System Info.

        Raises:
            UsageError: both options are given. NotFound: the file cannot be read.
        """
        if self.system is not None and self.system_file is not None:
            raise UsageError("--system and --system-file both give System Info: choose one")
        if self.system_file is not None:
            return files.read_text(self.system_file, "--system-file").removesuffix("\n")
        return self.system or ""

    def preferences(self) -> list[Preference]:
        """Read the preferences, and the profiles that they name. Call it once: --pref-file may be a pipe.

        Raises:
            UsageError: a preference is empty. NotFound: the file or a profile does not exist.
        """
        given = list(self.pref or [])
        if self.pref_file is not None:
            given.append(files.read_text(self.pref_file, "--pref-file").removesuffix("\n"))
        if any(not one.strip() for one in given):
            raise UsageError("the preference is empty: say what you prefer, or leave --pref out")
        return [Preference(one, profiles.preference_text(one)) for one in given]

    def dialog(self) -> Dialog:
        """Return a dialog without turns, with all preferences as its User Info."""
        return Dialog(self.system_info(), user_info_of(self.preferences()))


def user_info_of(preferences: Iterable[Preference]) -> str:
    """Return the User Info that several preferences make together, a line each."""
    return "\n".join(one.text for one in preferences if one.text)


class RenderingOptions(NamedTuple):
    """How a dialog becomes a prompt."""

    template: TemplateOption = "auto"
    strict_tiers: Annotated[
        bool, dialog_option("--strict-tiers", help="Refuse text that imitates a marker of the template's.")
    ] = False
    remind: RemindOption = True
    think: ThinkOption = None

    def options(self) -> RenderOptions:
        """Return the options that `render` takes."""
        return RenderOptions(self.remind, self.think)


class ModelOptions(NamedTuple):
    """Which model is loaded, and how."""

    model: ModelOption = None
    ctx_size: Annotated[
        str | None,
        model_option(
            "-c", "--ctx-size", help="Tokens of the context; auto: as many as model and memory allow.", env=True
        ),
    ] = None
    gpu_layers: Annotated[
        str,
        model_option(
            "-ngl", "--gpu-layers", help="Layers on the GPU: auto (those that fit), all, or a number.", env=True
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        model_option(
            "-t",
            "--threads",
            help="CPU threads. Default: one per core, one for a tiny model.",
            env=True,
            min=1,
            max=edge.MOST_THREADS,
        ),
    ] = None
    offline: OfflineOption = False
    lora: Annotated[
        list[str] | None,
        model_option("--lora", help="Lay a GGUF adapter over the model: PATH or PATH:SCALE. Repeat to add."),
    ] = None

    def path(self, screen: Screen) -> Path:
        """Return the path of the model's file; download it if it is named on the hub and not here yet.

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
        """Return the engine's settings that concern the model.

        Raises:
            UsageError: a number of tokens or layers, or an adapter's scale, is no number or out of range.
            NotFound, LoadError: an adapter does not exist, or is not one.
        """
        layers, adapters = edge.checked_gpu_layers(self.gpu_layers), edge.find_adapters(self.lora or ())
        return Settings(edge.checked_context(self.ctx_size), layers, self.threads, adapters=adapters)


class StrengthOptions(NamedTuple):
    """How hard each tier steers the answer."""

    system_strength: Annotated[
        float,
        dialog_option(
            "--system-strength",
            help="How hard System Info steers: 1 as the model was trained, 2 twice as far, 0 not at all.",
            env=True,
        ),
    ] = 1.0
    pref_strength: Annotated[
        str,
        dialog_option(
            "--pref-strength", help="How hard User Info steers, or auto: more where it changes a token more.", env=True
        ),
    ] = "1"

    def added(self, settings: Settings) -> Settings:
        """Return the settings with these strengths.

        Raises:
            UsageError: one is no number, or out of range.
        """
        system, pref = edge.checked_strength("--system-strength", self.system_strength), self.pref_strength
        return replace(
            settings,
            system_strength=system,
            pref_strength="auto" if pref == "auto" else edge.checked_strength("--pref-strength", pref),
        )


class SamplingOptions(NamedTuple):
    """How tokens are drawn."""

    max_tokens: MaxTokensOption = None
    temp: TempOption = None
    top_k: Annotated[
        int | None, sampling_option("--top-k", help="Draw from the K likeliest tokens; 0: from all.", env=True, min=0)
    ] = None
    top_p: Annotated[
        float | None,
        sampling_option(
            "--top-p",
            help="Draw from the likeliest tokens of this total share.",
            env=True,
            min=0,
            max=1,
            callback=finite,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        sampling_option(
            "--min-p", help="Drop tokens below this share of the likeliest.", env=True, min=0, max=1, callback=finite
        ),
    ] = None
    repeat_penalty: Annotated[
        float | None,
        sampling_option(
            "--repeat-penalty", help="Above 1, repetition becomes less likely.", env=True, min=0.1, callback=finite
        ),
    ] = None
    seed: Annotated[
        int | None,
        sampling_option("--seed", help="The same seed draws the same text again.", env=True, min=0, max=2**32 - 1),
    ] = None
    stop: Annotated[
        list[str] | None, sampling_option("--stop", help="End the answer before this text. Repeat to add.")
    ] = None
    json_schema: Annotated[
        str | None,
        sampling_option(
            "-j", "--json-schema", help="Answer in JSON of this schema: a file, JSON, or fields as 'name, age int'."
        ),
    ] = None

    def added(self, settings: Settings) -> Settings:
        """Return the settings with these options, and with a random seed unless --seed gives one.

        Raises:
            UsageError: the schema is not valid. NotFound: its file does not exist.
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


class Verbosity(NamedTuple):
    """How much is printed on stderr."""

    quiet: QuietOption = False
    verbose: VerboseOption = False

    def screen(self) -> Screen:
        """Return the two streams, at this verbosity."""
        return Screen(self.quiet, self.verbose)


def gathered(
    model: ModelOptions, sampling: SamplingOptions, strengths: StrengthOptions, verbosity: Verbosity
) -> Settings:
    """Return the engine's settings of a command that answers."""
    return replace(strengths.added(sampling.added(model.settings())), verbose=verbosity.verbose)


def prompt_cache(no_cache: bool, read_only: bool = False) -> PromptCache | None:
    """Return the cache of prompt states; None with --no-cache."""
    return None if no_cache else PromptCache(read_only=read_only)


def read_schema(text: str) -> Schema:
    """Read the value of --json-schema: the path of a file, JSON, or the short form `name, age int`.

    Raises:
        NotFound: the file does not exist. UsageError: it is not JSON, or no answer can fit the schema.
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
