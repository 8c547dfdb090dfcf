"""The topics of `help`: a page of docs/ each, in Markdown."""

from __future__ import annotations

import re
from typing import NamedTuple

from . import files


class Topic(NamedTuple):
    """A page: its heading, and the text below it, in Markdown."""

    heading: str
    text: str


def topics() -> dict[str, Topic]:
    """Return the topics by name, in alphabetical order."""
    pages = sorted(files.package_folder("docs").glob("*.md"))
    return {page.stem: read_page(page.read_text(encoding="utf-8")) for page in pages}


def read_page(page: str) -> Topic:
    """Return a page as `help` shows it: a link to another page names its topic, one to a file that file's path."""
    heading, _, text = page.partition("\n")
    text = re.sub(r"<!--.*?-->\n", "", text)
    text = re.sub(r"\[([^]]+)\]\(([\w-]+)\.md\)", r"\1 (help \2)", text)
    text = re.sub(r"\[([^]]+)\]\((?:\.\./)+([^)]+)\)", r"\1 (\2)", text)
    return Topic(heading.removeprefix("# "), text.strip("\n"))
