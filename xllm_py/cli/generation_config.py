"""Sampling defaults from the model's generation_config.json, for requests that leave temperature, top_p, top_k or min_p out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xllm_py.base.errors import InvalidValue, ModelLoadError
from xllm_py.cli.rules import Causes
from xllm_py.core.sampling import SamplingParams

_FILE = "generation_config.json"
_NAMES = ("temperature", "top_p", "top_k", "min_p")


def sampling_defaults(causes: Causes, folder: Path) -> dict[str, float]:
    """What the file says of them; nothing without a file. A value we do not take is left out with a warning.

    Raises ModelLoadError for a broken file.
    """
    path = folder / _FILE
    try:
        body: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(
            f"{path} cannot be read ({error}). Repair it or pass --generation_config=none"
        ) from error
    if not isinstance(body, dict):
        raise ModelLoadError(
            f"{path} is no JSON object. Repair it or pass --generation_config=none"
        )
    if body.get("do_sample") is False:
        return {
            "temperature": 0.0
        }  # the file asks for greedy decoding; the rest has no meaning then
    found: dict[str, float] = {}
    for name in _NAMES:
        value = body.get(name)
        if name == "top_k" and value == 0:
            value = -1  # the file's word for all
        if value is None:
            continue
        if _fits(name, value):
            found[name] = value
        else:
            causes.warn(f"{_FILE}: {name} is {value!r}, which is not taken; our default stands")
    return found


def _fits(name: str, value: object) -> bool:
    if type(value) not in ((int,) if name == "top_k" else (int, float)):
        return False
    fields: dict[str, Any] = {name: value}
    try:
        SamplingParams(max_tokens=1, seed=0, **fields)
    except InvalidValue:
        return False
    return True
