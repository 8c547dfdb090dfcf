"""From options to a loaded model."""

from __future__ import annotations

import contextlib

import metaalign_edge as edge
from metaalign_edge import STOPWATCH, ChatTemplate, Model, Settings
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.vocabulary import Loading
from metaalign_edge_runtime.stores import models

from ..terminal.screen import Screen
from .groups import Loaded, Rendered


def load_model(
    loaded: Loaded,
    rendered: Rendered,
    settings: Settings,
    interrupt: Interrupt,
    screen: Screen,
    columns: int = 1,
) -> tuple[Model, ChatTemplate, Settings]:
    """Load a model, and choose its template meanwhile.

    Raises:
        NotFound, NetworkError, LoadError: there is no such model, or it is none. Interrupted: Ctrl-C.
        TemplateError, UsageError: there is no such template.
    """
    path = loaded.path(screen)
    STOPWATCH.mark("options")
    with interrupt, contextlib.ExitStack() as unless_loaded:
        with STOPWATCH("library"):
            loading = unless_loaded.enter_context(Loading(path, settings.verbose))
        with STOPWATCH("metadata"):
            file = models.open_model(path)
            settings = loaded.fitted(settings, file, columns=columns)
        model = unless_loaded.enter_context(Model(file, settings, interrupt, loading))
        with STOPWATCH("template"):
            chosen = edge.choose_template(rendered.template, file)
        unless_loaded.pop_all()
        return model, chosen, settings
