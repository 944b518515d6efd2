"""The process that compiles grammars of clients: `python -m xllm_py.openai.grammar_child <fd>`.

Started and, when it overstays, killed by `structured`, through `child`. Compiles each grammar for a vocabulary of single bytes
and takes the first step of it, as an engine would.
"""

from __future__ import annotations

import sys

import llguidance
import msgspec

from xllm_py.base.grammar_limits import GRAMMAR_LIMITS
from xllm_py.openai.child import serve


class Check(msgspec.Struct, tag=True, frozen=True):
    """A grammar in llguidance's form. An empty one only asks whether somebody is there."""

    grammar: str


class Checked(msgspec.Struct, tag=True, frozen=True):
    """Good when `cause` is empty; else why not, in the library's words."""

    cause: str = ""


class Bytes:
    """A vocabulary of 256 bytes and an end, in the shape llguidance asks for."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"</s>"]  # noqa: RUF012 - never written
    special_token_ids = [256]  # noqa: RUF012 - never written

    def __call__(self, text: bytes) -> list[int]:
        """One token a byte."""
        return list(text)


class Checker:
    """Holds the vocabulary, so that a check costs only its own."""

    def __init__(self) -> None:
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
        self._limits = llguidance.LLParserLimits(**GRAMMAR_LIMITS)

    def check(self, message: Check) -> Checked:
        """Whether an engine can follow it."""
        if not message.grammar:
            return Checked()
        failed, words = llguidance.LLMatcher.validate_grammar_with_warnings(
            message.grammar, limits=self._limits
        )
        if failed or words:
            # a warning is something that would be passed over, or a special token, which is no text
            return Checked(cause=_cause("; ".join(words)))
        matcher = llguidance.LLMatcher(
            self._tokenizer, message.grammar, log_level=0, limits=self._limits
        )
        matcher.compute_bitmask()
        return Checked(cause=_cause(matcher.get_error()) if matcher.is_error() else "")


def _cause(words: str) -> str:
    """The library's words in one line; of a regex's picture only the error."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it cannot be compiled"])[0][:300]


if __name__ == "__main__":
    serve(int(sys.argv[1]), Check, Checker().check)
