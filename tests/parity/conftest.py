"""The reference: llama.cpp's own converter, out of the source package of the installed llama-cpp-python."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # for checkpoints.py
PACKAGE = "llama-cpp-python"
CACHE = Path(__file__).parent.parent.parent / ".cache"
DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf
exec(sys.argv[2])
for source, output, outtype in json.load(sys.stdin):
    sys.argv = ["convert", source, "--outfile", output, "--outtype", outtype]
    convert_hf_to_gguf.main()
"""


class Reference:
    """llama.cpp's source tree."""

    def __init__(self, root: Path) -> None:
        """Take the folder of the unpacked source package."""
        self.llama_cpp = root / "vendor" / "llama.cpp"

    def convert(self, jobs: list[tuple[Path, Path, str]], setup: str = "") -> None:
        """Convert (source, output, outtype) after one another in one process, for torch is slow to load.

        setup: Python to run first.
        """
        command = [sys.executable, "-c", DRIVER, str(self.llama_cpp), setup]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        text = json.dumps([[str(source), str(output), outtype] for source, output, outtype in jobs])
        done = subprocess.run(command, input=text, text=True, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    def vocabulary(self, name: str) -> Path:
        """Return one of the vocabularies of real models that llama.cpp tests with."""
        return self.llama_cpp / "models" / f"ggml-vocab-{name}.gguf"


@pytest.fixture(scope="session")
def reference() -> Reference:
    """Find the source package: where METAALIGN_EDGE_REFERENCE says, else download the one of the installed version."""
    named = os.environ.get("METAALIGN_EDGE_REFERENCE")
    if named:
        return Reference(Path(named))
    version = importlib.metadata.version(PACKAGE)
    root = CACHE / f"{PACKAGE.replace('-', '_')}-{version}"
    if not root.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as own:  # another worker may be at the same
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "-d", own]
            subprocess.run([*command, f"{PACKAGE}=={version}"], check=True)
            with tarfile.open(Path(own, root.name + ".tar.gz")) as archive:
                archive.extractall(own, filter="data")
            with contextlib.suppress(OSError):
                Path(own, root.name).rename(root)  # only when it is whole, and the first
    return Reference(root)
