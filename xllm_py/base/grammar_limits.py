"""How much work the library for grammars may do, at the door that checks a grammar and at the engine that follows it: the same.

Its own values, by name, because a later version may have others. Source: LLParserLimits of llguidance 1.9.
"""

from __future__ import annotations

from typing import TypedDict


class GrammarLimits(TypedDict):
    """Keyword arguments of llguidance.LLParserLimits."""

    max_items_in_row: int
    initial_lexer_fuel: int
    step_lexer_fuel: int
    step_max_items: int
    max_lexer_states: int
    max_grammar_size: int
    verbose_errors: bool


GRAMMAR_LIMITS: GrammarLimits = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 250_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
