"""Look whether all is well: llama.cpp, devices, memory, the model and whether it fits, folders, terminal, hub."""

from __future__ import annotations

import shutil
from typing import Annotated

from metaalign_edge_runtime.errors import EdgeError

from .measure import health
from .measure.health import CHECKS, Examination
from .options import command, in_files
from .options.groups import JsonOption, Loaded, option
from .terminal.screen import Screen

NetworkOption = Annotated[bool, option("--network", help="Ask the hub, too, whether it can be reached.")]


@command
def doctor(network: NetworkOption = False, as_json: JsonOption = False, *, loaded: Loaded) -> None:
    """Look whether all is well: llama.cpp, devices, memory, the model and whether it fits, folders, terminal, hub.

    Each check is ok, a warning, or failed. The exit code is 0 if none failed, else 1.

    Examples:

        metaalign-edge doctor

        metaalign-edge doctor -m model.gguf -c 8192 --json
    """
    screen, examination = Screen(), Examination(loaded.model, loaded.settings(), network, in_files.check_standing)
    columns = shutil.get_terminal_size().columns if screen.terminal else None
    checks = []
    for check in health.run_checks(examination):
        checks.append(check)
        if not as_json:
            screen.write(health.check_lines(check, max(map(len, CHECKS)), columns))
    if as_json:
        screen.json({"checks": [check._asdict() for check in checks]})
    if failed := sum(check.status == "failed" for check in checks):
        raise EdgeError(f"{failed} of {len(checks)} checks failed")
