"""normalize_mlu: what it changes, what it says, and when it keeps its hands off."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_py.cli.mlu import normalize_mlu
from xllm_py.cli.rules import Causes
from xllm_py.cli.xllm_flags import TABLE

DEFAULTS = {flag.name: flag.default for flag in TABLE}
MLU = {"devices": "mlu:0", "enable_disagg_pd": True, "block_size": 16}


def normalized(**given: Any) -> tuple[dict[str, Any], Causes]:
    causes = Causes()
    return normalize_mlu(causes, {**DEFAULTS, **MLU, **given}), causes


def test_every_value_that_changes_is_told_from_and_to() -> None:
    values, causes = normalized(
        instance_role="DECODE",
        kv_cache_transfer_mode="PULL",
        kv_cache_dtype="int8",
        enable_schedule_overlap=True,
        enable_pd_ooc=True,
    )
    assert causes.lines == []
    assert sorted(causes.warnings) == [
        "on mlu --enable_pd_ooc: true -> false",
        "on mlu --enable_prefix_cache: true -> false",
        "on mlu --enable_schedule_overlap: true -> false",
        "on mlu --kv_cache_dtype: int8 -> auto",
        "on mlu --kv_cache_transfer_mode: PULL -> PUSH",
    ]
    assert values["kv_cache_transfer_mode"] == "PUSH"
    assert not values["enable_prefix_cache"]


@pytest.mark.parametrize(
    ("role", "kept"), [("PREFILL", True), ("MIX", True), ("DECODE", False), ("DEFAULT", False)]
)
def test_the_prefix_cache_stays_where_prompts_are_computed(role: str, kept: bool) -> None:
    values, causes = normalized(instance_role=role)
    assert values["enable_prefix_cache"] is kept
    assert bool(causes.warnings) is not kept


@pytest.mark.parametrize("given", [{"block_size": 128}, {"backend": "vlm"}])
def test_what_mlu_does_not_have_is_a_cause(given: dict[str, Any]) -> None:
    _, causes = normalized(**given)
    (line,) = causes.lines
    assert f"--{next(iter(given))}=" in line and "Use" in line


@pytest.mark.parametrize(
    "given", [{"devices": "npu:0"}, {"devices": ""}, {"enable_disagg_pd": False}]
)
def test_other_devices_and_whole_instances_are_left_alone(given: dict[str, Any]) -> None:
    wanted = {"block_size": 128, "kv_cache_transfer_mode": "PULL", "enable_pd_ooc": True, **given}
    values, causes = normalized(**wanted)
    assert values == {**DEFAULTS, **MLU, **wanted}
    assert (causes.lines, causes.warnings) == ([], [])
