"""What of JSON Schema a client may ask for: limits, and keywords that would be silently passed over. Pure.

Called by `structured` before anything grows with the schema. Whether what is left compiles is the library's word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xllm_py.base.errors import InvalidValue, UnsupportedValue

_MAX_DEPTH = 16
_MAX_ENUM_ITEMS = 1000

# a schema under it, a list of them, or a schema a name
_ONE = frozenset({"items", "additionalItems", "additionalProperties"})
_MANY = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_PLAIN = frozenset(
    {
        *("type", "enum", "const", "$ref", "required", "pattern", "format", "minLength"),
        *("maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("multipleOf", "minItems", "maxItems", "minProperties", "maxProperties"),
    }
)
# words about a schema; an answer is as good without them
_NOTES = frozenset(
    {
        *("$schema", "$id", "$anchor", "$comment", "id", "title", "description", "default"),
        *("example", "examples", "deprecated", "readOnly", "writeOnly"),
        *("contentMediaType", "contentEncoding", "contentSchema", "discriminator"),
    }
)
_KNOWN = _ONE | _MANY | _NAMED | _PLAIN | _NOTES


def check_schema(param: str, schema: dict[str, Any]) -> None:
    """Raises UnsupportedValue naming a keyword that cannot be honoured, InvalidValue for a schema over a limit."""
    num_items = 0
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        each, depth = waiting.pop()
        if not isinstance(each, dict):
            continue  # true, false, or what the library will refuse
        if depth > _MAX_DEPTH:
            raise InvalidValue(f"{param} nests more than {_MAX_DEPTH} schemas", param=param)
        for keyword in each:
            if keyword not in _KNOWN:
                raise UnsupportedValue(
                    f"{param} has the keyword {keyword[:40]!r}, which is not supported; leave it out",
                    param=param,
                )
        choices = each.get("enum")
        num_items += len(choices) if isinstance(choices, list) else 0
        if num_items > _MAX_ENUM_ITEMS:
            raise InvalidValue(
                f"{param} has more than {_MAX_ENUM_ITEMS} enum items in all", param=param
            )
        waiting += [(inner, depth + 1) for inner in _inside(each)]


def _inside(schema: dict[str, Any]) -> Iterator[Any]:
    for keyword, value in schema.items():
        if keyword in _NAMED and isinstance(value, dict):
            yield from value.values()
        elif keyword in _MANY and isinstance(value, list):
            yield from value
        elif keyword in _ONE:
            yield value
