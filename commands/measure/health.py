"""Whether all is well that an answer needs, for `doctor`."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import metaalign_edge as edge
from metaalign_edge import Settings
from metaalign_edge_runtime.errors import EdgeError, counted, in_bytes, one_line
from metaalign_edge_runtime.llama import library, memory
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.memory import Device, Footprint
from metaalign_edge_runtime.stores import files, hub, models
from metaalign_edge_runtime.stores.prompt_cache import States

from ..terminal.columns import COLUMN
from ..terminal.screen import at_terminal
from . import trial
from .trial import PROBE

START_SECONDS, MODEL_SECONDS, HUB_SECONDS = 60.0, 600.0, 5.0  # that the library, a model, and the hub may take
REINSTALL = "pip install --force-reinstall --no-cache-dir llama-cpp-python"
FEATURES = {  # of processors: llama.cpp's name, then Linux's
    "AVX": "avx", "AVX2": "avx2", "F16C": "f16c", "FMA": "fma", "BMI2": "bmi2", "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8", "NEON": "asimd", "DOTPROD": "asimddp", "MATMUL_INT8": "i8mm", "SVE": "sve",
}  # fmt: skip
MATTERS = ("AVX2", "FMA", "F16C", "NEON", "DOTPROD")  # without these it is slow by a factor, not by some per cent
Status = Literal["ok", "warning", "failed"]
Finding = tuple[Status, str]


class Check(NamedTuple):
    """What was looked at, and what was found."""

    name: str
    status: Status
    detail: str


class Doctor:
    """Looks at everything that an answer needs."""

    def __init__(
        self, model: str | None, settings: Settings, network: bool, check: Callable[[], None] | None = None
    ) -> None:
        self.settings, self.network, self.model = settings, network, model
        self.check_settings = check or (lambda: None)  # raises what is wrong with those that stand in files
        self.file: ModelFile | None = None
        self.facts: dict[str, Any] | None = None  # of llama.cpp; None while it does not load
        self.looks: dict[str, Callable[[], Finding]] = {
            "program": self.program,
            "llama.cpp": self.llama,
            "devices": self.devices,
            "processor": self.processor,
            "memory": self.memory,
            "model": self.metadata,
            "template": self.template,
            "first token": self.first_token,
            "fit": self.fit,
            "cache": self.cache,
            "config": self.config,
            "data": lambda: self.folder(files.data_folder(), "METAALIGN_EDGE_DATA"),
            "terminal": self.terminal,
            "hub": self.hub,
        }

    def checks(self) -> Iterator[Check]:
        """Yield each check when it is done; what goes wrong in it is what it found."""
        for name, look in self.looks.items():
            try:
                yield Check(name, *look())
            except EdgeError as error:
                yield Check(name, "failed", one_line(error))
            except Exception as error:
                yield Check(name, "failed", f"unexpected {type(error).__name__}: {one_line(error)}")

    def program(self) -> Finding:
        """Look at this program and its Python."""
        import platform

        python = f"Python {platform.python_version()}, {sys.executable}"
        return "ok", f"metaalign-edge {edge.__version__}, {python}, {platform.system()} {platform.machine()}"

    def llama(self) -> Finding:
        """Look whether llama.cpp's library loads, and is the one that this program was written for."""
        from importlib.metadata import PackageNotFoundError, requires, version

        started = time.perf_counter()
        try:
            self.facts = trial.in_child(START_SECONDS, "llama")
        except EdgeError as error:
            raise EdgeError(f"it does not load: {one_line(error)}: {REINSTALL}") from None
        spent = 1000 * (time.perf_counter() - started)
        backends = ", ".join(re.findall(r"(\w+) : ", self.facts["features"]))
        detail = f"loads in {spent:.0f} ms, for {backends}, {self.facts['library']}"
        with contextlib.suppress(PackageNotFoundError):
            has = version("llama-cpp-python")
            detail = f"llama-cpp-python {has} {detail}"
            wants = [need for need in requires("metaalign-edge") or [] if need.startswith("llama-cpp-python==")]
            if wants and wants != [f"llama-cpp-python=={has}"]:
                return "warning", f"{detail}; this program was written for another: pip install {wants[0]}"
        return "ok", detail

    def devices(self) -> Finding:
        """Look at the devices that layers can go to."""
        if self.facts is None:
            return "warning", "not known, as llama.cpp does not load"
        found = self.gpus()
        if found:
            each = (
                f"{one.name} ({one.description}), {in_bytes(one.free)} of {in_bytes(one.total)} free" for one in found
            )
            return "ok", "; ".join(each)
        if self.facts["offloads"]:
            return "warning", "none, though this build of llama.cpp has a backend for one: look at the driver"
        if there := unused_gpu():
            name, flag = there
            how = f'CMAKE_ARGS="-DLLAVA_BUILD=OFF -D{flag}=on" {REINSTALL}'
            return "warning", f"the CPU alone, though there is {name}: {how}"
        return "ok", "the CPU alone: this build of llama.cpp has no GPU"

    def gpus(self) -> list[Device]:
        """Return the devices that layers can go to; none if llama.cpp does not load."""
        facts = self.facts or {"offloads": False}
        return memory.usable([Device(*one) for one in facts["devices"]]) if facts["offloads"] else []

    def processor(self) -> Finding:
        """Look at what the processor can do, and what of it llama.cpp was built for."""
        cores = f"{library.physical_cores()} cores"
        flags: set[str] = set()
        with contextlib.suppress(OSError):  # not Linux
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
        has = {name for name, flag in FEATURES.items() if flag in flags}
        if self.facts is None:
            return "ok", f"{cores}; it has {', '.join(sorted(has)) or 'features that are not known'}"
        built = set(re.findall(r"(\w+) = 1", self.facts["features"]))
        detail = f"{cores}; llama.cpp is built for {', '.join(sorted(built & FEATURES.keys())) or 'any processor'}"
        unused = [name for name in sorted(has - built) if name in MATTERS]
        if flags and (lacking := sorted((built & FEATURES.keys()) - has)):
            return "warning", f"{detail}, but the processor lacks {', '.join(lacking)}: {REINSTALL}"
        if unused:
            return "warning", f"{detail}, not for {', '.join(unused)} that the processor has: {REINSTALL}"
        return "ok", detail

    def memory(self) -> Finding:
        """Look at the main memory."""
        limits = memory.memory_limits()
        said = [f"{in_bytes(count)} {what}" for what, count in limits.items()]
        said += [f"{in_bytes(memory.physical_memory())} in all"] if memory.physical_memory() < math.inf else []
        return "ok", ", ".join(said) or "this system does not say"

    def metadata(self) -> Finding:
        """Look at the model's file."""
        self.file = models.open_model(models.local_model(self.model))
        footprint = Footprint.of(self.file)
        size = in_bytes(sum(footprint.weights) + footprint.embedding)
        known = f"{self.file.architecture}, {size} of weights, {self.file.context:,} tokens of context"
        return "ok", f"{self.file.path}: {known}"

    def template(self) -> Finding:
        """Look whether the model's template renders a dialog with all three tiers."""
        file = self.loaded()
        if not file.templates:
            return "warning", "the model carries none: give one with --template"
        chosen = edge.choose_template("auto", file)
        edge.render(PROBE, chosen)
        return "ok", f"{chosen.name}, {'native' if chosen.native else 'wrapped'}: {chosen.why}; all three tiers render"

    def loaded(self) -> ModelFile:
        """Return the model's file.

        Raises:
            EdgeError: it cannot be read.
        """
        if self.file is None:
            raise EdgeError("not tried, as there is no model")
        return self.file

    def first_token(self) -> Finding:
        """Look whether the model loads, takes a dialog and says something."""
        path = str(self.loaded().path.absolute())
        if self.facts is None:
            return "warning", "not tried, as llama.cpp does not load"
        found = trial.in_child(MODEL_SECONDS, "model", path, self.settings.gpu_layers, self.settings.threads)
        wrong = any(line.startswith("warning: ") for line in found)
        return "warning" if wrong else "ok", "; ".join(found).replace("warning: ", "")

    def fit(self) -> Finding:
        """Look whether the model fits the memory, and how much context does."""
        file = self.loaded()
        plan = edge.plan_for(file, self.settings, self.gpus())
        plan.check(file.path)
        detail = f"{plan}; -c auto would take {plan.largest(file.context):,}" if plan.footprint.foretold else str(plan)
        detail += f"; {plan.offloaded} of {len(plan.places)} layers on the GPU" if plan.offloaded else ""
        if plan.crawls:
            again = "the weights are read from the disk again and again: take a smaller quantisation"
            return "warning", f"{detail}: {again}"
        return "ok", detail if plan.footprint.foretold else f"{detail}; what its cache takes is not foretold"

    def cache(self) -> Finding:
        """Look at the states of meta-prompts on the disk."""
        status, detail = self.folder(files.cache_folder(), "METAALIGN_EDGE_CACHE")
        states = States()
        kept = states.files()
        held = f"{in_bytes(sum(file.bytes for file in kept))} of {in_bytes(states.most)}"
        hits = counted(sum(file.hits for file in kept), "hit")
        return status, f"{detail}; {counted(len(kept), 'state')}, {held}, {hits}"

    def config(self) -> Finding:
        """Look at the settings and their folder."""
        self.check_settings()
        return self.folder(files.config_folder(), "METAALIGN_EDGE_CONFIG")

    @staticmethod
    def folder(folder: Path, variable: str) -> Finding:
        """Look whether a folder can be written, or made."""
        import tempfile

        there, free = files.room_at(folder)
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            return "warning", f"{folder}: {error.strerror}: nothing is kept there; {variable} names another"
        size = f"{in_bytes(free)} free"
        return "ok", f"{folder}, {size}" if there == folder else f"{folder}, to be made; {size}"

    @staticmethod
    def terminal() -> Finding:
        """Look at where the answers go."""
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

    def hub(self) -> Finding:
        """Look whether the hub can be reached, if that may be asked."""
        if hub.is_offline(False):
            return "ok", "offline, as HF_HUB_OFFLINE says: nothing is fetched"
        return (
            ask_hub(hub.hub_address()) if self.network else ("ok", f"{hub.hub_address()}, not asked (--network asks)")
        )


def ask_hub(endpoint: str) -> Finding:
    """Send the hub one request, and say what it answers.

    Raises:
        EdgeError: it cannot be reached.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    if not endpoint.startswith(("http://", "https://")):
        raise EdgeError(f"HF_ENDPOINT={endpoint} is no address of a hub")
    stay = HTTPRedirectHandler()
    stay.redirect_request = lambda *_: None  # type: ignore[method-assign]  # another place would be another request
    started, status = time.perf_counter(), 200
    try:
        build_opener(stay).open(Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError as error:
        status = error.code
    except (OSError, HTTPException) as error:
        raise EdgeError(f"{endpoint} cannot be reached: {one_line(getattr(error, 'reason', error))}") from None
    spent = 1000 * (time.perf_counter() - started)
    level: Status = "ok" if status < 400 else "warning" if status < 500 else "failed"
    return level, f"{endpoint} answers {status} in {spent:.0f} ms"


def unused_gpu() -> tuple[str, str] | None:
    """Name a GPU that this machine seems to have, and the flag that builds llama.cpp for it."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "an NVIDIA GPU", "GGML_CUDA"
    if Path("/dev/kfd").exists():
        return "an AMD GPU", "GGML_HIP"
    return ("Metal", "GGML_METAL") if sys.platform == "darwin" else None


def check_lines(check: Check, width: int, columns: int | None) -> str:
    """Lay a check out as a line, or as the lines of a terminal of so many columns. width: of the longest name."""
    head = f"{check.status:<7}  {check.name:<{width}}  "
    if columns is None:
        return f"{head}{check.detail}\n"
    import textwrap

    options: dict[str, Any] = {"width": columns, "break_long_words": False, "break_on_hyphens": False}
    if columns < len(head) + COLUMN:
        detail = textwrap.fill(check.detail, initial_indent="  ", subsequent_indent="  ", **options)
        return f"{head.rstrip()}\n{detail}\n"
    return textwrap.fill(check.detail, initial_indent=head, subsequent_indent=" " * len(head), **options) + "\n"
