"""Bounds on what a chat template may take: steps, time, and characters.

jinja2's sandbox keeps a template from what it must not touch. It does not keep it from running forever or
from filling the memory, and a template is a stranger's program that runs for every request. Each loop, call
and operator that can make much of little is counted here while it runs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 10.0
MAX_STEPS = 5_000_000
MAX_AT_ONCE = 1 << 26
"""Characters of a text, or items of a list, that a template makes."""

MAX_MADE = 1 << 29
"""All of them together, in one rendering."""

MAX_WIDTH = 10_000
MAX_BITS = 4096

_CLOCK_EVERY = 256
_LEFT_OUT_GLOBALS = ("lipsum",)
_LEFT_OUT_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""What no chat template needs, and what takes the square of what it is given."""

_PADDING = frozenset(
    {"batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "tojson", "zfill"}
)
"""Filters and methods of texts whose numbers say how much to write."""

_WIDE_FORMAT = re.compile(r"%(\([^)]*\))?[^A-Za-z%]*?(\d{5,}|\*)|\{[^{}]*:[^{}]*(\d{5,}|\{)")
"""A width of five digits and more, or one that is an argument, in either way of formatting."""

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class _Budget:
    """What one rendering may still take."""

    def __init__(self) -> None:
        self._ends_at = time.monotonic() + MAX_SECONDS
        self._num_steps = 0
        self._num_made = 0

    def step(self) -> None:
        """One more turn of a loop, or call. Raises SecurityError."""
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise SecurityError(f"the template takes more than {MAX_STEPS} steps")
        if self._num_steps % _CLOCK_EVERY == 0:
            self.look_at_clock()

    def made(self, value: T) -> T:
        """`value`, which the template has just made. Raises SecurityError."""
        if isinstance(value, str | list | tuple | dict):
            self.look_at_clock()
            check_size(len(value))
            self._num_made += len(value)
            if self._num_made > MAX_MADE:
                raise SecurityError(f"the template makes more than {MAX_MADE} characters")
        return value

    def look_at_clock(self) -> None:
        """Raises SecurityError when the time is over."""
        if time.monotonic() > self._ends_at:
            raise SecurityError(f"the template takes more than {MAX_SECONDS:g} s")


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)
"""Of the rendering in this thread: jinja2 has no place for what belongs to one."""


def _left() -> _Budget:
    """What is left to the rendering. One that nobody has bounded has all of it at each stroke."""
    return _budget.get() or _Budget()


@contextmanager
def bounded() -> Iterator[None]:
    """Templates of a `BoundedEnvironment` are rendered inside of this."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def check_size(size: int) -> None:
    """Raises SecurityError for a text or list that is too long, best before it is made."""
    if size > MAX_AT_ONCE:
        raise SecurityError(f"the template makes a text or list of {size}; {MAX_AT_ONCE} is the most")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with the bounds of this module. Rendering and compiling raise SecurityError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in _LEFT_OUT_GLOBALS:
            self.globals.pop(name, None)
        for name in _LEFT_OUT_FILTERS:
            self.filters.pop(name, None)
        self.filters = _Filters(self.filters)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See jinja2."""
        _check_operands(operator, left, right)
        return _left().made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See jinja2."""
        _left().step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_call(__obj.__name__, (owner, *args), kwargs)
        return _left().made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See jinja2."""
        formatting = super().wrap_str_format(value)
        if formatting is not None:
            _check_call("format", (value.__self__,), {})
        return formatting

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counting(self).visit(source), *args, **kwargs)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins what a template, a macro or a block has written."""
        written = list(parts)
        check_size(sum(map(len, written)))
        return _left().made("".join(written))


class _Filters(dict[str, Callable[..., Any]]):
    """The filters, each with its bounds, however it is looked up."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return _checked(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


class _Counting(NodeTransformer):
    """Puts the counting filters around what loops and what writes."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment
        environment.filters |= {"_each": _each, "_made": _made}

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        """Each turn of a loop is a step."""
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Texts are joined with `~` without asking the environment."""
        self.generic_visit(node)
        return self._filtered(node, "_made")

    def visit_Include(self, node: nodes.Node) -> nodes.Node:  # noqa: N802
        """A chat template is one file."""
        raise TemplateSyntaxError("a chat template cannot use other files", node.lineno)

    visit_Import = visit_FromImport = visit_Extends = visit_Include  # noqa: N815

    def _filtered(self, node: nodes.Node, name: str) -> nodes.Filter:
        wrapped = nodes.Filter(node, name, [], [], None, None)
        return wrapped.set_lineno(node.lineno).set_environment(self._environment)  # type: ignore[return-value]


@pass_context  # so that it is not called when a template is compiled
def _each(_: Context, items: Iterable[T]) -> Iterator[T]:
    budget = _left()
    for item in items:
        budget.step()
        yield item


@pass_context
def _made(_: Context, value: T) -> T:
    return _left().made(value)


def _checked(name: str, function: F) -> F:
    if name.startswith("_"):
        return function

    @wraps(function)  # with the mark of what it wants to be passed
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_call(name, args, kwargs)
        return _left().made(function(*args, **kwargs))

    return call  # type: ignore[return-value]


def _check_call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    given = (*args, *kwargs.values())
    if name in _PADDING:
        for number in given[1:]:
            if isinstance(number, int) and abs(number) > MAX_WIDTH:
                raise SecurityError(f"{name} of {number}; {MAX_WIDTH} is the most")
    texts = [value for value in given if isinstance(value, str)]
    if name in ("format", "format_map") and texts and _WIDE_FORMAT.search(texts[0]):
        raise SecurityError("a format with a width of five digits, or one that is an argument")
    if name == "replace" and len(texts) > 2:
        check_size(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    if name in ("join", "translate"):
        items = (len(value) for value in given if isinstance(value, list | tuple | dict))
        check_size(max(map(len, texts), default=0) * max(items, default=1))


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
        raise SecurityError("a format with a width of five digits, or one that is an argument")
    if operator == "*":
        for value, count in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(count, int):
                check_size(len(value) * count)
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise SecurityError(f"a number of {bits} bits; {MAX_BITS} is the most")
