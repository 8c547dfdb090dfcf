"""The syntax tree of a chat template, by Jinja's own parser, set up as transformers sets it up."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, nodes
from jinja2.ext import Extension, loopcontrols


class Generation(Extension):
    """The tag {% generation %}, by which transformers marks what is trained: passed through."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: Any) -> Any:
        """Return the statements between the tags."""
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> Environment:
    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])


def parse(source: str) -> nodes.Template:
    """Parse a template."""
    return _environment().parse(source)


def walk(tree: nodes.Node) -> Iterator[nodes.Node]:
    """Yield all nodes of a tree, however deep it is."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        waiting.extend(node.iter_child_nodes())


def names_in(tree: nodes.Node) -> set[str]:
    """Return the names that a template uses, as variables or as texts."""
    found = [getattr(node, "name" if isinstance(node, nodes.Name) else "value", None) for node in walk(tree)
             if isinstance(node, nodes.Name | nodes.Const)]  # fmt: skip
    return {one for one in found if isinstance(one, str)}
