"""Checks the messages of a chat request and turns them into what templates expect. Called by `intake`; pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from xllm_py.base.errors import InvalidValue, UnsupportedValue
from xllm_py.openai.schema import Message

_MAX_MESSAGES = 1024
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the template sees them; raises InvalidValue or UnsupportedValue with the path."""
    if not 1 <= len(messages) <= _MAX_MESSAGES:
        raise InvalidValue(
            f"messages has {len(messages)} entries; 1 to {_MAX_MESSAGES} are allowed",
            param="messages",
        )
    return [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _turn(message: Message, path: str) -> dict[str, Any]:
    if message.role not in _ROLES:
        raise InvalidValue(
            f"{path}.role must be one of {', '.join(sorted(_ROLES))}", param=f"{path}.role"
        )
    turn: dict[str, Any] = {"role": message.role, "content": _content(message, path)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            turn[name] = value
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return turn


def _content(message: Message, path: str) -> str:
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise InvalidValue(f"{path}.content is missing", param=f"{path}.content")
    if isinstance(message.content, str):
        return message.content
    texts = []
    for index, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            where = f"{path}.content[{index}]"
            raise UnsupportedValue(f"{where}: only text parts are supported", param=where)
        texts.append(part.text)
    return "\n".join(texts)


def _arguments(text: str) -> object:
    """Templates expect an object; what is none goes on as the string it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
