"""The gate of the original for mlu devices with prefill and decode apart (SPEC 6.8), as a pure function over flag values.

There is no mlu device here: the rule is kept whole so that a command line written for one means what it meant, up to the word that
the device is missing. Called by cli/xllm before the other rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_py.cli.rules import Causes

DEVICE = "mlu"
_ALWAYS: Mapping[str, Any] = {
    "kv_cache_transfer_mode": "PUSH",
    "kv_cache_dtype": "auto",
    "enable_schedule_overlap": False,
    "enable_pd_ooc": False,
}
_COMPUTE_PROMPTS = ("PREFILL", "MIX")


def normalize_mlu(causes: Causes, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as an mlu instance takes them: the same when the device is another one or --enable_disagg_pd is off.

    Notes a cause for a backend or a block size that mlu does not have, and warns of each value that it changes.
    """
    kinds = {part.strip().partition(":")[0] for part in values["devices"].split(",")}
    if DEVICE not in kinds or not values["enable_disagg_pd"]:
        return dict(values)
    causes.need(
        values["backend"] in ("", "llm"),
        f"--backend={values['backend']} is not there on mlu. Use llm",
    )
    causes.need(
        values["block_size"] in (1, 16),
        f"--block_size={values['block_size']} is not there on mlu with --enable_disagg_pd. Use 16 or 1",
    )
    wanted = dict(_ALWAYS)
    if values["instance_role"] not in _COMPUTE_PROMPTS:
        wanted["enable_prefix_cache"] = False
    for name, value in wanted.items():
        if values[name] != value:
            causes.warn(f"on mlu --{name}: {_word(values[name])} -> {_word(value)}")
    return {**values, **wanted}


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
