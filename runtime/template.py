"""A model's chat template: Jinja in a sandbox, with what Hugging Face's templates expect to find there.

A template is code from a stranger. The sandbox keeps it from the machine; source, products and output are capped so
that it cannot easily eat the memory. What it cannot stop is a template that merely loops for long: Ctrl-C does.
Contract: transformers, docs/source/en/chat_templating_writing.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gguforge.quant.errors import InputError

MAX_SOURCE_CHARACTERS = 256 << 10
MAX_OUTPUT_CHARACTERS = 64 << 20
_MAX_PRODUCT = 1 << 20
_MAX_EXPONENT = 64
_MISTAKES = (
    TemplateError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
)


class TemplateFailure(InputError):
    """The template refused the conversation (`raise_exception`) or has a fault."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; for chatting it is its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without the operators that make gigabytes out of a few characters."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= _MAX_PRODUCT and abs(right) <= _MAX_EXPONENT):
            raise SecurityError("power too large")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not allowed")
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if hasattr(text, "__len__") and isinstance(count, int) and len(text) * count > _MAX_PRODUCT:
                    raise SecurityError("repetition too large")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled template.

    Args:
        source: the Jinja text.
        variables: what it may name besides the messages: `bos_token`, `eos_token`.

    Raises:
        TemplateFailure: it does not compile.

    Example:
        >>> t = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}", {})
        >>> t.render([{"role": "user", "content": " Hi "}], answer=True)
        '<user>Hi'
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise TemplateFailure(
                "the chat template is too long",
                expected=f"{MAX_SOURCE_CHARACTERS} characters",
                found=len(source),
            )
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.source = source
        self._variables = variables
        try:
            self._template = environment.from_string(source)
        except _MISTAKES as error:
            raise _failure(error) from error

    def render(self, messages: Sequence[dict[str, Any]], *, answer: bool, tools: Sequence[Any] | None = None) -> str:
        """The conversation as one text; with `answer`, up to where the assistant's answer begins.

        Raises:
            TemplateFailure: the template refuses these messages.
        """
        parts, size = [], 0
        try:
            for part in self._template.generate(
                messages=list(messages),
                add_generation_prompt=answer,
                tools=tools,
                documents=None,
                **self._variables,
            ):
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT_CHARACTERS:
                    raise SecurityError("output too long")
        except _MISTAKES as error:
            raise _failure(error) from error
        return "".join(parts)


def _failure(error: Exception) -> TemplateFailure:
    return TemplateFailure(f"the model's chat template fails: {error or type(error).__name__}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's `tojson`: plain JSON, where Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
