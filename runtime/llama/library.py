"""llama.cpp's library through llama-cpp-python's low-level interface: its log, its build, its devices."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path, PurePath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import LoadError, one_line, say, write_log
from . import memory
from .interrupt import Interrupt
from .memory import Device

if TYPE_CHECKING:
    from typing_extensions import Self


is_program = False  # set by `main`: this process is the command line, not a host program that imports us


class Background:
    """Work that another thread does, mostly in C code. It begins at once."""

    _busy, _usual = 0, 0.0  # the number of running instances, and the switch interval in seconds before the first

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._awaited = work, True
        self._found: Any = None
        self._error: BaseException | None = None
        if is_program:  # a host program's switch interval is not ours to change
            if not Background._busy:
                Background._usual = sys.getswitchinterval()
            Background._busy += 1
            sys.setswitchinterval(1e-5)  # seconds; at each logged line llama.cpp waits that long for the other thread
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._work()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        """Wait until the work is done; return its result, or raise its exception."""
        self._thread.join()
        if self._awaited and is_program:
            Background._busy -= 1
            if not Background._busy:
                sys.setswitchinterval(Background._usual)
        self._awaited = False
        if self._error:
            raise self._error
        return self._found


class Closing:
    """A base class of context managers that are closed at the end of their `with`."""

    def close(self) -> None:
        """Release the resources; subclasses override this."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Log:
    """llama.cpp's log: shown with -vv; its last errors are kept to explain a failed load."""

    def __init__(self) -> None:
        self.verbose = False
        self.level = 0  # level of the current line, which may come in several parts
        self.errors: list[str] = []
        self._metadata: set[str] = set()  # lines about a file's metadata, shown once
        self._callback: Any = None
        self._last: Any = None

    def attach(self, verbose: bool) -> None:
        """Take over llama.cpp's log. Each start repeats this: importing llama-cpp-python as a whole takes it away."""
        llama, self.verbose = llama_cpp(), verbose
        self._metadata.clear()
        self._callback = self._callback or llama.llama_log_callback(self._write)
        llama.llama_log_set(self._callback, None)
        if is_program and not self._last:
            self._last = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._give_up)
            ggml_library("ggml-base").ggml_set_abort_callback(self._last)

    @staticmethod
    def _give_up(message: bytes) -> None:
        """Write one line on why llama.cpp aborts, instead of its page of addresses, and end the process."""
        where, _, what = message.decode("utf-8", "replace").partition(": ")
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            say(
                f"metaalign-edge: llama.cpp gave up: {one_line(what)} ({PurePath(where).name}): a model with which it "
                "always does is damaged: download or convert it again"
            )
        Interrupt.leave(LoadError.exit_code)

    def _write(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace")
        self.level = level if level != 5 else self.level  # GGML_LOG_LEVEL_CONT
        if level == 4 and line.strip():  # GGML_LOG_LEVEL_ERROR
            self.errors.append(one_line(line).removeprefix("llama_model_load: ").removeprefix("error loading model: "))
        if line.startswith("llama_model_loader: "):  # logged for the vocabulary and again for the weights
            if line in self._metadata:
                return
            self._metadata.add(line)
        if self.verbose and self.level != 1:  # GGML_LOG_LEVEL_DEBUG: a thousand lines
            write_log(line)

    def reason(self) -> str:
        """Return and forget the first error since the last call."""
        errors, self.errors = self.errors, []
        return errors[0] if errors else "llama.cpp gives no reason"


LOG = Log()


@functools.cache
def llama_cpp() -> Any:
    """Import the low-level interface and start llama.cpp's backends.

    Raises:
        LoadError: llama-cpp-python is missing or does not run on this machine.
    """
    # The package's __init__ imports numpy and the high-level class, which takes five times as long as the module we
    # need. So an empty package of the same name replaces it while that module is imported.
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise LoadError("llama-cpp-python is not installed: pip install llama-cpp-python")
    stand_in = ModuleType("llama_cpp")
    stand_in.__path__ = list(spec.submodule_search_locations)
    real = sys.modules.get("llama_cpp")
    sys.modules["llama_cpp"] = real or stand_in
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise LoadError(f"llama-cpp-python does not load ({one_line(error)}): reinstall it") from error
    finally:
        if real is None:
            del sys.modules["llama_cpp"]


def start(verbose: bool = False) -> Any:
    """Take over llama.cpp's log, start its backends, and return its low-level interface; repeated calls are harmless.

    Raises:
        LoadError: llama-cpp-python is missing or does not run on this machine.
    """
    llama = llama_cpp()
    LOG.attach(verbose)
    LOG.errors.clear()
    llama.llama_backend_init()
    return llama


def ggml_library(name: str) -> Any:
    """Return one of ggml's libraries, whose functions llama-cpp-python does not bind.

    llama.cpp's own handle finds the functions of the libraries that it is linked with, except on Windows.
    """
    library = llama_cpp()._lib
    if os.name != "nt":
        return library
    return sys.modules["llama_cpp._ctypes_extensions"].load_shared_library(name, Path(library._name).parent)


@functools.cache
def build() -> str:
    """Return a text that identifies this build of llama.cpp and the processor features that it uses."""
    llama = llama_cpp()
    library = Path(llama._lib._name)
    return f"{library}, {library.stat().st_mtime_ns}, {llama.llama_print_system_info().decode('utf-8', 'replace')}"


def physical_cores() -> int:
    """Count the cores this process may use, hyper-threads of one core once: more threads only slow llama.cpp down."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
    siblings = Path("/sys/devices/system/cpu")
    try:
        cores = {(siblings / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in allowed}
    except OSError:
        return len(allowed)
    return len(cores)


def devices() -> list[Device]:
    """List llama.cpp's devices, the CPU among them."""
    registry, base = ggml_library("ggml"), ggml_library("ggml-base")
    registry.ggml_backend_dev_count.restype, registry.ggml_backend_dev_get.restype = ctypes.c_size_t, ctypes.c_void_p
    base.ggml_backend_dev_name.restype = base.ggml_backend_dev_description.restype = ctypes.c_char_p
    found = []
    for number in range(registry.ggml_backend_dev_count()):
        device = ctypes.c_void_p(registry.ggml_backend_dev_get(ctypes.c_size_t(number)))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name, description = base.ggml_backend_dev_name(device), base.ggml_backend_dev_description(device)
        kind = base.ggml_backend_dev_type(device)
        found.append(Device(name.decode(), description.decode("utf-8", "replace"), kind, free.value, total.value))
    return found


def drives_gpu() -> bool:
    """Tell whether llama.cpp runs in this process, and has started a GPU's driver."""
    return bool(llama_cpp.cache_info().currsize and llama_cpp().llama_supports_gpu_offload())


def gpus() -> list[Device]:
    """List the devices that layers can go to."""
    return memory.usable(devices()) if llama_cpp().llama_supports_gpu_offload() else []
