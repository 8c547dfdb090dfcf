"""Settings: values in files for options that are not given. A setting is named like its option.

They reach a command through Click's `default_map`: a flag or an environment variable comes before them, and they come
before the option's built-in default.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import typer
import typer.main

import metaalign_edge as edge
from metaalign_edge_runtime.errors import EdgeError, NotFound, UsageError, did_you_mean, shortened
from metaalign_edge_runtime.stores import config, files, models, profiles
from metaalign_edge_runtime.stores.config import Project

from ..terminal.screen import Screen
from .groups import (
    LogOption,
    MetaPrompt,
    ModelOptions,
    NoCacheOption,
    ParallelOption,
    RenderingOptions,
    SamplingOptions,
    StreamOption,
    StrengthOptions,
    Verbosity,
)
from .signature import spread

# Settings whose options have no variable.
ALSO_SETTINGS = ("pref", "stop", "strict_tiers", "remind", "think", "log", "stream", "quiet", "verbose")
IGNORED_SETTINGS: Mapping[str, tuple[str, ...]] = {  # by command
    "compare": ("pref",),  # a column for each --pref, and no other
    # settings must not change what it measures
    "eval": ("max_tokens", "temp", "seed", "remind", "think", "system_strength", "pref_strength"),
}
SHOWN = 60  # characters of a setting's value in a note
REPLACED_BY = {  # a setting, and the flags of other names that override it
    "system": ("system_file",),
    "pref": ("pref_file", "no_pref"),
    "quiet": ("verbose",),
    "verbose": ("quiet",),
}


@dataclass(frozen=True)
class Setting:
    """A setting's value. Click calls it, as an entry of its default_map, when the option is not given."""

    option: Any  # the Click option of this name
    value: Any  # as the file has it
    origin: str  # the path of the file, or the name of the variable
    project: Project | None = None  # whose file it is, if a project's

    def __call__(self) -> Any:
        """Return the value as a command line would give it.

        Raises:
            UsageError: the option does not take it.
        """
        flag, several = self.option.is_flag, self.option.multiple
        parts = self.value if several and isinstance(self.value, list) else [self.value]
        for part in parts:
            if not isinstance(part, bool if flag else str | int | float) or (isinstance(part, bool) and not flag):
                kind = "true or false" if flag else "a text or a number" + (", or a list of them" if several else "")
                raise self._refusal(UsageError, f"it takes {kind}, not {part!r}")
        given = [part if flag else str(part) for part in parts]
        try:
            self.option.type_cast_value(None, given if several else given[0])
        except typer.BadParameter as error:
            raise self._refusal(UsageError, error.message) from None
        return given if several else given[0]

    def __str__(self) -> str:
        """Return the value as text, several joined by commas."""
        return ", ".join(written(self.value))

    def check(self) -> None:
        """Check what the option's type does not: that the value makes sense, and what it names exists.

        Raises:
            UsageError: the context, layers or strength is out of range, or the preference is empty.
            NotFound: a profile, model or template does not exist.
        """
        given, name = self(), self.option.name
        try:
            if name == "gpu_layers":
                edge.checked_gpu_layers(given)
            elif name == "ctx_size":
                edge.checked_context(given)
            elif name in ("system_strength", "pref_strength") and given != "auto":
                edge.checked_strength(self.option.opts[0], given)
            elif name == "pref":
                MetaPrompt(pref=given).preferences()
            elif name == "model" and (os.path.isabs(given) or "/" not in given):
                models.resolve_model(given)
            elif name == "template" and files.looks_like_path(given, ".jinja"):
                files.read_text(Path(given).expanduser(), "the template")
        except (UsageError, NotFound) as error:
            raise self._refusal(type(error), error) from None

    def _refusal(self, kind: type[EdgeError], reason: object) -> EdgeError:
        return kind(f"{self.origin}: {self.option.name}: {reason}")


def settable(command: Any) -> dict[str, Any]:
    """Return the options of a command that files may set, by name."""
    return {one.name: one for one in command.params if getattr(one, "envvar", None) or one.name in ALSO_SETTINGS}


@functools.cache
def settings_by_name() -> dict[str, Any]:
    """Return all options that files may set, by name."""

    @spread
    def every(
        *,
        meta_prompt: MetaPrompt,
        rendering: RenderingOptions,
        strengths: StrengthOptions,
        model_options: ModelOptions,
        sampling: SamplingOptions,
        parallel: ParallelOption = 8,
        no_cache: NoCacheOption = False,
        log: LogOption = False,
        stream: StreamOption = True,
        verbosity: Verbosity,
    ) -> None: ...

    one = typer.Typer()
    one.command()(every)
    return settable(typer.main.get_command(one))


def written(value: Any) -> list[str]:
    """Return the parts of a setting's value as texts; none if it has no value."""
    parts = value if isinstance(value, list | tuple) else [value]
    return [str(part).lower() if isinstance(part, bool) else str(part) for part in parts if part is not None]


def config_in_force() -> dict[str, Setting]:
    """Return the settings by name: the user's, replaced by the project's, and the preference by METAALIGN_EDGE_PREF.

    Raises:
        UsageError: a file is no TOML, or has a key that is no setting. NotFound: a file cannot be read.
    """
    path, project, pref = config.config_file(), config.find_project(), os.environ.get("METAALIGN_EDGE_PREF")
    if not (project or pref or os.path.isfile(path)):
        return {}
    known = settings_by_name()
    found = {key: Setting(known[key], value, str(path)) for key, value in config.read_settings(path, known).items()}
    if project:
        found |= {
            key: Setting(known[key], value, str(project.path), project) for key, value in project.settings.items()
        }
    if pref:  # not read by Click, which would split it at spaces
        found["pref"] = Setting(known["pref"], pref, "METAALIGN_EDGE_PREF")
    return found


def check_config() -> None:
    """Check all settings.

    Raises:
        UsageError, NotFound: a file is damaged, or a setting makes no sense.
    """
    for setting in config_in_force().values():
        setting.check()


def take_settings(context: typer.Context) -> None:
    """Give a command its settings, by Click's default_map. An error in a file is raised by the options it might set."""
    root, name = cast(Any, context.command), context.invoked_subcommand or ""
    called, ignored = root.commands[name], IGNORED_SETTINGS.get(name, ())
    taken = {key: option for key, option in settable(called).items() if key not in ignored}
    if hasattr(called, "commands") or taken.keys() <= {"quiet", "verbose"}:
        return
    try:
        found = config_in_force()
        defaults: dict[str, Any] = {key: replace(found[key], option=taken[key]) for key in found if key in taken}
        if name == "doctor":
            check_config()
    except EdgeError as error:
        if name == "doctor":  # goes on without settings, and reports the error as a failed check
            return
        damage = error

        def complain() -> None:
            raise damage

        defaults = dict.fromkeys(taken, complain)  # not raised here: --help must work, and asks for no default
    context.default_map = {name: defaults}


def obey_settings(context: typer.Context, given: dict[str, Any]) -> None:
    """Check the settings that a command uses, and say with -v where they come from.

    A setting that a flag of another name overrides (`REPLACED_BY`) is taken out of `given`, the command's arguments.

    Raises:
        UsageError, NotFound: a setting that is used makes no sense.
    """
    source = {name: getattr(context.get_parameter_source(name), "name", "") for name in given}
    for name, flags in REPLACED_BY.items():
        wanted = any(given.get(flag) and source[flag] == "COMMANDLINE" for flag in flags)
        if wanted and source.get(name) != "COMMANDLINE":
            given[name], source[name] = None, ""
    defaults = context.default_map or {}
    settings = [defaults[name] for name in given if source[name] == "DEFAULT_MAP"]
    screen = Screen(given.get("quiet", False), given.get("verbose", False))
    for setting in settings:
        setting.check()
    if project := next((setting.project for setting in settings if setting.project), None):
        announce(project, screen)
    for setting in settings:
        screen.detail(f"{setting.option.name}: {shortened(setting, SHOWN)} (from {setting.origin})")


def announce(project: Project, screen: Screen) -> None:
    """Say what a project's file sets when it is first used; if the file is another user's, every time."""
    if screen.quiet or project.is_known():
        return
    texts = {key: shortened(", ".join(written(value)), SHOWN) for key, value in project.settings.items()}
    sets = ", ".join(f"{key} {json.dumps(text, ensure_ascii=False)}" for key, text in texts.items())
    whose = "" if project.owner is None else f", another user's file (uid {project.owner}),"
    screen.note(f"metaalign-edge: note: {project.path}{whose} sets {sets} (METAALIGN_EDGE_PROJECT=0 ignores it)")
    project.remember()


def default_profiles() -> list[str]:
    """List the names of the profiles that apply by default here.

    Raises:
        UsageError, NotFound: a file of settings is damaged.
    """
    setting = config_in_force().get("pref")
    return [name for preference in setting() for name in profiles.profile_names(preference)] if setting else []


class InForce(NamedTuple):
    """The value of a setting, and where it comes from."""

    value: Any  # None: the model or the machine decides
    origin: str  # a variable, the path of a file, or built-in


def in_force(context: typer.Context) -> dict[str, InForce]:
    """Return every setting by name, as a command without flags would have it here.

    Raises:
        UsageError, NotFound: a file of settings is damaged.
    """
    known, found = settings_by_name(), config_in_force()
    values: dict[str, InForce] = {}
    for name, option in known.items():
        if (given := option.value_from_envvar(context)) is not None:
            values[name] = InForce(option.type_cast_value(context, given), option.envvar)
        elif name in found:
            values[name] = InForce(option.type_cast_value(context, found[name]()), found[name].origin)
        else:
            values[name] = InForce(option.default, "built-in")
    return values


def settable_key(key: str) -> Any:
    """Return the option of a setting: max_tokens, max-tokens or --max-tokens.

    Raises:
        UsageError: there is no such setting.
    """
    known = settings_by_name()
    name = key.removeprefix("--").replace("-", "_")
    if name not in known:
        raise UsageError(f"no setting {key!r}: {did_you_mean(name, known, '`metaalign-edge config show` lists all')}")
    return known[name]


def note_nearer(option: Any, context: typer.Context, screen: Screen) -> None:
    """Say if a variable or a project overrides, here, a setting that was just changed in the user's file."""
    nearer = option.envvar if option.value_from_envvar(context) is not None else None
    with contextlib.suppress(EdgeError):  # about some other setting
        found = config_in_force().get(option.name)
        nearer = nearer or (found and found.origin)
    if nearer and nearer != str(config.config_file()):
        screen.note(f"metaalign-edge: note: here {nearer} comes before it")
