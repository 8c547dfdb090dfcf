"""Check what an answer needs: llama.cpp, devices, memory, the model and its fit, folders, terminal, hub."""

from __future__ import annotations

import shutil
from typing import Annotated

from metaalign_edge_runtime.errors import EdgeError

from .measure import health
from .measure.health import CHECKS, Check, Examination
from .options import command, in_files
from .options.groups import JsonOption, ModelOptions, option
from .terminal.screen import Screen
from .terminal.status import waiting


@command
def doctor(
    network: Annotated[bool, option("--network", help="Also send the hub a request.")] = False,
    as_json: JsonOption = False,
    *,
    model_options: ModelOptions,
) -> None:
    """Check what an answer needs: llama.cpp, devices, memory, the model and its fit, folders, terminal, hub.

    Each check is ok, a warning, or failed. The exit code is 1 if one failed, else 0.

    Examples:

        metaalign-edge doctor

        metaalign-edge doctor -m model.gguf -c 8192 --json
    """
    screen, settings = Screen(), model_options.settings()
    examination = Examination(model_options.model, settings, network, in_files.check_config)
    columns = shutil.get_terminal_size().columns if screen.terminal else None
    checks: list[Check] = []
    with waiting(screen, lambda: f"checking: {' '.join([*CHECKS][len(checks) :][:1])}"):
        for check in health.run_checks(examination):
            checks.append(check)
            if not as_json:
                screen.lines(health.check_lines(check, max(map(len, CHECKS)), columns).splitlines())
    if as_json:
        screen.json({"checks": [check._asdict() for check in checks]})
    if failed := sum(check.status == "failed" for check in checks):
        raise EdgeError(f"{failed} of {len(checks)} checks failed")
