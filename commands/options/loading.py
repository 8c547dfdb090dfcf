"""Loading a model as the command line's options say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import metaalign_edge as edge
from metaalign_edge import STOPWATCH, ChatTemplate, Model, RenderOptions, Scheduler, Settings
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.memory import Plan
from metaalign_edge_runtime.stores import models
from metaalign_edge_runtime.stores.prompt_cache import PromptCache

from ..terminal import effects, report
from ..terminal.screen import Screen
from .groups import ModelOptions, RenderingOptions


@contextlib.contextmanager
def open_scheduler(
    loaded: ModelOptions,
    rendered: RenderingOptions,
    settings: Settings,
    screen: Screen,
    cache: PromptCache | None,
    slots: int = 1,
) -> Iterator[Scheduler]:
    """Load a model, and yield a scheduler with `slots` slots. The template is chosen while the model loads.

    Raises:
        NotFound, NetworkError, LoadError: the model does not exist, or cannot be loaded. Interrupted: Ctrl-C.
        TemplateError, UsageError: the template does not exist, or is not valid.
    """
    options, path, interrupt = rendered.options(), loaded.path(screen), Interrupt()
    STOPWATCH.mark("options")
    with contextlib.ExitStack() as held:
        with interrupt:
            with STOPWATCH("metadata"):
                file = models.open_model(path)
            with STOPWATCH("plan"):
                plan = edge.plan_for(file, settings, dialogs=slots)
            model = held.enter_context(contextlib.closing(Model(file, settings, interrupt, plan)))
            with STOPWATCH("template"):
                template = edge.choose_template(rendered.template, file)
            with STOPWATCH("model"):
                model.wait()
        report.explain(model, template, model.settings, screen)
        effects.note_without_effect(template, options, settings, screen)
        scheduler = Scheduler(model, template, model.settings, options, interrupt, slots, cache=cache)
        yield held.enter_context(scheduler)


@contextlib.contextmanager
def open_slots(
    file: ModelFile,
    template: ChatTemplate,
    settings: Settings,
    options: RenderOptions,
    plan: Plan,
    slots: int,
    screen: Screen,
    cache: PromptCache | None = None,
) -> Iterator[Scheduler]:
    """Load a model by its memory plan, and yield a scheduler whose slots all have the same size.

    Ctrl-C is taken as a flag until the end of the `with`.

    Raises:
        LoadError: the model cannot be loaded. Interrupted: Ctrl-C while it loads.
    """
    with Interrupt() as interrupt, Model(file, settings, interrupt, plan) as model:
        report.explain(model, template, settings, screen)
        effects.note_without_effect(template, options, settings, screen)
        size = edge.least_context(file, settings)
        with Scheduler(model, template, settings, options, interrupt, slots, size, cache) as scheduler:
            yield scheduler
