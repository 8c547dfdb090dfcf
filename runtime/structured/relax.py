"""Relaxing a schema: keywords that llguidance cannot follow are left out of the mask, and listed.

The relaxed schema allows every answer that the original allows, with properties in the schema's order. It may allow
more; the final check refuses such answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .check import format_keywords, is_known
from .mask import refusal
from .numbers import BOUNDS, bounds, factors, fit_together, is_exact, is_leaky, nearest
from .patterns import rust_pattern
from .reach import IN_PLACE, Node, Reached

UNSAID = (  # keywords that llguidance cannot express
    "not if uniqueItems contains propertyNames dependentRequired dependentSchemas dependencies "
    "unevaluatedItems unevaluatedProperties $dynamicRef $recursiveRef"
).split()
IDLE = "then else minContains maxContains $dynamicAnchor $recursiveAnchor $vocabulary contentSchema x-guidance".split()
NOTHING = {"uniqueItems": False, "propertyNames": True, "unevaluatedItems": True, "unevaluatedProperties": True}
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
TRIED = (
    1 << 20
)  # characters that llguidance reads while it is tried which keywords it can follow, of all tries together
RISKY = ("$ref", "allOf", "pattern", *BOUNDS, "multipleOf", *COUNTS, "patternProperties", "oneOf")


def relax(root: Node, where: str) -> tuple[Node, tuple[str, ...]]:
    """Change a schema in place so that llguidance can follow it; return it and the left out keywords with their places.

    Raises:
        UsageError: no answer can fit the schema, or llguidance cannot follow it however much is left out.
    """
    relaxed = _Relaxed(Reached(root, where))
    dialect = relaxed.reached.kind.META_SCHEMA["$schema"].rstrip("#")
    if root.get("$schema", dialect).rstrip("#") != dialect:
        relaxed.leave(root, "$schema")  # jsonschema does not know this draft, and takes the newest
    for key, node in relaxed.reached.nodes.items():
        relaxed.ease(node, relaxed.reached.places[key])
    _Settled(relaxed).settle()
    return root, tuple(dict.fromkeys(relaxed.named))


class _Relaxed:
    """The first pass: leaves out keywords that llguidance lacks or reads differently, in one subschema at a time."""

    def __init__(self, reached: Reached) -> None:
        self.reached = reached
        self.named: list[str] = []
        nodes = reached.nodes.values()
        self._ends = [node[keyword] for node in nodes for keyword in BOUNDS if keyword in node]
        self._factors = fit_together([node["multipleOf"] for node in nodes if "multipleOf" in node])
        self._old = "$vocabulary" not in reached.kind.META_SCHEMA  # drafts up to 7, where $ref stands alone

    def leave(self, node: Node, keyword: str) -> None:
        """Leave a keyword out of a subschema, and list it."""
        at = self.reached.places[id(node)] or "/"
        about = f"{keyword} {node[keyword]!r}" if keyword == "format" else keyword
        self.named.append(f"{about} at {at}")
        del node[keyword]
        if keyword == "patternProperties" and node.get("additionalProperties", True) is not True:
            self.leave(node, "additionalProperties")  # it applies to names without a matching pattern

    def ease(self, node: Node, at: str) -> None:
        """Rewrite the keywords of a subschema for llguidance."""
        if "$ref" in node and self._old:
            for keyword in node.keys() - {"$ref", "$schema", "$defs", "definitions"}:
                del node[keyword]
        if self.reached.targets.get(id(node), True) is None:
            self.leave(node, "$ref")
        self._close(node)
        for keyword in UNSAID:
            if keyword in node and node[keyword] == NOTHING.get(keyword):
                del node[keyword]
            elif keyword in node:
                self.leave(node, keyword)
        for keyword in IDLE:
            node.pop(keyword, None)
        for keyword in COUNTS:
            if keyword in node:
                node[keyword] = int(node[keyword])
        open_ended = node.get("additionalProperties", True) is not False or "patternProperties" in node
        if open_ended and node.get("minProperties", 0) > len(node.get("required", ())):
            self.named.append(f"minProperties at {at or '/'}")  # the mask counts a repeated name twice
        self._numbers(node)
        self._strings(node)

    def _close(self, node: Node) -> None:
        """Replace "unevaluated…" keywords by "additionalProperties" and "items" where these mean the same."""
        if node.keys() & {*IN_PLACE, "$ref", "$dynamicRef", "$recursiveRef", "if", "dependentSchemas", "contains"}:
            return
        for keyword, plain in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
            if isinstance(node.get(keyword), bool) and plain not in node:
                node[plain] = node.pop(keyword)

    def _numbers(self, node: Node) -> None:
        for plain, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if node.get(exclusive) is True:  # draft 4
                node[exclusive] = node.pop(plain)
            elif node.get(exclusive) is False:
                del node[exclusive]
        for keyword in ("const", "enum"):
            if keyword in node and not is_exact(node[keyword]):
                self.leave(node, keyword)
        for keyword in BOUNDS:
            if keyword in node:
                self._loosen(node, keyword, node[keyword])
        for keyword in BOUNDS if node.get("type") != "integer" else ():
            if keyword in node:
                self._either(node, keyword, bounds(keyword, node[keyword]))
        if "multipleOf" in node:
            self._either(node, "multipleOf", factors(node["multipleOf"]) if self._factors else [])

    def _loosen(self, node: Node, keyword: str, value: float) -> None:
        """Replace a bound that llguidance would misread by the nearest looser bound, if there is one."""
        plain = keyword.removeprefix("exclusive").lower()
        seen = nearest(plain, value)
        if seen != value or (keyword != plain and (not is_exact(value) or is_leaky(keyword, value, self._ends))):
            self.leave(node, keyword)
            if seen is not None:
                node.setdefault(plain, seen)

    def _either(self, node: Node, keyword: str, options: list[Node]) -> None:
        """Replace a keyword by alternatives, of which any may hold; without alternatives, leave it out."""
        if not options:
            self.leave(node, keyword)
        elif len(options) > 1:
            del node[keyword]
            node["allOf"] = [*node.get("allOf", ()), {"anyOf": options}]

    def _strings(self, node: Node) -> None:
        if "pattern" in node:
            node["pattern"] = rust_pattern(node["pattern"])
            if not is_known(pattern=node["pattern"]):
                self.leave(node, "pattern")
        if "patternProperties" in node:
            node["patternProperties"] = {rust_pattern(key): part for key, part in node["patternProperties"].items()}
            if not all(is_known(pattern=pattern) for pattern in node["patternProperties"]):
                self.leave(node, "patternProperties")
        if "format" not in node:
            return
        said = format_keywords(node["format"])
        if "string" not in node.get("type", "string"):
            del node["format"]
        elif "allOf" in said:
            del node["format"]
            node["allOf"] = [*node.get("allOf", ()), *said["allOf"]]
        elif not is_known(**said):
            self.leave(node, "format")


class _Settled:
    """The second pass: leaves out as few keywords as possible that llguidance cannot combine, found by bisection."""

    def __init__(self, relaxed: _Relaxed) -> None:
        self._relaxed, self._reached = relaxed, relaxed.reached
        self._whole = {key: dict(node) for key, node in self._reached.nodes.items()}
        self._out: dict[int, set[str]] = {key: set() for key in self._whole}
        self._tries = 0  # that are left

    def settle(self) -> None:
        """Leave out keywords until llguidance can follow the schema.

        Raises:
            UsageError: no answer can fit the schema, or llguidance cannot follow it however much is left out.
        """
        if not self._refusal():
            return
        self._tries = max(8, TRIED // len(json.dumps(self._reached.root)))
        spots = [(key, keyword) for keyword in RISKY for key, node in self._whole.items() if keyword in node]
        self._put(spots, out=True)
        if reason := self._refusal():
            raise self._reached.refusal(f"llguidance cannot follow it: {reason[:200]}: make it simpler")
        self._restore(spots)

    def _refusal(self) -> str:
        reason = refusal(self._reached.root)
        if "Unsatisfiable schema" in reason:
            names = re.findall(r"required property '(.*?)' is unsatisfiable", reason)
            why = "" if names else ": " + reason.partition("Unsatisfiable schema: ")[2][:200]
            raise self._reached.refusal(f"nothing fits /{'/'.join(names)}{why}")
        return reason

    def _put(self, spots: Sequence[tuple[int, str]], out: bool) -> None:
        """Leave keywords out, or put them back. A `oneOf` that is left out becomes `anyOf`."""
        for key, keyword in spots:
            (self._out[key].add if out else self._out[key].discard)(keyword)
            node, whole, left = self._reached.nodes[key], self._whole[key], self._out[key]
            node.clear()
            for name, value in whole.items():
                if name == "oneOf" and name in left:
                    node.setdefault("anyOf", whole.get("anyOf", value))
                elif name not in left and not (name == "additionalProperties" and "patternProperties" in left):
                    node[name] = value

    def _restore(self, spots: Sequence[tuple[int, str]]) -> None:
        """Put back the keywords that llguidance can follow, and list the others: all, once there were tries enough."""
        self._tries -= 1
        if self._tries > 0:
            self._put(spots, out=False)
            if not self._refusal():
                return
            self._put(spots, out=True)
        if len(spots) > 1:
            self._restore(spots[: len(spots) // 2])
            self._restore(spots[len(spots) // 2 :])
        elif not self._are_apart(*spots[0]):
            key, keyword = spots[0]
            named = [keyword]
            if keyword == "patternProperties" and self._whole[key].get("additionalProperties", True) is not True:
                named.append("additionalProperties")
            self._relaxed.named += [f"{name} at {self._reached.places[key] or '/'}" for name in named]

    def _are_apart(self, key: int, keyword: str) -> bool:
        """Tell whether no value fits two options of a `oneOf`; llguidance sees this only if `$ref`s are resolved."""
        if keyword != "oneOf" or self._tries <= 0:
            return False
        options = self._whole[key]["oneOf"]
        self._whole[key]["oneOf"] = [self._followed(option) for option in options]
        self._put([(key, keyword)], out=False)
        apart = not self._refusal()
        self._whole[key]["oneOf"] = options
        self._put([(key, keyword)], out=True)
        return apart

    def _followed(self, option: Any) -> Any:
        """Return the schema that a chain of references leads to."""
        while self._whole.get(id(option), {}).keys() == {"$ref"}:
            option = self._reached.targets[id(option)]
        return option
