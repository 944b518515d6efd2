"""What a peer sends is bounded and checked before anything is built from it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_py.base.errors import InvalidValue, ProtocolViolation, XllmError
from xllm_py.control import bounds, convert, convert_streams
from xllm_py.control.pb import xllm_pb2 as pb
from xllm_py.core.request import Submission
from xllm_py.core.sampling import SamplingParams

ROOT = Path(__file__).resolve().parents[2]


def a_submission() -> pb.Submission:
    return convert.from_submission(
        Submission(request_id="r", prompt_ids=(1,), sampling=SamplingParams(max_tokens=1, seed=0))
    )


@pytest.mark.parametrize(
    "field, value",
    [
        ("request_id", ""),
        ("request_id", "x" * (bounds.MAX_LABEL + 1)),
        ("master", "x" * (bounds.MAX_LABEL + 1)),
        ("cache_salt", "x" * (bounds.MAX_LABEL + 1)),
        ("timeout_s", 0.0),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
    ],
)
def test_a_submission_with_a_bad_field_is_refused(field: str, value: object) -> None:
    message = a_submission()
    setattr(message, field, value)
    with pytest.raises(ProtocolViolation):
        convert.to_submission(message)


def test_a_submission_without_prompt_or_sampling_or_with_too_many_tokens_is_refused() -> None:
    for field in ("prompt_ids", "sampling"):
        message = a_submission()
        message.ClearField(field)
        with pytest.raises(ProtocolViolation):
            convert.to_submission(message)
    message = a_submission()
    message.generated_ids.extend([1] * bounds.MAX_IDS)
    with pytest.raises(ProtocolViolation):
        convert.to_submission(message)


def test_sampling_out_of_range_is_named() -> None:
    message = a_submission()
    message.sampling.temperature = 3.0
    with pytest.raises(InvalidValue) as caught:
        convert.to_submission(message)
    assert caught.value.param == "temperature"


def test_columns_of_different_length_are_refused() -> None:
    message = pb.GenerationsUp(outputs=pb.Outputs(request_ids=["a"], attempts=[1, 2]))
    with pytest.raises(ProtocolViolation, match="attempts"):
        convert_streams.to_up(message)


def test_a_sparse_column_that_names_an_unknown_entry_is_refused() -> None:
    outputs = pb.Outputs(request_ids=["a"], attempts=[1], choices=[0], positions=[0], token_ids=[1])
    outputs.messages[7] = "x"
    with pytest.raises(ProtocolViolation, match="messages"):
        convert_streams.to_up(pb.GenerationsUp(outputs=outputs))


def test_a_grant_of_another_length_and_an_unknown_role_are_refused() -> None:
    with pytest.raises(ProtocolViolation, match="grant"):
        convert.to_firsts(
            pb.FirstGenerationRequest(firsts=[pb.FirstToken(grant=b"short", token_ids=[1])])
        )
    with pytest.raises(ProtocolViolation, match="endpoint"):
        answer = pb.OfferAnswer(request_id="r", grant=b"g" * 16)
        convert.to_answers(pb.AddNewRequestsReply(answers=[answer]))
    with pytest.raises(ProtocolViolation, match="role"):
        convert_streams.to_heartbeat(pb.HeartbeatRequest(role=9))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise_anything_unforeseen(raw: bytes) -> None:
    from google.protobuf.message import DecodeError

    for kind, convert_it in (
        (pb.GenerationsUp, convert_streams.to_up),
        (pb.GenerationsDown, convert_streams.to_down),
        (pb.HeartbeatRequest, convert_streams.to_heartbeat),
        (pb.Submission, convert.to_submission),
        (pb.AddNewRequestsRequest, convert.to_offers),
        (pb.AddNewRequestsReply, convert.to_answers),
        (pb.FirstGenerationRequest, convert.to_firsts),
        (pb.CancelRequest, convert.to_cancel),
    ):
        try:
            message = kind.FromString(raw)
        except DecodeError:
            continue
        try:
            convert_it(message)
        except XllmError:
            continue


def test_generated_code_is_what_the_contract_says() -> None:
    python = os.environ.get("PROTO_PYTHON", "")
    if not python:
        pytest.skip("PROTO_PYTHON names no python with grpcio-tools 1.66.x")
    done = subprocess.run(
        [ROOT / "scripts" / "gen_proto.sh", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
