"""Refuses, by name, fields whose value asks for what is not built; their neutral values pass.

Called by `intake` after parsing. Better a clear 400 than an answer that silently ignored half of the question.
"""

from __future__ import annotations

from collections.abc import Collection

from xllm_py.base.errors import InvalidValue, UnsupportedField, UnsupportedValue
from xllm_py.openai.schema import ChatBody, Common, CompletionBody

_COMMON: dict[str, Collection[object]] = {
    "beam_width": (0, 1),
}
_CHAT: dict[str, Collection[object]] = {
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
}
# a template's own names; a request that set them would choose the prompt's shape
_TEMPLATE_NAMES = frozenset({"messages", "tools", "chat_template", "bos_token", "eos_token"})


def check_neutral(body: CompletionBody | ChatBody) -> None:
    """Raises UnsupportedValue or UnsupportedField naming the first field that is not neutral."""
    _check_table(body, _COMMON)
    if body.stream_options is not None and not body.stream:
        raise InvalidValue("stream_options needs stream: true", param="stream_options")
    if isinstance(body, ChatBody):
        _check_table(body, _CHAT)
        _check_tools(body)


def _check_table(body: Common, table: dict[str, Collection[object]]) -> None:
    for name, neutral in table.items():
        value = getattr(body, name)
        if value is None or value in neutral:
            continue
        allowed = " or ".join(map(repr, neutral))
        raise UnsupportedValue(
            f"this value of {name} is not supported, only {allowed} is; leave it out", param=name
        )


def _check_tools(body: ChatBody) -> None:
    if body.tools:
        raise UnsupportedField("tools are not supported; leave them out", param="tools")
    for name in body.chat_template_kwargs or ():
        if name in _TEMPLATE_NAMES:
            raise UnsupportedField(
                f"chat_template_kwargs cannot set {name}", param=f"chat_template_kwargs.{name}"
            )
