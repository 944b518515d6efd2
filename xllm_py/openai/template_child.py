"""The process that renders chat templates: `python -m xllm_py.openai.template_child <fd>`.

Started and, when it overstays, killed by `chat_template`, through `child`, whose limits are needed because the sandbox bounds
neither time nor memory. Knows nothing but jinja2: no torch, no tokenizer, no network.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from xllm_py.openai.child import serve

MAX_OUTPUT_CHARS = 1 << 20


class Load(msgspec.Struct, tag=True, frozen=True):
    """First message: the template's text."""

    source: str


class Render(msgspec.Struct, tag=True, frozen=True):
    """One conversation and everything else the template may look at."""

    variables: dict[str, Any]


class Rendered(msgspec.Struct, tag=True, frozen=True):
    """Text, or why there is none: `kind` is refused (by the template itself), failed or too_long."""

    text: str = ""
    kind: str = ""
    message: str = ""


class Refused(Exception):
    """The template called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks training text in some templates; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class wants a plain set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Drop the tag, keep the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox with the filters and functions Hugging Face templates expect."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _refuse(message: str) -> NoReturn:
    raise Refused(str(message)[:200])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def render(template: jinja2.Template, variables: dict[str, Any]) -> Rendered:
    """Render within the output limit. Whatever a template raises is an answer, not an end of the process."""
    parts: list[str] = []
    num_chars = 0
    try:
        for part in template.generate(**variables):
            parts.append(part)
            num_chars += len(part)
            if num_chars > MAX_OUTPUT_CHARS:
                return Rendered(kind="too_long", message="more than 1 MiB of text")
    except Refused as error:
        return Rendered(kind="refused", message=str(error))
    except (jinja2.TemplateError, *_OPERATOR_ERRORS) as error:
        return Rendered(kind="failed", message=f"{type(error).__name__}: {error}"[:300])
    return Rendered(text="".join(parts))


# what an expression of a template can raise on values it did not expect
_OPERATOR_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Templates:
    """Answers messages; holds the template that was loaded last."""

    def __init__(self) -> None:
        self._template: jinja2.Template | None = None

    def answer(self, message: Load | Render) -> Rendered:
        """Of one message."""
        if isinstance(message, Load):
            self._template, answer = _load(message.source)
        elif self._template is None:
            answer = Rendered(kind="failed", message="no template is loaded")
        else:
            answer = render(self._template, message.variables)
        return answer


def _load(source: str) -> tuple[jinja2.Template | None, Rendered]:
    try:
        return environment().from_string(source), Rendered()
    except (jinja2.TemplateError, *_OPERATOR_ERRORS, SyntaxError) as error:
        return None, Rendered(kind="failed", message=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    serve(int(sys.argv[1]), Load | Render, _Templates().answer)
