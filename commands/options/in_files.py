"""What files say for options that are not given.

It reaches a command through Click's `default_map`: after a flag and a variable, and before what is built in. A setting
is named like its option.
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
from metaalign_edge_runtime.errors import EdgeError, NotFound, UsageError, nearest, shortened
from metaalign_edge_runtime.stores import config, files, models, profiles
from metaalign_edge_runtime.stores.config import Project

from ..terminal.screen import Screen
from .groups import Loaded, MetaPrompt, NoCacheOption, ParallelOption, Rendered, Sampling, StreamOption, Strengths, Talk
from .signature import spread

ALSO_SETTINGS = ("pref", "stop", "strict_tiers", "remind", "think", "stream", "quiet", "verbose")  # without a variable
ASIDE: Mapping[str, tuple[str, ...]] = {  # settings that a command leaves aside
    "compare": ("pref",),  # its columns are those that are asked for
    "eval": ("max_tokens", "temp", "seed", "remind", "think", "system_strength", "pref_strength"),  # it measures
}
SHOWN = 60  # characters of a setting that are shown where it takes effect
REPLACED_BY = {  # flags of another name
    "system": ("system_file",),
    "pref": ("pref_file", "no_pref"),
    "quiet": ("verbose",),
    "verbose": ("quiet",),
}


@dataclass(frozen=True)
class Setting:
    """A value of a file, as Click's default_map takes it: looked at when its option is not given."""

    option: Any  # Click's
    value: Any
    origin: str  # the file, or the variable
    project: Project | None = None

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
        """Return the value for people."""
        return ", ".join(written(self.value))

    def check(self) -> None:
        """Make sure of what an option's type does not know.

        Raises:
            UsageError: no such context, strength or layers, an empty preference. NotFound: no such profile or file.
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
    """Return the options of a command that a file may set, by name."""
    return {one.name: one for one in command.params if getattr(one, "envvar", None) or one.name in ALSO_SETTINGS}


@functools.cache
def settings_by_name() -> dict[str, Any]:
    """Return the options of all commands that a file may set, by name."""

    @spread
    def every(
        *,
        meta_prompt: MetaPrompt,
        rendered: Rendered,
        strengths: Strengths,
        loaded: Loaded,
        sampling: Sampling,
        parallel: ParallelOption = 8,
        no_cache: NoCacheOption = False,
        stream: StreamOption = True,
        talk: Talk,
    ) -> None: ...

    one = typer.Typer()
    one.command()(every)
    return settable(typer.main.get_command(one))


def written(value: Any) -> list[str]:
    """Return a setting's value for people and scripts: a line for each text."""
    parts = value if isinstance(value, list | tuple) else [value]
    return [str(part).lower() if isinstance(part, bool) else str(part) for part in parts if part is not None]


def standing() -> dict[str, Setting]:
    """Return what stands in files, by name: the user's, then the project's, then the environment's preference.

    Raises:
        UsageError, NotFound: a file is damaged, or has a key that means nothing.
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
    if pref:  # Click would split it at its spaces
        found["pref"] = Setting(known["pref"], pref, "METAALIGN_EDGE_PREF")
    return found


def check_standing() -> None:
    """Check everything that stands in files.

    Raises:
        UsageError, NotFound: something makes no sense.
    """
    for setting in standing().values():
        setting.check()


def take_settings(context: typer.Context) -> None:
    """Hand a command what stands in files for it; what is wrong with them is said by its options."""
    root, name = cast(Any, context.command), context.invoked_subcommand or ""
    called, aside = root.commands[name], ASIDE.get(name, ())
    taken = {key: option for key, option in settable(called).items() if key not in aside}
    if hasattr(called, "commands") or taken.keys() <= {"quiet", "verbose"}:
        return
    try:
        found = standing()
        defaults: dict[str, Any] = {key: replace(found[key], option=taken[key]) for key in found if key in taken}
        if name == "doctor":
            check_standing()
    except EdgeError as error:
        if name == "doctor":  # looks without them, and says what is wrong with them
            return
        damage = error  # raised only now, so that --help helps

        def complain() -> None:
            raise damage

        defaults = dict.fromkeys(taken, complain)
    context.default_map = {name: defaults}


def obey_settings(context: typer.Context, given: dict[str, Any]) -> None:
    """Drop what a flag of another name replaces, check what is in force of the files, and say where it comes from.

    Raises:
        UsageError, NotFound: something in force makes no sense.
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
    """Say what a project sets, at its first use; of another user's, at every use."""
    if screen.quiet or project.is_known():
        return
    texts = {key: shortened(", ".join(written(value)), SHOWN) for key, value in project.settings.items()}
    sets = ", ".join(f"{key} {json.dumps(text, ensure_ascii=False)}" for key, text in texts.items())
    whose = "" if project.owner is None else f", another user's file (uid {project.owner}),"
    screen.note(f"metaalign-edge: note: {project.path}{whose} sets {sets} (METAALIGN_EDGE_PROJECT=0 ignores it)")
    project.remember()


def standing_profiles() -> list[str]:
    """List the profiles that stand here, by name.

    Raises:
        UsageError, NotFound: a file of settings makes no sense.
    """
    setting = standing().get("pref")
    return [name for wish in setting() for name in profiles.profile_names(wish)] if setting else []


class InForce(NamedTuple):
    """The value of a setting, and what gave it."""

    value: Any  # None: the model, or the machine, decides
    origin: str


def in_force(context: typer.Context) -> dict[str, InForce]:
    """Return every setting as it is in force here for a command without flags.

    Raises:
        UsageError, NotFound: a file of settings makes no sense.
    """
    known, found = settings_by_name(), standing()
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
    """Return the option that a setting is named after.

    Raises:
        UsageError: there is none.
    """
    known = settings_by_name()
    name = key.removeprefix("--").replace("-", "_")
    if name not in known:
        raise UsageError(f"no setting {key!r}: {nearest(name, known, '`metaalign-edge config show` lists all')}")
    return known[name]


def note_nearer(option: Any, context: typer.Context, screen: Screen) -> None:
    """Say what comes before the user's file here, if anything does, for a setting that was just changed there."""
    nearer = option.envvar if option.value_from_envvar(context) is not None else None
    with contextlib.suppress(EdgeError):  # of another setting, which is not what was asked for
        found = standing().get(option.name)
        nearer = nearer or (found and found.origin)
    if nearer and nearer != str(config.config_file()):
        screen.note(f"metaalign-edge: note: here {nearer} comes before it")
