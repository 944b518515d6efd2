"""A conversation to one prompt text, by the template of the model folder.

Loaded once by a daemon; `render` is called by the HTTP door from a worker thread, for it waits for a child process
(`template_child`) that is killed when it takes too long. Clients never choose or send a template.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from xllm_py.base import log
from xllm_py.base.errors import InvalidValue, ModelLoadError
from xllm_py.base.hashing import fingerprint
from xllm_py.openai import template_child
from xllm_py.openai.child import LIMITS, START_TIMEOUT_S, WORK_TIMEOUT_S, Child
from xllm_py.openai.tokenizer import read_config

_log = log.get(__name__)

_MAX_TEMPLATE_BYTES = 1 << 20


class ChatTemplate:
    """One template. `close` ends its child."""

    def __init__(self, source: str, *, special_tokens: dict[str, str], origin: str) -> None:
        """Compiles and tries the template; raises ModelLoadError naming `origin`."""
        self._source = source
        self._special_tokens = special_tokens
        self._lock = threading.Lock()
        self._renderer: Child[template_child.Rendered] | None = None
        self._loaded = template_child.Rendered()
        self.fingerprint = fingerprint(source)
        trial = self._ask({"messages": [{"role": "user", "content": "hello"}]})
        if trial.kind:
            self.close()
            raise ModelLoadError(
                f"the chat template in {origin} is broken: {trial.message}; correct the file"
            )

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The prompt's text, ready for the assistant's turn. Blocks up to 2 s: call it from a thread.

        variables: further names for the template (tools, chat_template_kwargs). Raises InvalidValue when the template
        refuses the conversation, cannot be rendered with it or takes too long.
        """
        answer = self._ask({**variables, "messages": messages})
        if not answer.kind:
            return answer.text
        if answer.kind == "refused":
            text = f"the model's chat template refuses this conversation: {answer.message}"
        elif answer.kind == "failed":
            _log.info("chat template failed", reason=answer.message)
            text = "the model's chat template cannot render these messages; simplify them"
        else:
            text = f"the rendered conversation is too large or too slow ({answer.message})"
        raise InvalidValue(text, param="messages")

    def _ask(self, variables: dict[str, Any]) -> template_child.Rendered:
        filled = {"add_generation_prompt": True, "tools": None, **self._special_tokens, **variables}
        with self._lock:
            try:
                renderer = self._living_renderer()
                if self._loaded.kind:
                    return self._loaded
                return renderer.ask(template_child.Render(filled), WORK_TIMEOUT_S)
            except (TimeoutError, ConnectionError) as error:
                # the child was alive before: it ran into its limits on this very conversation
                _log.warning("chat template stopped", reason=type(error).__name__)
                self._drop()
                return template_child.Rendered(kind="too_slow", message=LIMITS)
            except (OverflowError, UnicodeError, RecursionError) as error:
                # a number, a text or a nesting that JSON allows and msgpack does not: nothing was sent
                return template_child.Rendered(kind="failed", message=type(error).__name__)

    def _living_renderer(self) -> Child[template_child.Rendered]:
        if self._renderer is not None and not self._renderer.is_alive():
            self._drop()
        if self._renderer is None:
            self._renderer = Child("xllm_py.openai.template_child", template_child.Rendered)
            self._loaded = self._renderer.ask(template_child.Load(self._source), START_TIMEOUT_S)
        return self._renderer

    def _drop(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def close(self) -> None:
        """End the child; a later render starts a new one."""
        with self._lock:
            self._drop()


def load_chat_template(
    folder: str | Path, *, special_tokens: dict[str, str]
) -> ChatTemplate | None:
    """The folder's template, None when it has none; raises ModelLoadError when it is broken.

    Looks at chat_template.json, chat_template.jinja, then tokenizer_config.json. special_tokens: Tokenizer.special_tokens.
    """
    folder = Path(folder)
    for name in ("chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        source = _read_template(folder, name)
        if source is not None:
            return ChatTemplate(source, special_tokens=special_tokens, origin=str(folder / name))
    return None


def _read_template(folder: Path, name: str) -> str | None:
    path = folder / name
    if path.suffix == ".json":
        source = _choose(read_config(folder, name).get("chat_template"))
    elif path.is_file():
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise ModelLoadError(f"{path} is larger than 1 MiB; it cannot be a chat template")
        source = path.read_text(encoding="utf-8", errors="replace")
    else:
        source = None
    return source


def _choose(template: object) -> str | None:
    """A string, or the entry called `default` of a list of named templates."""
    if isinstance(template, list):
        named = {
            item.get("name"): item.get("template") for item in template if isinstance(item, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None
