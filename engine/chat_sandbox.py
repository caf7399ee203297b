"""Jinja for templates that are not trusted: transformers' dialect of it, sandboxed and limited."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .errors import RequestError

_GUARD_FILTER = "guard the loop"  # no template can spell it
_CHECK_EVERY = 64  # loop rounds and calls between two looks at the clock
_MAX_POWER_BITS = 1 << 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rendering may take."""

    cpu_seconds: float = 5.0
    output_chars: int = 1 << 24
    repeat_items: int = 1 << 24  # of ``"text" * n``


class _Exceeded(Exception):
    """A limit was reached."""


class _Budget:
    """CPU time of this thread that one rendering has left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.thread_time() + seconds
        self._ticks = itertools.count(1)

    def tick(self) -> None:
        """Count a loop round or a call."""
        if next(self._ticks) % _CHECK_EVERY == 0 and time.thread_time() > self._end:
            raise _Exceeded("it takes too long")


class _GuardedIterable:
    """An iterable whose rounds are counted; as long as the original."""

    def __init__(self, items: Any, budget: _Budget) -> None:
        self._items = items
        self._budget = budget

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.tick()
            yield item


class _GuardingGenerator(CodeGenerator):
    """Compiles ``for x in y`` as ``for x in y | guard``."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        for loop in node.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _GUARD_FILTER, [], [], None, None, lineno=loop.lineno)
        super().visit_Template(node, frame)


class _GenerationTag(Extension):
    """``{% generation %}``: marks the assistant's text for training. Here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag as a block with a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(line)

    def _pass_on(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateNamespace(Namespace):
    """Jinja's namespace without underscored attributes, which Python would look at."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that ``self`` may be a keyword
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"namespace attribute {name!r}: a leading underscore is not allowed"
        )


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with limits. Thread-safe once made."""

    code_generator_class = _GuardingGenerator
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, limits: Limits) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self._limits = limits
        self._budget: ContextVar[_Budget] = ContextVar("template budget")
        self.filters["tojson"] = _tojson
        self.filters[_GUARD_FILTER] = self._guard
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _make_dict,
            "namespace": _TemplateNamespace,
        }

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The template's output. Raises RequestError if it refuses, fails or exceeds the limits."""
        token = self._budget.set(_Budget(self._limits.cpu_seconds))
        chunks: list[str] = []
        left = self._limits.output_chars
        try:
            for chunk in template.generate(variables):
                chunks.append(chunk)
                left -= len(chunk)
                if left < 0:
                    raise _Exceeded(f"its output is above {self._limits.output_chars} characters")
        except _Exceeded as error:
            raise RequestError(f"the chat template was stopped: {error}") from error
        except jinja2.TemplateError as error:  # raise_exception's message is the template author's
            raise RequestError(error.message or type(error).__name__) from error
        except Exception as error:
            raise RequestError(f"the chat template failed: {type(error).__name__}: {error}") from error
        finally:
            self._budget.reset(token)
        return "".join(chunks)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes."""
        __self._budget.get().tick()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``*`` and ``**``: the two that make much out of little."""
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, (str, list, tuple)) and isinstance(times, int):
                    self._check_repeat(len(items) * times)
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_POWER_BITS:
            raise _Exceeded("it computes too large a power")
        return super().call_binop(context, operator, left, right)

    def _check_repeat(self, items: int) -> None:
        if items > self._limits.repeat_items:
            raise _Exceeded("it repeats a text or list too often")

    def _guard(self, items: Iterable[Any]) -> _GuardedIterable:
        return _GuardedIterable(items, self._budget.get())


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)
