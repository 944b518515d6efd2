"""Answers that follow a form, over HTTP: the same from one instance and from a pair, whole and streamed, and for the OpenAI client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.pending import Pending

SCHEMA = {
    "type": "object",
    "properties": {
        "sort": {"enum": ["cat", "dog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["sort", "legs"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
ASKED: list[dict[str, Any]] = [
    {"response_format": FORM},
    {"response_format": FORM, "n": 2, "best_of": 3, "logprobs": 2, "frequency_penalty": 0.5},
    {"guided_choice": ["yes", "no", "it depends"]},
    {"guided_regex": r"[0-9]{4}-[0-9]{2}"},
    {"guided_grammar": 'start: "a" rest\nrest: "b" | "(" start ")"'},
]


def body(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "tiny", "prompt": [3, 1, 4, 1, 5], "max_tokens": 200, "seed": 9, **fields}


def choices(cluster: Cluster, fields: dict[str, Any]) -> list[dict[str, Any]]:
    status, answer = cluster.daemons[0].request("POST", "/v1/completions", body(fields))
    assert status == 200, answer
    found: list[dict[str, Any]] = answer["choices"]
    return found


@pytest.mark.parametrize("fields", ASKED, ids=lambda fields: "+".join(fields))
def test_a_pair_says_what_one_instance_says(
    pd_cluster: Cluster, lone_instance: Cluster, fields: dict[str, Any]
) -> None:
    alone = choices(lone_instance, fields)
    assert choices(pd_cluster, fields) == alone
    for each in alone:
        assert each["finish_reason"] == "stop", each
        if "response_format" in fields:
            assert set(json.loads(each["text"])) == {"sort", "legs"}
        if "guided_choice" in fields:
            assert each["text"] in fields["guided_choice"]


@pytest.mark.parametrize("fields", [ASKED[0], ASKED[2]], ids=lambda fields: "+".join(fields))
def test_a_stream_says_the_same(pd_cluster: Cluster, fields: dict[str, Any]) -> None:
    pending = Pending(pd_cluster.daemons[0], {**body(fields), "stream": True})
    assert pending.answer().status == 200
    assert pending.pieces[-1] == "[DONE]"
    text = "".join(piece["choices"][0]["text"] for piece in pending.pieces[:-1])
    assert text == choices(pd_cluster, fields)[0]["text"]


def test_the_openai_client_gets_an_object(pd_cluster: Cluster) -> None:
    port = pd_cluster.daemons[0].port
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "an animal, please"}],
            response_format=FORM,  # type: ignore[arg-type]  # a TypedDict of that library
            max_tokens=200,
            seed=4,
        )
        assert set(json.loads(answer.choices[0].message.content or "")) == {"sort", "legs"}
        with pytest.raises(openai.BadRequestError, match="'if'"):
            client.completions.create(
                model="tiny", prompt="x", extra_body={"guided_json": {"if": {}}}
            )
