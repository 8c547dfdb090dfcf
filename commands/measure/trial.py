"""Trying a model, or llama.cpp itself, in a child process: a crash there is an error message here."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import metaalign_edge as edge
from metaalign_edge import BatchEntry, Dialog, Engine, Model, RenderOptions, Request, Scheduler, Settings, Turn
from metaalign_edge_runtime.errors import ContextOverflow, EdgeError, LoadError, TemplateError, TierViolation, one_line
from metaalign_edge_runtime.llama import library
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt

PROBE = Dialog("Be kind.", "One sentence.", (Turn("What is tea?"),))  # speaks in all three tiers


def llama_facts() -> dict[str, Any]:
    """Return what llama.cpp reports about itself, in JSON's types: library, features, offloads, devices."""
    llama = library.start()
    return {
        "library": str(llama._lib._name),
        "features": llama.llama_print_system_info().decode("utf-8", "replace"),
        "offloads": bool(llama.llama_supports_gpu_offload()),
        "devices": library.devices(),
    }


def try_model(path: Path, settings: Settings) -> list[str]:
    """Load a model, render a dialog with its template and decode a token; return a line about each.

    Raises:
        EdgeError: one of these fails.
    """
    file = ModelFile(path)
    interrupt = Interrupt()
    settings = replace(settings, max_tokens=1, temperature=0.0, context=min(file.context, 512))
    with interrupt, Model(file, settings, interrupt) as model:
        found = [f"loads, with {model.vocabulary.size:,} tokens and the end token {file.token('eos') or 'none'}"]
        if "default" in file.templates:
            with Scheduler(model, edge.choose_template("auto", file), settings, RenderOptions(), interrupt) as session:
                answer = edge.answer_one(session, Request(PROBE))
                interrupt.check()
                found.append(f"the template {answer.template} renders {answer.input_tokens} tier-safe tokens")
                found.append(check_logits(cast(Engine, session.engine)))
        else:
            found.append("carries no chat template by default: chat will need --template")
            with Engine(model, settings, interrupt, cast(int, settings.context)) as engine:
                engine.decode([BatchEntry(engine.sequences[0], [0])])
                found.append(check_logits(engine))
    return found


def check_logits(engine: Engine) -> str:
    """Return a line that says whether the last logits are finite: weights that overflowed make them infinite or NaN."""
    logits = library.llama_cpp().llama_get_logits_ith(engine.pointer, -1)
    if all(map(math.isfinite, logits[: engine.model.vocabulary.size])):
        return "a token is decoded"
    return "warning: what the result computes are no numbers; use --outtype bf16 or f32, or look at the weights"


def child_main() -> None:
    """Do the task that the parent process gives as JSON in argv[1]; print its result, or the error, as JSON."""
    task, *arguments = json.loads(sys.argv[1])
    try:
        if task == "model":
            path, gpu_layers, threads = arguments
            result: Any = try_model(Path(path), Settings(gpu_layers=gpu_layers, threads=threads))
        else:
            result = llama_facts()
        print(json.dumps({"result": result}))
    except EdgeError as error:
        print(json.dumps({"error": one_line(error)}))


def in_child(seconds: float, *task: Any) -> Any:
    """Do a task that may crash in a child process; return its result.

    Args:
        task: its name, `model` or `llama`, and its arguments.

    Raises:
        EdgeError: it fails, the process is ended by a signal, or it takes more than `seconds`.
    """
    import subprocess

    command = [
        sys.executable,
        "-c",
        "import metaalign_edge, metaalign_edge_commands.measure.trial as trial; trial.child_main()",
        json.dumps(task),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise EdgeError(f"no answer within {seconds:g} seconds") from None
    if ended.returncode or not ended.stdout:
        raise EdgeError(ended_by(ended.returncode, ended.stderr.decode("utf-8", "replace")))
    answer = json.loads(ended.stdout.splitlines()[-1])
    if "error" in answer:
        raise EdgeError(answer["error"])
    return answer["result"]


def ended_by(code: int, said: str) -> str:
    """Return why a process ended, from its exit code and its stderr."""
    lines = [line for line in said.splitlines() if line.strip()]
    reasons = {"SIGILL": "an instruction that this processor lacks", "SIGKILL": "most likely for want of memory"}
    name = "SIGILL" if code in (-4, 0xC000001D) else ""  # the second is Windows' code for it
    with contextlib.suppress(ValueError):
        name = name or signal.Signals(-code).name
    if not name:
        return f"it ends with {code}: {lines[-1] if lines else 'without a word'}"
    return f"it is ended by {name}" + (f", {reasons[name]}" if name in reasons else "")


def verify_conversion(path: Path, settings: Settings) -> list[str]:
    """Try a converted model before its file gets its name (`try_model`).

    Raises:
        EdgeError: as `try_model`; the caller removes the file.
    """
    try:
        return try_model(path, replace(settings, gpu_layers="0"))
    except (LoadError, TemplateError, TierViolation, ContextOverflow) as error:
        raise type(error)(f"the result fails its check, so it was removed (--no-check keeps it): {error}") from error
