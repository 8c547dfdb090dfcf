"""The checks of `doctor`: everything that an answer needs."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import metaalign_edge as edge
from metaalign_edge import Settings
from metaalign_edge_runtime.errors import EdgeError, counted, in_bytes, one_line
from metaalign_edge_runtime.llama import library, memory
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.memory import Device, Footprint
from metaalign_edge_runtime.stores import files, hub, models
from metaalign_edge_runtime.stores.prompt_cache import PromptCache

from ..terminal.columns import COLUMN
from ..terminal.screen import at_terminal
from . import trial
from .trial import PROBE

START_SECONDS, MODEL_SECONDS, HUB_SECONDS = 60.0, 600.0, 5.0  # limits: loading llama.cpp, trying a model, the hub
REINSTALL = "pip install --force-reinstall --no-cache-dir llama-cpp-python"
FEATURES = {  # instructions of processors: llama.cpp's name and Linux's
    "AVX": "avx", "AVX2": "avx2", "F16C": "f16c", "FMA": "fma", "BMI2": "bmi2", "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8", "NEON": "asimd", "DOTPROD": "asimddp", "MATMUL_INT8": "i8mm", "SVE": "sve",
}  # fmt: skip
NEEDED_FOR_SPEED = ("AVX2", "FMA", "F16C", "NEON", "DOTPROD")  # a build without one is several times slower
Status = Literal["ok", "warning", "failed"]
Finding = tuple[Status, str]


class Check(NamedTuple):
    """A line of `doctor`."""

    name: str
    status: Status
    detail: str


@dataclass
class Examination:
    """What `doctor` was asked, and what earlier checks found out for later ones."""

    model: str | None  # as -m gives it
    settings: Settings
    network: bool  # whether the hub may be asked
    check_config: Callable[[], None] = lambda: None  # raises what is wrong with the settings in files
    file: ModelFile | None = None  # None: there is no model, or it cannot be read
    facts: dict[str, Any] | None = None  # llama.cpp about itself (`trial.llama_facts`); None: it does not load

    def model_file(self) -> ModelFile:
        """Return the model's file.

        Raises:
            EdgeError: it cannot be read.
        """
        if self.file is None:
            raise EdgeError("not tried, as there is no model")
        return self.file

    def gpus(self) -> list[Device]:
        """Return the devices that layers can go to; none if llama.cpp does not load."""
        facts = self.facts or {"offloads": False}
        return memory.usable([Device(*one) for one in facts["devices"]]) if facts["offloads"] else []


def run_checks(examination: Examination) -> Iterator[Check]:
    """Yield each check when it is done; an error in it is what it found."""
    for name, check in CHECKS.items():
        try:
            yield Check(name, *check(examination))
        except EdgeError as error:
            yield Check(name, "failed", one_line(error))
        except Exception as error:
            yield Check(name, "failed", f"unexpected {type(error).__name__}: {one_line(error)}")


def check_program(_: Examination) -> Finding:
    """Report this program's version and its Python."""
    import platform

    python = f"Python {platform.python_version()}, {sys.executable}"
    return "ok", f"metaalign-edge {edge.__version__}, {python}, {platform.system()} {platform.machine()}"


def check_llama(examination: Examination) -> Finding:
    """Check that llama.cpp's library loads, and is the version that this program was written for."""
    from importlib.metadata import PackageNotFoundError, requires, version

    started = time.perf_counter()
    try:
        facts = examination.facts = trial.in_child(START_SECONDS, "llama")
    except EdgeError as error:
        raise EdgeError(f"it does not load: {one_line(error)}: {REINSTALL}") from None
    milliseconds = 1000 * (time.perf_counter() - started)
    backends = ", ".join(re.findall(r"(\w+) : ", facts["features"]))
    detail = f"loads in {milliseconds:.0f} ms, for {backends}, {facts['library']}"
    with contextlib.suppress(PackageNotFoundError):
        has = version("llama-cpp-python")
        detail = f"llama-cpp-python {has} {detail}"
        wants = [need for need in requires("metaalign-edge") or [] if need.startswith("llama-cpp-python==")]
        if wants and wants != [f"llama-cpp-python=={has}"]:
            return "warning", f"{detail}; this program was written for another: pip install {wants[0]}"
    return "ok", detail


def check_devices(examination: Examination) -> Finding:
    """List the devices that layers can go to, and point out a GPU that llama.cpp was not built for."""
    if examination.facts is None:
        return "warning", "not known, as llama.cpp does not load"
    if found := examination.gpus():
        each = (f"{one.name} ({one.description}), {in_bytes(one.free)} of {in_bytes(one.total)} free" for one in found)
        return "ok", "; ".join(each)
    if examination.facts["offloads"]:
        return "warning", "none, though this build of llama.cpp has a backend for one: look at the driver"
    if unused := unused_gpu():
        name, flag = unused
        how = f'CMAKE_ARGS="-DLLAVA_BUILD=OFF -D{flag}=on" {REINSTALL}'
        return "warning", f"the CPU alone, though there is {name}: {how}"
    return "ok", "the CPU alone: this build of llama.cpp has no GPU"


def check_processor(examination: Examination) -> Finding:
    """Compare the instructions that the processor has with those that llama.cpp was built for."""
    cores = counted(library.physical_cores(), "core")
    flags: set[str] = set()
    with contextlib.suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    has = {name for name, flag in FEATURES.items() if flag in flags}
    if examination.facts is None:
        return "ok", f"{cores}; it has {', '.join(sorted(has)) or 'features that are not known'}"
    built = set(re.findall(r"(\w+) = 1", examination.facts["features"]))
    detail = f"{cores}; llama.cpp is built for {', '.join(sorted(built & FEATURES.keys())) or 'any processor'}"
    unused = [name for name in sorted(has - built) if name in NEEDED_FOR_SPEED]
    if flags and (lacking := sorted((built & FEATURES.keys()) - has)):
        return "warning", f"{detail}, but the processor lacks {', '.join(lacking)}: {REINSTALL}"
    if unused:
        return "warning", f"{detail}, not for {', '.join(unused)} that the processor has: {REINSTALL}"
    return "ok", detail


def check_memory(_: Examination) -> Finding:
    """Report how much main memory is free, and how much there is."""
    said = [f"{in_bytes(count)} {what}" for what, count in memory.memory_limits().items()]
    said += [f"{in_bytes(memory.physical_memory())} in all"] if memory.physical_memory() < math.inf else []
    return "ok", ", ".join(said) or "this system does not say"


def check_model(examination: Examination) -> Finding:
    """Check that the model's file is found and its metadata can be read."""
    file = examination.file = models.open_model(models.local_model(examination.model))
    footprint = Footprint.of(file)
    size = in_bytes(sum(footprint.weights) + footprint.embedding)
    return "ok", f"{file.path}: {file.architecture}, {size} of weights, {file.context:,} tokens of context"


def check_template(examination: Examination) -> Finding:
    """Check that the model's template renders a dialog with all three tiers."""
    file = examination.model_file()
    if "default" not in file.templates:
        return "warning", "the model carries none: give one with --template"
    chosen = edge.choose_template("auto", file)
    edge.render(PROBE, chosen)
    return "ok", f"{chosen.name}, {'native' if chosen.native else 'wrapped'}: {chosen.why}; all three tiers render"


def check_first_token(examination: Examination) -> Finding:
    """Check, in a child process, that the model loads, reads a dialog and writes a token."""
    path = str(examination.model_file().path.absolute())
    if examination.facts is None:
        return "warning", "not tried, as llama.cpp does not load"
    settings = examination.settings
    found = trial.in_child(MODEL_SECONDS, "model", path, settings.gpu_layers, settings.threads)
    wrong = any(line.startswith("warning: ") for line in found)
    return "warning" if wrong else "ok", "; ".join(found).replace("warning: ", "")


def check_fit(examination: Examination) -> Finding:
    """Check that the model fits the memory, and report the largest context that does."""
    file = examination.model_file()
    plan = edge.plan_for(file, examination.settings, examination.gpus())
    plan.check(file.path)
    detail = f"{plan}; -c auto would take {plan.largest(file.context):,}" if plan.footprint.foretold else str(plan)
    detail += f"; {plan.offloaded} of {len(plan.places)} layers on the GPU" if plan.offloaded else ""
    if plan.reads_from_disk:
        again = "the weights are read from the disk again and again: take a smaller quantization"
        return "warning", f"{detail}: {again}"
    return "ok", detail if plan.footprint.foretold else f"{detail}; what its cache takes is not foretold"


def check_cache(_: Examination) -> Finding:
    """Check the cache's folder, and report how many prompt states it holds."""
    status, detail = check_folder(files.cache_folder(), "METAALIGN_EDGE_CACHE")
    states = PromptCache()
    kept = states.files()
    held = f"{in_bytes(sum(file.bytes for file in kept))} of {in_bytes(states.most)}"
    hits = counted(sum(file.hits for file in kept), "hit")
    return status, f"{detail}; {counted(len(kept), 'state')}, {held}, {hits}"


def check_config(examination: Examination) -> Finding:
    """Check the settings in files, and their folder."""
    examination.check_config()
    return check_folder(files.config_folder(), "METAALIGN_EDGE_CONFIG")


def check_data(_: Examination) -> Finding:
    """Check the folder of sessions and history."""
    return check_folder(files.data_folder(), "METAALIGN_EDGE_DATA")


def check_folder(folder: Path, variable: str) -> Finding:
    """Check that a folder can be written, or made. `variable`: the environment variable that names another one."""
    import tempfile

    there, free = files.room_at(folder)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return "warning", f"{folder}: {error.strerror}: nothing is kept there; {variable} names another"
    size = f"{in_bytes(free)} free"
    return "ok", f"{folder}, {size}" if there == folder else f"{folder}, to be made; {size}"


def check_terminal(_: Examination) -> Finding:
    """Report where answers are printed: a terminal's kind, width and colours, and the encoding."""
    from rich.console import Console

    encoding = (sys.stdout.encoding or "unknown") if sys.stdout else "none"
    place = "none: stdout is a pipe or a file"
    if at_terminal(sys.stdout):
        depth = {None: "no", "standard": "16", "256": "256"}
        colours = f"{depth.get(Console().color_system, 'all')} colours"
        place = f"{os.environ.get('TERM', 'no TERM')}, {shutil.get_terminal_size().columns} columns, {colours}"
    if encoding.lower().replace("-", "") != "utf8":
        return "warning", f"{place}, {encoding}: letters that it lacks become `?`; PYTHONUTF8=1 helps"
    return "ok", f"{place}, {encoding}"


def check_hub(examination: Examination) -> Finding:
    """Check that the hub can be reached, if --network allows to ask it."""
    if hub.is_offline(False):
        return "ok", "offline, as HF_HUB_OFFLINE says: nothing is fetched"
    if not examination.network:
        return "ok", f"{hub.hub_address()}, not asked (--network asks)"
    return ask_hub(hub.hub_address())


CHECKS: dict[str, Callable[[Examination], Finding]] = {  # in this order: later checks use what earlier ones found
    "program": check_program,
    "llama.cpp": check_llama,
    "devices": check_devices,
    "processor": check_processor,
    "memory": check_memory,
    "model": check_model,
    "template": check_template,
    "first token": check_first_token,
    "fit": check_fit,
    "cache": check_cache,
    "config": check_config,
    "data": check_data,
    "terminal": check_terminal,
    "hub": check_hub,
}


def ask_hub(endpoint: str) -> Finding:
    """Send the hub one request without a body, and report the status and the time of its answer.

    Raises:
        EdgeError: the hub cannot be reached.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    if not endpoint.startswith(("http://", "https://")):
        raise EdgeError(f"HF_ENDPOINT={endpoint} is no address of a hub")
    no_redirects = HTTPRedirectHandler()
    no_redirects.redirect_request = lambda *_: None  # type: ignore[method-assign]  # following is a second request
    started, status = time.perf_counter(), 200
    try:
        build_opener(no_redirects).open(Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError as error:
        status = error.code
    except (OSError, HTTPException) as error:
        raise EdgeError(f"{endpoint} cannot be reached: {one_line(getattr(error, 'reason', error))}") from None
    milliseconds = 1000 * (time.perf_counter() - started)
    level: Status = "ok" if status < 400 else "warning" if status < 500 else "failed"
    return level, f"{endpoint} answers {status} in {milliseconds:.0f} ms"


def unused_gpu() -> tuple[str, str] | None:
    """Return the name of a GPU that this machine seems to have, and the CMake flag that builds llama.cpp for it."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "an NVIDIA GPU", "GGML_CUDA"
    if Path("/dev/kfd").exists():
        return "an AMD GPU", "GGML_HIP"
    return ("Metal", "GGML_METAL") if sys.platform == "darwin" else None


def check_lines(check: Check, width: int, columns: int | None) -> str:
    """Return a check as text: one line, or lines that fit a terminal.

    Args:
        width: of the column of names, in characters.
        columns: of the terminal; None if there is none.
    """
    head = f"{check.status:<7}  {check.name:<{width}}  "
    if columns is None:
        return f"{head}{check.detail}\n"
    import textwrap

    options: dict[str, Any] = {"width": columns, "break_long_words": False, "break_on_hyphens": False}
    if columns < len(head) + COLUMN:
        detail = textwrap.fill(check.detail, initial_indent="  ", subsequent_indent="  ", **options)
        return f"{head.rstrip()}\n{detail}\n"
    return textwrap.fill(check.detail, initial_indent=head, subsequent_indent=" " * len(head), **options) + "\n"
