"""Chat templates in a sandbox with a budget, through which the tiers' text is followed.

A GGUF's template is somebody else's program. Jinja's immutable sandbox keeps it from Python's internals; what is added
here bounds what it may spend, and follows the tiers' text through everything it does.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinMethodType, MethodType
from typing import TYPE_CHECKING, Any, cast

from metaalign_edge_runtime.errors import TemplateError, one_line

from .tier_text import TierText, join_text, tier_within

if TYPE_CHECKING:
    import jinja2


BUDGET_STEPS = 300_000  # loop iterations, calls and filters of one rendering; real templates need some thousands
BUDGET_SECONDS = 5.0
BUDGET_TEXT = 1 << 24  # characters of any one string
BUDGET_NODES = 1 << 17  # values in any one list or dict
TEMPLATE_SIZE = 1 << 20  # characters of a template's source
# The filters that chat templates use; each can be bounded. Jinja's others (`center`, `sum`, `batch`, …) are left out: a
# hostile template could spend time or memory with them.
FILTERS = (
    "abs capitalize count d default dictsort e escape first float format indent int items join last length list lower "
    "map max min reject rejectattr replace reverse round safe select selectattr sort string title tojson trim unique "
    "upper"
).split()
EXACT_FILTERS = (
    "capitalize d default first last lower reverse string trim upper".split()
)  # those that are methods of str, which TierText follows exactly
STRING_METHODS = (
    "capitalize count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip title upper zfill"
).split()


class Refusal(Exception):
    """A template called `raise_exception`: it will not render this dialog."""


class TemplateFailure(TemplateError):
    """A template failed on these messages; another shape of message may suit it."""


class OverBudget(Exception):
    """A template spent more than a chat template ever needs."""


class TierSandbox:
    """The part of the sandbox that is ours: budgets, and the tiers' text followed through every operation."""

    rendered: tuple[type, ...]  # kinds of callables (macros, loops) whose result `concat` has written
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])
    steps = 0
    deadline = 0.0

    def begin(self) -> None:
        """Start a rendering with a fresh budget."""
        self.steps, self.deadline = 0, time.monotonic() + BUDGET_SECONDS

    def step(self) -> None:
        """Count one step."""
        self.steps += 1
        if self.steps > BUDGET_STEPS:
            raise OverBudget(f"it takes more than {BUDGET_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise OverBudget(f"it takes more than {BUDGET_SECONDS:g} seconds")

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a template writes, in place of Jinja's own."""
        parts, size = list(parts), 0
        for part in parts:
            size += len(part)
            if size > BUDGET_TEXT:
                raise OverBudget(f"it writes more than {BUDGET_TEXT:,} characters")
        return join_text(parts) if any(isinstance(part, TierText) for part in parts) else "".join(parts)

    def tilde(self, *operands: Any) -> str:
        """Do what the operator `~` does."""
        return self.concat([self.written(operand) for operand in operands])

    def looped(self, iterable: Any) -> Iterator[Any]:
        """Count the iterations of a `for`."""
        for item in iterable:
            self.step()
            yield item

    def bounded(self, value: Any) -> Any:
        """Return a value unchanged if it is of a size that a chat template may need."""
        nodes = size = 0
        waiting = [value]
        while waiting:
            nodes += 1
            item = waiting.pop()
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, int):
                self.allow(item.bit_length(), 4096)
            elif isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                waiting += item
            if size > BUDGET_TEXT or nodes + len(waiting) > BUDGET_NODES:
                raise OverBudget("it builds a value larger than any chat template needs")
        return value

    def allow(self, size: int, most: int = BUDGET_TEXT) -> None:
        """Refuse an operation whose result would have this size."""
        if size > most:
            raise OverBudget("it makes a value larger than any chat template needs")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator; growth is bounded before it happens."""
        self.step()
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "*" and not numbers:
            thing, times = (right, left) if isinstance(left, int) else (left, right)
            self.allow(len(thing) * times, BUDGET_TEXT if isinstance(thing, str) else BUDGET_NODES)
        elif operator == "**" and (not numbers or abs(right) > 64 or abs(left) > 1e6):
            raise OverBudget("it raises a number to a power no chat template needs")
        elif operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple | Mapping) else (right,)
            return self.formatted(left, values, lambda: str(left) % right)
        result = self.binop_table[operator](left, right)  # type: ignore[attr-defined]
        return self.owned(self.bounded(result), [left, right])

    def formatted(self, pattern: str, values: Any, render: Callable[[], str]) -> str:
        """Fill a format string; the tier of any value takes the whole result."""
        self.bounded(values)
        longest = max(map(len, map(str, values.values() if isinstance(values, Mapping) else values)), default=0)
        wide = re.search(r"\d{4}|\*", pattern)
        self.allow(BUDGET_TEXT + 1 if wide else (pattern.count("%") + pattern.count("{")) * longest)
        return cast(str, self.owned(render(), [pattern, values], exact=False))

    def owned(self, result: Any, inputs: Any, exact: bool = True) -> Any:
        """Give a string that was computed from a tier's text to that tier, unless its own spans are `exact`."""
        if not isinstance(result, str) or (exact and isinstance(result, TierText)):
            return result
        tier = tier_within(inputs)
        return TierText.of(str.__str__(result), tier) if tier else result

    def written(self, value: Any) -> str:
        """Turn a value into the text that a template writes of it."""
        return value if isinstance(value, str) else cast(str, self.owned(str(self.bounded(value)), value))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse what the sandbox forbids at once; Jinja would let it pass as an undefined value."""
        raise OverBudget(f"it reaches for {attribute!r} of a {type(obj).__name__}, which no chat template needs")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Replace `str.format` by the sandbox's, with bounds and with the tiers followed."""
        if super().wrap_str_format(value) is None:  # type: ignore[misc]
            return None
        plain = super().wrap_str_format(str.__str__(value.__self__).format)  # type: ignore[misc]

        def fill(*args: Any, **kwargs: Any) -> str:
            return self.formatted(value.__self__, {**dict(enumerate(args)), **kwargs}, lambda: plain(*args, **kwargs))

        return fill

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow on strings only the methods that can be bounded and followed."""
        if isinstance(obj, str) and attr not in STRING_METHODS:
            return False
        return bool(super().is_safe_attribute(obj, attr, value))  # type: ignore[misc]

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the template's, following the tiers through it."""
        self.step()
        owner = getattr(function, "__self__", None)
        if owner is self:  # our own `tilde`, `looped`, `bounded`
            return function(*args)
        if isinstance(function, BuiltinMethodType | MethodType) and isinstance(owner, str):
            named = {
                name: value for name, value in kwargs.items() if not name.startswith("_")
            }  # others are Jinja's own
            return self.string_method(owner, function.__name__, args, named)
        result = super().call(context, function, *args, **kwargs)  # type: ignore[misc]
        if isinstance(function, self.rendered):  # `concat` has written it, and its spans are exact
            return result
        return self.owned(self.bounded(result), [args, kwargs])

    def string_method(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a string's method, on a tier text if any operand is one."""
        self.bounded([args, kwargs])
        if name == "replace" and len(args) > 1:
            self.allow((text.count(args[0]) + 1) * len(args[1]))
        if name == "join" and args:
            return self.joined(args[0], text)
        if name == "zfill" and args:
            self.allow(args[0])
        if tier_within([args, kwargs]):
            text = join_text([text])
        return self.owned(getattr(text, name)(*args, **kwargs), [text])

    def guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter: it counts as a step, its values are bounded, tiers are followed."""

        @functools.wraps(function)  # keeps the attribute `jinja_pass_arg`
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self.step()
            values = [*args[1:], *kwargs.values()] if hasattr(function, "jinja_pass_arg") else [*args, *kwargs.values()]
            self.bounded(values)
            if name == "replace":
                return self.string_method(self.written(values[0]), "replace", tuple(values[1:]), {})
            if name == "format":
                return self.formatted(self.written(values[0]), kwargs or args[1:], lambda: function(*args, **kwargs))
            if name == "indent" and len(values) > 1:
                self.allow(values[0].count("\n") * (len(values[1]) if isinstance(values[1], str) else values[1]))
            result = function(*args, **kwargs)
            return self.owned(self.bounded(result), values, exact=name in EXACT_FILTERS)

        return filtered

    def joined(self, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        """Do what the filter `join` does, following each part."""
        if attribute is not None:
            values = (self.getattr(value, attribute) for value in values)  # type: ignore[attr-defined]
        parts = [self.written(value) for value in self.looped(values)]
        return self.concat([part for piece in parts for part in (piece, d)][:-1])


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Do what transformers' `tojson` does: JSON without HTML escapes."""
    if isinstance(indent, int) and indent > 16:
        raise OverBudget(
            "it indents JSON wider than any chat template needs"
        )  # a nested value would grow by the width at each level
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def metered_class() -> Any:
    """Define what rewrites a template's syntax tree for `TierSandbox`, importing jinja2 only now."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Metered(NodeTransformer):
        """Route loops, `~` and literal containers through the environment, which counts and bounds them."""

        def through(self, method: str, *arguments: Any) -> nodes.Call:
            return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.iter = self.through("looped", node.iter)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return self.through("tilde", *node.nodes)

        def visit_container(self, node: Any) -> nodes.Node:
            self.generic_visit(node)
            return node if getattr(node, "ctx", "load") == "store" else self.through("bounded", node)

        visit_List = visit_Dict = visit_Tuple = visit_container

    return Metered


@functools.cache
def sandbox_class() -> Any:
    """Marry `TierSandbox` to Jinja's immutable sandbox, importing jinja2 only now."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext, Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %}, by which transformers marks what is trained: passed through."""

        tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

        def parse(self, parser: Any) -> Any:
            parser.stream.skip(1)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(TierSandbox, ImmutableSandboxedEnvironment):
        rendered = (Macro, LoopContext)

        def __init__(self) -> None:
            super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
            self.finalize = self.written
            builtin = {**self.filters, "tojson": to_json}
            self.filters = {name: self.guarded(name, builtin[name]) for name in FILTERS}
            self.filters["join"] = self.joined
            self.globals.pop("lipsum")

        def compile_metered(self, source: str) -> jinja2.Template:
            return self.from_string(metered_class()().visit(self.parse(source)))

    return Sandbox


class Template:
    """A compiled template. `render` raises `Refusal` or `TemplateError`, never anything else."""

    def __init__(self, source: str, name: str) -> None:
        self.source, self.name = source, name
        if len(source) > TEMPLATE_SIZE:
            raise TemplateError(f"the template of {name} has {len(source):,} characters: no chat template needs that")
        self._sandbox: Any = sandbox_class()()
        try:
            self._compiled = self._sandbox.compile_metered(source)
        except Exception as error:
            raise TemplateError(
                f"the template of {name} does not parse: {one_line(error)}: give another with --template"
            ) from error

    def mentions(self, word: str) -> bool:
        """Tell whether the template uses this name, as a variable or as a role."""
        from jinja2 import nodes

        tree = self._sandbox.parse(self.source)
        names = {node.name for node in tree.find_all(nodes.Name)}
        return word in names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}

    def render(self, **variables: Any) -> TierText:
        """Render within the budget.

        Raises:
            Refusal: the template called `raise_exception`.
            TemplateError: it failed, or spent more than its budget.
        """

        def raise_exception(message: Any) -> None:
            raise Refusal(one_line(message))

        def strftime_now(pattern: str) -> str:
            return time.strftime(pattern)

        self._sandbox.begin()
        try:
            text = self._compiled.render(**variables, raise_exception=raise_exception, strftime_now=strftime_now)
        except Refusal:
            raise
        except RecursionError:
            raise TemplateError(
                f"the template of {self.name} nests without end: give another with --template"
            ) from None
        except Exception as error:
            hostile = type(error).__name__ in ("OverBudget", "SecurityError", "MemoryError")
            kind = TemplateError if hostile else TemplateFailure
            raise kind(
                f"the template of {self.name} failed: {one_line(error)}: give another with --template"
            ) from error
        return join_text([text])
