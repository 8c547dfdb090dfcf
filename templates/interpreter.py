"""A template's syntax tree, which Jinja's parser makes, evaluated step by step within a budget.

Jinja would compile it to Python. Then whatever Python can do to any object would have to be forbidden, one thing after
another; here only what is written below can happen, each step is counted, and no Python is compiled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import safe_range

from .budget import Budget, NotAllowed
from .filters import Filters
from .parser import walk
from .tier_text import TierText, join_text
from .values import Function, Loop, Namespace, View, kind

OPERATORS: dict[type[nodes.BinExpr], Callable[[Any, Any], Any]] = {
    nodes.Add: operator.add,
    nodes.Sub: operator.sub,
    nodes.Mul: operator.mul,
    nodes.Div: operator.truediv,
    nodes.FloorDiv: operator.floordiv,
    nodes.Mod: operator.mod,
    nodes.Pow: operator.pow,
}


class Break(Exception):
    """The statement `break`."""


class Continue(Exception):
    """The statement `continue`."""


class Scope:
    """The variables of a template, or of the body of a loop or a macro in it."""

    __slots__ = ("names", "outer")

    def __init__(self, outer: Scope | None = None, names: dict[str, Any] | None = None) -> None:
        self.names, self.outer = {} if names is None else names, outer

    def find(self, name: str) -> Any:
        """Return what a name stands for."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return Undefined(name=name)


class Operations(Filters):
    """Operators, calls, and the functions that a template is given."""

    def __init__(self, budget: Budget, functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(budget)
        own: dict[str, Callable[..., Any]] = {
            "range": self._range,
            "dict": self._dict,
            "namespace": self._namespace,
            **functions,
        }
        self.globals = {name: self._function(function) for name, function in own.items()}

    def _function(self, function: Callable[..., Any]) -> Function:
        return Function(lambda args, named: self.owned(function(*args, **named), args, named))

    def _range(self, *args: int) -> View:
        numbers = safe_range(*args)
        self.budget.room_for_items(len(numbers))
        return View(numbers)

    def _dict(self, *args: Any, **named: Any) -> dict[Any, Any]:
        pairs = [*args[0].items()] if args and isinstance(args[0], dict) else self.listed(self.items(*args or [()]))
        self.budget.room_for_items(len(pairs) + len(named))
        return {**{self.key(key): value for key, value in pairs}, **named}

    def _namespace(self, *args: Any, **named: Any) -> Namespace:
        return Namespace(self._dict(*args, **named))

    def called(self, function: Any, args: list[Any], named: dict[str, Any]) -> Any:
        """Call a function."""
        self.budget.check()
        if isinstance(function, Undefined):
            return function()  # it raises
        if isinstance(function, Loop):
            return function.again(*args)
        if not isinstance(function, Function):
            raise TypeError(f"'{kind(function)}' object is not callable")
        return function.call(args, named)

    def assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        """Give a name, a field of a namespace, or several names what they stand for."""
        if isinstance(target, nodes.Name):
            scope.names[target.name] = value
        elif isinstance(target, nodes.NSRef):
            owner = scope.find(target.name)
            if not isinstance(owner, Namespace):
                raise TypeError("cannot assign attribute on non-namespace object")
            self.budget.room_for_items(len(owner.fields) if target.attr not in owner.fields else 0)
            owner.fields[target.attr] = value
        elif isinstance(target, nodes.Tuple):
            values = self.listed(self.items(value))
            if len(values) != len(target.items):
                raise TypeError(f"{len(values)} values cannot be given to {len(target.items)} names")
            for one, part in zip(target.items, values, strict=True):
                self.assign(one, part, scope)
        else:
            raise NotAllowed(f"it assigns to a {type(target).__name__.lower()}")

    def computed(self, kind_of: type[nodes.BinExpr], left: Any, right: Any) -> Any:
        """Do what an operator does."""
        if isinstance(left, str):
            if kind_of is nodes.Mod:
                return self.percent(left, right)
            if kind_of is nodes.Add and isinstance(right, str):
                return self.added(left, right)
        if kind_of is nodes.Mul:
            thing, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(thing, str) and isinstance(times, int):
                return self.repeated(thing, times)
            if isinstance(thing, list | tuple) and isinstance(times, int):
                self.budget.room_for_items(len(thing) * max(0, times))
        if kind_of is nodes.Add and isinstance(left, list | tuple) and isinstance(right, list | tuple):
            self.budget.room_for_items(len(left) + len(right))
        if kind_of is nodes.Pow and isinstance(right, int | float) and abs(right) > 64:
            self.budget.too_large()
        return self.made(OPERATORS[kind_of](left, right))


class Expressions(Operations):
    """Evaluates expressions: `value_Add` is what Jinja's node `Add` stands for."""

    def _method_of(self, kind_of: str, node: nodes.Node) -> Callable[..., Any]:
        name = type(node).__name__
        method: Callable[..., Any] | None = getattr(self, f"{kind_of}_{name}", None)
        if method is None:
            shown = "autoescape" if name == "ScopedEvalContextModifier" else name.lower()
            raise NotAllowed(f"it uses {shown}, which no chat template needs")
        return method

    def value(self, node: nodes.Node, scope: Scope) -> Any:
        """Evaluate an expression."""
        self.budget.step()
        return self._method_of("value", node)(node, scope)

    def arguments(self, node: Any, scope: Scope) -> tuple[list[Any], dict[str, Any]]:
        """Evaluate the arguments of a call, a filter or a test."""
        args = [self.value(one, scope) for one in node.args]
        if node.dyn_args is not None:
            args += self.listed(self.items(self.value(node.dyn_args, scope)))
        named = {one.key: self.value(one.value, scope) for one in node.kwargs}
        if node.dyn_kwargs is not None:
            more = self.value(node.dyn_kwargs, scope)
            if not isinstance(more, dict) or any(type(name) is not str for name in more) or named.keys() & more.keys():
                raise NotAllowed("it names arguments in a way that no chat template needs")
            named |= more
        self.budget.room_for_items(len(args) + len(named))
        return args, named

    def value_TemplateData(self, node: nodes.TemplateData, scope: Scope) -> Any:
        """Return the text between tags."""
        return node.data

    def value_Const(self, node: nodes.Const, scope: Scope) -> Any:
        """Return a literal."""
        return self.made(node.value)

    def value_Name(self, node: nodes.Name, scope: Scope) -> Any:
        """Return what a name stands for."""
        return scope.find(node.name)

    def value_Tuple(self, node: nodes.Tuple, scope: Scope) -> Any:
        """Make a tuple."""
        self.budget.room_for_items(len(node.items))
        return tuple([self.value(one, scope) for one in node.items])

    def value_List(self, node: nodes.List, scope: Scope) -> Any:
        """Make a list."""
        self.budget.room_for_items(len(node.items))
        return [self.value(one, scope) for one in node.items]

    def value_Dict(self, node: nodes.Dict, scope: Scope) -> Any:
        """Make a dict."""
        self.budget.room_for_items(len(node.items))
        return {self.key(self.value(pair.key, scope)): self.value(pair.value, scope) for pair in node.items}

    def value_CondExpr(self, node: nodes.CondExpr, scope: Scope) -> Any:
        """Choose one of two."""
        if self.value(node.test, scope):
            return self.value(node.expr1, scope)
        return self.value(node.expr2, scope) if node.expr2 is not None else Undefined("there is no else")

    def value_And(self, node: nodes.And, scope: Scope) -> Any:
        """Return the first that is false, else the last."""
        return self.value(node.left, scope) and self.value(node.right, scope)

    def value_Or(self, node: nodes.Or, scope: Scope) -> Any:
        """Return the first that is true, else the last."""
        return self.value(node.left, scope) or self.value(node.right, scope)

    def value_Not(self, node: nodes.Not, scope: Scope) -> Any:
        """Negate."""
        return not self.value(node.node, scope)

    def value_Neg(self, node: nodes.Neg, scope: Scope) -> Any:
        """Turn the sign of a number."""
        return -self.value(node.node, scope)

    def value_Pos(self, node: nodes.Pos, scope: Scope) -> Any:
        """Keep the sign of a number."""
        return +self.value(node.node, scope)

    def value_Concat(self, node: nodes.Concat, scope: Scope) -> Any:
        """Join what is written of values: `a ~ b`."""
        return self.concat([self.written(self.value(one, scope)) for one in node.nodes])

    def value_Compare(self, node: nodes.Compare, scope: Scope) -> Any:
        """Compare values, each with the next: `a < b < c`."""
        left = self.value(node.expr, scope)
        for operand in node.ops:
            right = self.value(operand.expr, scope)
            if not self.compare(operand.op.replace("teq", "e"), left, right):
                return False
            left = right
        return True

    def _binary(self, node: nodes.BinExpr, scope: Scope) -> Any:
        return self.computed(type(node), self.value(node.left, scope), self.value(node.right, scope))

    value_Add = value_Sub = value_Mul = value_Div = value_FloorDiv = value_Mod = value_Pow = _binary

    def value_Getattr(self, node: nodes.Getattr, scope: Scope) -> Any:
        """Look up `a.b`."""
        return self.getattr(self.value(node.node, scope), node.attr)

    def value_Getitem(self, node: nodes.Getitem, scope: Scope) -> Any:
        """Look up `a[b]` or cut `a[b:c]`."""
        owner = self.value(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            given = (node.arg.start, node.arg.stop, node.arg.step)
            return self.sliced(owner, slice(*(None if one is None else self.value(one, scope) for one in given)))
        return self.getitem(owner, self.value(node.arg, scope))

    def value_Call(self, node: nodes.Call, scope: Scope) -> Any:
        """Call a function."""
        function = self.value(node.node, scope)
        return self.called(function, *self.arguments(node, scope))

    def value_Test(self, node: nodes.Test, scope: Scope) -> Any:
        """Ask whether a value passes a test."""
        value = self.value(node.node, scope)
        args, named = self.arguments(node, scope)
        if named:
            raise NotAllowed("it names the arguments of a test, which no chat template needs")
        return self.test(node.name, value, args)

    def value_Filter(self, node: nodes.Filter, scope: Scope) -> Any:
        """Apply a filter."""
        return self._filtered(node, scope, None)

    def _filtered(self, node: nodes.Filter, scope: Scope, text: str | None) -> Any:
        """Apply a filter to its value, or, in a block, to the text of that."""
        if isinstance(node.node, nodes.Filter):
            value = self._filtered(node.node, scope, text)
        else:
            value = text if node.node is None else self.value(node.node, scope)
        args, named = self.arguments(node, scope)
        return self.filter(node.name, value, args, named)


class Interpreter(Expressions):
    """Runs statements: `run_For` is what Jinja's node `For` stands for."""

    def render(self, tree: nodes.Template, variables: dict[str, Any]) -> TierText:
        """Return what a template writes."""
        out: list[str] = []
        self.run(tree.body, Scope(Scope(None, self.globals), dict(variables)), out)
        return join_text([self.concat(out)])

    def run(self, statements: list[nodes.Node], scope: Scope, out: list[str]) -> None:
        """Run statements; what they write is added to `out`."""
        for node in statements:
            self.budget.step()
            self._method_of("run", node)(node, scope, out)

    def block(self, statements: list[nodes.Node], scope: Scope) -> str:
        """Return what statements write in a scope of their own."""
        out: list[str] = []
        self.run(statements, Scope(scope), out)
        return self.concat(out)

    def macro(self, node: nodes.Macro | nodes.CallBlock, scope: Scope) -> Function:
        """Make a function of a macro, or of the body of a call block."""
        names = [argument.name for argument in node.args]
        defaults = dict(zip(reversed(names), reversed(node.defaults), strict=False))
        used = {one.name for part in node.body for one in walk(part) if isinstance(one, nodes.Name)} - set(names)

        def call(args: list[Any], named: dict[str, Any]) -> str:
            inner, named = Scope(scope), dict(named)
            if len(args) > len(names) and "varargs" not in used:
                raise TypeError("a macro is given more arguments than it takes")
            for place, name in enumerate(names):
                if place < len(args):
                    inner.names[name] = args[place]
                elif name in named:
                    inner.names[name] = named.pop(name)
                elif name in defaults:
                    inner.names[name] = self.value(defaults[name], inner)
                else:
                    inner.names[name] = Undefined(f"parameter {name!r} was not provided", name=name)
            if "caller" in used:
                inner.names["caller"] = named.pop("caller", Undefined("No caller defined", name="caller"))
            if named and "kwargs" not in used:
                raise TypeError("a macro is given an argument that it does not take")
            inner.names |= {"kwargs": named} if "kwargs" in used else {}
            inner.names |= {"varargs": tuple(args[len(names) :])} if "varargs" in used else {}
            out: list[str] = []
            self.run(node.body, inner, out)
            return self.concat(out)

        return Function(call)

    def run_Output(self, node: nodes.Output, scope: Scope, out: list[str]) -> None:
        """Write text and the values of expressions."""
        for part in node.nodes:
            out.append(self.written(self.value(part, scope)))

    def run_If(self, node: nodes.If, scope: Scope, out: list[str]) -> None:
        """Run the first branch whose condition holds."""
        for branch in (node, *node.elif_):
            if self.value(branch.test, scope):
                return self.run(branch.body, scope, out)
        return self.run(node.else_, scope, out)

    def run_For(self, node: nodes.For, scope: Scope, out: list[str]) -> None:
        """Run a loop."""
        self._loop(node, scope, out, self.value(node.iter, scope), 0)

    def _loop(self, node: nodes.For, scope: Scope, out: list[str], values: Any, depth: int) -> None:
        def again(values: Any) -> str:
            if not node.recursive:
                raise TypeError("The loop must have the 'recursive' marker to be called recursively.")
            inner: list[str] = []
            self._loop(node, scope, inner, values, depth + 1)
            return self.concat(inner)

        def chosen() -> Iterator[Any]:
            for value in self.items(values):
                inner = Scope(scope)
                self.assign(node.target, value, inner)
                if node.test is None or self.value(node.test, inner):
                    yield value

        countable = isinstance(values, list | tuple) and not node.test
        found = values if countable else chosen() if node.test else self.items(values)
        context, empty = LoopContext(found, Undefined, None, depth), True
        loop = Loop(context, again)
        for value, _ in context:
            self.budget.step()
            inner, empty = Scope(scope, {"loop": loop}), False
            self.assign(node.target, value, inner)
            try:
                self.run(node.body, inner, out)
            except Continue:
                continue
            except Break:
                break
        if empty:
            self.run(node.else_, Scope(scope), out)

    def run_Break(self, node: nodes.Node, scope: Scope, out: list[str]) -> None:
        """End a loop."""
        raise Break

    def run_Continue(self, node: nodes.Node, scope: Scope, out: list[str]) -> None:
        """Go on with the next value."""
        raise Continue

    def run_Macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> None:
        """Define a macro."""
        scope.names[node.name] = self.macro(node, scope)

    def run_CallBlock(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> None:
        """Call a macro with a body as `caller`."""
        args, named = self.arguments(node.call, scope)
        named["caller"] = self.macro(node, scope)
        out.append(self.written(self.called(self.value(node.call.node, scope), args, named)))

    def run_FilterBlock(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> None:
        """Write what a filter makes of a body."""
        out.append(self.written(self._filtered(node.filter, scope, self.block(node.body, scope))))

    def run_With(self, node: nodes.With, scope: Scope, out: list[str]) -> None:
        """Run a body with variables of its own."""
        inner = Scope(scope)
        for target, value in zip(node.targets, [self.value(one, scope) for one in node.values], strict=True):
            self.assign(target, value, inner)
        self.run(node.body, inner, out)

    def run_Scope(self, node: nodes.Scope, scope: Scope, out: list[str]) -> None:
        """Run a body in a scope of its own."""
        self.run(node.body, Scope(scope), out)

    def run_Assign(self, node: nodes.Assign, scope: Scope, out: list[str]) -> None:
        """Set a variable."""
        self.assign(node.target, self.value(node.node, scope), scope)

    def run_AssignBlock(self, node: nodes.AssignBlock, scope: Scope, out: list[str]) -> None:
        """Set a variable to what a body writes."""
        text = self.block(node.body, scope)
        self.assign(node.target, text if node.filter is None else self._filtered(node.filter, scope, text), scope)
