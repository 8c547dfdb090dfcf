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

from ..errors import CONTROLS, LoadError, one_line
from . import memory
from .interrupt import Interrupt
from .memory import Device

if TYPE_CHECKING:
    from typing_extensions import Self


SET_TERMINATE = "_ZSt13set_terminatePFvvE"  # std::set_terminate, as compilers name it on Linux and macOS
is_program = False  # set by `main`: this process is the command line, not a host program that imports us


STARTING = threading.RLock()  # held while llama.cpp is imported and its log taken over


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
        found = self.found()
        if self._error:
            raise self._error
        return found

    def found(self) -> Any:
        """Wait until the work is done; return its result, None if it failed."""
        self._thread.join()
        if self._awaited and is_program:
            Background._busy -= 1
            if not Background._busy:
                sys.setswitchinterval(Background._usual)
        self._awaited = False
        return self._found


_computed_in = 0  # the id of the process in which llama.cpp first computed


def computed(work: Callable[[], int]) -> int:
    """Compute with llama.cpp's threads; return its status.

    OpenMP, in most builds, keeps threads for each thread that calls it, and waits for ever for those that a fork has
    left in the parent. So in a child of a process that has computed another thread does it, which gets threads anew.
    """
    global _computed_in
    _computed_in = _computed_in or os.getpid()
    return work() if _computed_in == os.getpid() else int(Background(work).result())


class Closing:
    """A base class of context managers that are closed at the end of their `with`."""

    def close(self) -> None:
        """Release the resources; subclasses override this."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Line(threading.local):
    """What a thread has of llama.cpp's log: models that load at the same time each log in a thread of their own."""

    def __init__(self) -> None:
        self.level = 0  # of the current line, which may come in several parts
        self.errors: list[str] = []  # lines since the last call of `reason`


class Log:
    """llama.cpp's log: shown with -vv; each thread's last errors are kept to explain a failed load."""

    def __init__(self) -> None:
        self.verbose = False
        self._own = Line()
        self._metadata: set[str] = set()  # lines about a file's metadata, shown once
        self._callback: Any = None
        self._last: tuple[Any, ...] = ()  # callbacks that llama.cpp keeps pointers to

    @property
    def errors(self) -> list[str]:
        """The errors that llama.cpp has logged in this thread since the last call of `reason`."""
        return self._own.errors

    def attach(self, verbose: bool) -> None:
        """Take over llama.cpp's log. Each start repeats this: importing llama-cpp-python as a whole takes it away."""
        llama, self.verbose = llama_cpp(), verbose
        self._metadata.clear()
        self._callback = self._callback or llama.llama_log_callback(self._write)
        llama.llama_log_set(self._callback, None)
        if is_program and not self._last:
            self._last = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._give_up), ctypes.CFUNCTYPE(None)(self._terminate)
            ggml_library("ggml-base").ggml_set_abort_callback(self._last[0])
            with contextlib.suppress(AttributeError):  # a C++ library of another kind, as on Windows
                llama._lib[SET_TERMINATE](self._last[1])

    @staticmethod
    def _terminate() -> None:
        """Take the place of C++'s handler of exceptions that nobody catches."""
        Log._give_up(b"llama.cpp: an exception that it does not catch")

    @staticmethod
    def _give_up(message: bytes) -> None:
        """Write one line on why llama.cpp aborts, instead of its page of addresses, and end the process."""
        where, _, what = message.decode("utf-8", "replace").partition(": ")
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(
                f"metaalign-edge: llama.cpp gave up: {one_line(what)} ({PurePath(where).name}): a model with which it "
                "always does is damaged: download or convert it again\n"
            )
            sys.stderr.flush()
        Interrupt.leave(LoadError.exit_code)

    def _write(self, level: int, text: bytes, _: Any) -> None:
        line, own = text.decode("utf-8", "replace"), self._own
        own.level = level if level != 5 else own.level  # GGML_LOG_LEVEL_CONT
        if level == 4 and line.strip():  # GGML_LOG_LEVEL_ERROR
            own.errors.append(one_line(line).removeprefix("llama_model_load: ").removeprefix("error loading model: "))
        if line.startswith("llama_model_loader: "):  # logged for the vocabulary and again for the weights
            if line in self._metadata:
                return
            self._metadata.add(line)
        if self.verbose and own.level != 1:  # GGML_LOG_LEVEL_DEBUG: a thousand lines
            sys.stderr.write(line.translate(CONTROLS))

    def reason(self) -> str:
        """Return and forget the first error in this thread since the last call."""
        errors, self._own.errors = self._own.errors, []
        return errors[0] if errors else "llama.cpp gives no reason"


LOG = Log()


def llama_cpp() -> Any:
    """Import the low-level interface and start llama.cpp's backends. Threads that ask at the same time wait.

    Raises:
        LoadError: llama-cpp-python is missing or does not run on this machine.
    """
    with STARTING:
        return _llama_cpp()


@functools.cache
def _llama_cpp() -> Any:
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
    with STARTING:
        llama = llama_cpp()
        LOG.attach(verbose)
        LOG.errors.clear()
        llama.llama_backend_init()
        return llama


def load_file(path: str | Path, params: Any, name: str = "") -> Any:
    """Load a model's file; return llama.cpp's pointer.

    Args:
        name: what an error calls the file; by default its path.

    Raises:
        LoadError: llama.cpp refuses it, with the reason that it logs in this thread.
    """
    LOG.errors.clear()
    if not (pointer := llama_cpp().llama_model_load_from_file(os.fsencode(path), params)):
        raise LoadError(f"cannot load {name or path}: {LOG.reason()}")
    return pointer


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
    return bool(_llama_cpp.cache_info().currsize and llama_cpp().llama_supports_gpu_offload())


def gpus() -> list[Device]:
    """List the devices that layers can go to."""
    return memory.usable(devices()) if llama_cpp().llama_supports_gpu_offload() else []
