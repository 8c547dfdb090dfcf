"""The subschemas that apply to an answer: their places, the targets of their `$ref`s, and whether an answer can end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import UsageError
from .check import REFERENCES, draft, pattern_fault

Node = dict[str, Any]  # a schema that is an object

IN_PLACE = ("allOf", "anyOf", "oneOf")
ASIDE = ("not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
NAMED = ("$defs", "definitions", "dependentSchemas", "dependencies")


def members(schema: Node) -> Iterator[tuple[str, Any]]:
    """Yield the subschemas of properties and items, each with the place of its value, e.g. `/name`."""
    for keyword in ("properties", "patternProperties"):
        for name, part in schema.get(keyword, {}).items():
            yield f"/{name}", part
    for keyword, place in (("additionalProperties", "/*"), ("additionalItems", "/items"), ("items", "/items")):
        if not isinstance(schema.get(keyword), list):
            yield place, schema.get(keyword)
    for keyword in ("prefixItems", "items"):
        if isinstance(schema.get(keyword), list):
            yield from ((f"/{place}", part) for place, part in enumerate(schema[keyword]))


def others(schema: Node) -> Iterator[tuple[str, Any]]:
    """Yield all other subschemas with their places: "" if they apply to the same value, else their keyword."""
    for keyword in IN_PLACE:
        yield from (("", part) for part in schema.get(keyword, ()))
    for keyword in ASIDE:
        yield f"/{keyword}", schema.get(keyword)
    for keyword in NAMED:
        yield from ((f"/{keyword}/{name}", part) for name, part in schema.get(keyword, {}).items())


class Reached:
    """A schema with the subschemas that can apply to a part of an answer.

    Args:
        root: the schema.
        where: the schema's name in error messages.

    Attributes:
        nodes: the subschemas that can apply, by `id()`.
        places: the place in an answer where each applies, by the subschema's `id()`.
        targets: the target of each subschema's `$ref`, by its `id()`; None if the target is outside of this document.

    Raises:
        UsageError: a reference has no target, a pattern is no regular expression, or no answer is ever complete.
    """

    def __init__(self, root: Node, where: str) -> None:
        self.root, self.where = root, where
        self.kind = draft(root)
        self.nodes: dict[int, Node] = {}
        self.places: dict[int, str] = {}
        self.targets: dict[int, Any] = {}
        self._own: set[int] = set()
        self._loops: list[str] = []
        self._look_up()
        queue: list[tuple[Any, str]] = [(root, "")]
        while queue:
            self._enter(*queue.pop(0), (), queue)
        self._check_finite()

    def refusal(self, reason: str) -> UsageError:
        """Return an error with the reason why the schema cannot be used."""
        return UsageError(f"{self.where} cannot be used: {reason}")

    # -- references ---------------------------------------------------------------------------------------------------

    def _look_up(self) -> None:
        """Resolve the references and check the patterns of the whole document."""
        from jsonschema_specifications import REGISTRY
        from referencing.jsonschema import specification_with

        specification = specification_with(self.kind.META_SCHEMA["$schema"])
        resource = specification.create_resource(self.root)
        registry = REGISTRY.with_resource(resource.id() or "", resource)
        waiting = [(self.root, "", registry.resolver_with_root(resource))]
        while waiting:
            schema, at, resolver = waiting.pop()
            if not isinstance(schema, dict):
                continue
            self._own.add(id(schema))
            resolver = resolver.in_subresource(specification.create_resource(schema))
            self._resolve(schema, at, resolver)
            self._check_patterns(schema, at)
            waiting += [(part, at + place, resolver) for place, part in (*members(schema), *others(schema))]
        self.targets = {
            node: target if isinstance(target, bool) or id(target) in self._own else None
            for node, target in self.targets.items()
        }

    def _resolve(self, schema: Node, at: str, resolver: Any) -> None:
        from referencing.exceptions import Unresolvable

        for keyword in REFERENCES:
            reference = schema.get(keyword)
            if not isinstance(reference, str):
                continue
            try:
                target = resolver.lookup(reference).contents
            except (Unresolvable, ValueError):
                hint = "which is not there"
                if not reference.startswith("#"):
                    hint += ", and nothing is fetched: copy it into $defs, and refer to that"
                raise self.refusal(f"{at or '/'} refers to {reference!r} ({keyword}), {hint}") from None
            if keyword == "$ref":
                self.targets[id(schema)] = target

    def _check_patterns(self, schema: Node, at: str) -> None:
        for pattern in [*filter(None, [schema.get("pattern")]), *schema.get("patternProperties", ())]:
            if reason := pattern_fault(pattern):
                raise self.refusal(f"{at}/pattern: {pattern!r} is no regular expression: {reason}")

    # -- subschemas that apply to an answer ---------------------------------------------------------------------------

    def _enter(self, schema: Any, at: str, inside: tuple[int, ...], queue: list[tuple[Any, str]]) -> None:
        """Record a subschema and those that apply to the same value; queue those of its properties and items."""
        key = id(schema)
        if key in inside:
            self._loops.append(at or "/")
        if not isinstance(schema, dict) or key in self.places:
            return
        self.nodes[key], self.places[key] = schema, at
        in_place = [self.targets.get(key), *(part for keyword in IN_PLACE for part in schema.get(keyword, ()))]
        for part in in_place:
            self._enter(part, at, (*inside, key), queue)
        queue += [(part, at + place) for place, part in members(schema)]

    def _check_finite(self) -> None:
        finite: set[int] = set()
        while more := [key for key, node in self.nodes.items() if key not in finite and self._ends(node, finite)]:
            finite.update(more)
        if id(self.root) not in finite:
            raise self.refusal("no answer to it is ever complete: something requires itself")
        if self._loops:
            raise self.refusal(f"{self._loops[0]} refers to itself without end")

    def _ends(self, schema: Node, finite: set[int]) -> bool:
        """Tell whether a subschema has a finite value, given that the subschemas in `finite` (by `id()`) have one."""

        def ends(part: Any) -> bool:
            return not isinstance(part, dict) or id(part) in finite

        together = [self.targets.get(id(schema)), *schema.get("allOf", ())]
        if schema.get("type") in ("object", ["object"]):
            together += [schema.get("properties", {}).get(name) for name in schema.get("required", ())]
        if schema.get("type") in ("array", ["array"]):
            items = schema.get("items")
            several = items if isinstance(items, list) else [*schema.get("prefixItems", ()), items]
            together += several[: int(schema.get("minItems", 0))]
        either = [schema[keyword] for keyword in ("anyOf", "oneOf") if keyword in schema]
        return all(map(ends, together)) and all(any(map(ends, options)) for options in either)
