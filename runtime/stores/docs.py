"""The topics that `help` explains."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import NotFound


def topics() -> dict[str, tuple[str, str]]:
    """Return the heading and the text of each topic: the README's sections that say so.

    Raises:
        NotFound: the README is neither beside this file nor in what is installed.
    """
    import importlib.metadata

    path = Path(__file__).resolve().parents[2] / "README.md"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        text = text or importlib.metadata.distribution("metaalign-edge").read_text("METADATA") or ""
    except (OSError, importlib.metadata.PackageNotFoundError):
        raise NotFound("the README is not installed: read it where this program comes from") from None
    found = {}
    for name, level, heading in re.findall(r"^<!-- topic: (.+) -->\n(#+) (.+)$", text, re.MULTILINE):
        section = text.partition(f"\n{level} {heading}\n")[2]
        section = re.split(rf"^#{{1,{len(level)}}} ", section, maxsplit=1, flags=re.MULTILINE)[0]
        found[name] = heading, re.sub(r"<!--.*?-->\n|</?sub>", "", section).strip("\n")
    return found
