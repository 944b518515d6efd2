"""An instance dies or falls silent while requests are in every phase: their clients hear it at once, the survivor lets go of all.

Until requests are submitted again elsewhere, each is 503 instance_lost, or an error event as the last word of a stream. What
D decodes already does not need P any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import LONG_PROMPT, all_let_go, body, in_handoff, reaches, serves_in_pairs

DECODING = body([7, 9], max_tokens=500, temperature=0, stream=True)


@pytest.fixture(scope="module")
def cluster(slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """P computes one token a step and one request at a time; the master bears silence, but not a broken connection."""
    with running(tmp_path_factory.mktemp("losses"), slow_model) as made:
        made.start_master("--suspect_after_ms=30000", "--gone_after_ms=30000")
        slowly = (
            "--max_seqs_per_batch=1",
            "--max_tokens_per_chunk_for_prefill=1",
            "--enable_prefix_cache=false",
        )
        alone = (
            "--enable_local_decode=false"  # else P may have saved a request before its loss is seen
        )
        made.start_instance("prefill", "PREFILL", "--block_size=16", alone, *slowly)
        made.start_instance("decode", "DECODE", "--block_size=16")
        made.wait_ready()
        serves_in_pairs(made.daemons[0])
        yield made


def is_lost(pending: Pending) -> None:
    """503 with its code, and when to try again."""
    answer = pending.answer(10)
    assert (answer.status, answer.error["code"]) == (503, "instance_lost")
    assert int(answer.headers["retry-after"]) >= 1
    assert "127.0.0.1" not in answer.error["message"]


def in_every_phase(cluster: Cluster) -> tuple[Pending, Pending, Pending]:
    """One request that D decodes, one that P computes, one that waits at P."""
    master, prefill, decode = cluster.daemons
    decoding = Pending(master, DECODING)
    decoding.wait_pieces(3)
    reaches(decode, requests_running=1)
    prefilling = Pending(master, body(LONG_PROMPT, stream=True))
    reaches(prefill, requests_running=1, kv_grants_given=1)
    queued = Pending(master, body(LONG_PROMPT))
    reaches(prefill, requests_running=1, requests_waiting=1)
    return decoding, prefilling, queued


def text_of(pending: Pending) -> str:
    """Of a stream that ended well."""
    assert pending.answer().status == 200
    assert pending.pieces[-1] == "[DONE]", pending.pieces[-1]
    return "".join(piece["choices"][0]["text"] for piece in pending.pieces[:-1])


def test_when_p_is_killed_only_what_d_decodes_goes_on(cluster: Cluster) -> None:
    master, prefill, decode = cluster.daemons
    whole = text_of(Pending(master, DECODING))
    decoding, prefilling, queued = in_every_phase(cluster)
    prefill.kill()
    is_lost(prefilling)
    is_lost(queued)
    assert text_of(decoding) == whole
    all_let_go(master, decode)
    prefill.start()
    serves_in_pairs(master)


def test_when_d_is_killed_every_request_of_the_pair_hears_it(cluster: Cluster) -> None:
    master, prefill, decode = cluster.daemons
    decoding, prefilling, queued = in_every_phase(cluster)
    decode.kill()
    assert decoding.stream_error(10)["code"] == "instance_lost"
    is_lost(prefilling)
    is_lost(queued)
    all_let_go(master, prefill)
    decode.start()
    serves_in_pairs(master)


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_when_either_is_killed_in_the_handoff_the_other_lets_go(
    cluster: Cluster, victim: str
) -> None:
    master, prefill, decode = cluster.daemons
    killed, survivor = (prefill, decode) if victim == "prefill" else (decode, prefill)
    with in_handoff(cluster) as pending:
        killed.kill()
        is_lost(pending)
    all_let_go(master, survivor)
    killed.start()
    serves_in_pairs(master)


def test_when_d_stands_still_its_late_tokens_do_harm_to_nobody(direct_cluster: Cluster) -> None:
    master, prefill, decode = direct_cluster.daemons
    decoding = Pending(master, {**DECODING, "max_tokens": 2000})
    decoding.wait_pieces(3)
    with decode.frozen(engine_too=True):
        assert decoding.stream_error(20)["code"] == "instance_lost"
        wait_for("all blocks of P back", prefill.idle, 10)
    all_let_go(master, prefill, decode)
    serves_in_pairs(master)


def test_when_a_relaying_p_is_killed_d_goes_on_directly(relayed_cluster: Cluster) -> None:
    master, prefill, decode = relayed_cluster.daemons
    whole = text_of(Pending(master, {**DECODING, "max_tokens": 1000}))
    decoding = Pending(master, {**DECODING, "max_tokens": 1000})
    decoding.wait_pieces(3)
    reaches(decode, requests_running=1)
    prefill.kill()
    assert text_of(decoding) == whole
    all_let_go(master, decode)
    prefill.start()
    serves_in_pairs(master)
