"""An instance dies or stands still while requests are in every phase: each of them still ends well, with the text it would have had.

The other instance goes on with it, or the next life of the one that died; the survivor lets go of all that is over. What D decodes
already does not need P any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import (
    LONG_PROMPT,
    all_let_go,
    body,
    in_handoff,
    reaches,
    serves_in_pairs,
    shows,
)

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


def in_every_phase(cluster: Cluster) -> tuple[Pending, Pending, Pending]:
    """One request that D decodes, one that P computes, one that waits for it: at P, or at the master where P has become slow."""
    master, prefill, decode = cluster.daemons
    decoding = Pending(master, DECODING)
    decoding.wait_pieces(3)
    reaches(decode, requests_running=1)
    prefilling = Pending(master, body(LONG_PROMPT, stream=True))
    reaches(prefill, requests_running=1, kv_grants_given=1)
    queued = Pending(master, body(LONG_PROMPT))
    at_p = {"requests_running": 1, "requests_waiting": 1}
    wait_for("one to wait", lambda: shows(prefill, at_p) or shows(master, {"queued": 1}))
    return decoding, prefilling, queued


def text_of(pending: Pending) -> str:
    """Of an answer that ended well; of a stream, one without a gap and with one end."""
    answer = pending.answer()
    assert answer.status == 200, answer
    if answer.body is not None:
        return str(answer.body["choices"][0]["text"])
    assert pending.pieces[-1] == "[DONE]", pending.pieces[-1]
    assert pending.pieces.count("[DONE]") == 1
    finishes = [piece["choices"][0]["finish_reason"] for piece in pending.pieces[:-1]]
    assert [each for each in finishes if each] == ["length"]
    return "".join(piece["choices"][0]["text"] for piece in pending.pieces[:-1])


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> tuple[str, str, str]:
    """What the three of `in_every_phase` say when nothing happens."""
    master = cluster.daemons[0]
    return (
        text_of(Pending(master, DECODING)),
        text_of(Pending(master, body(LONG_PROMPT, stream=True))),
        text_of(Pending(master, body(LONG_PROMPT))),
    )


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_when_one_is_killed_every_request_goes_on_with_its_next_life(
    cluster: Cluster, whole: tuple[str, str, str], victim: str
) -> None:
    master, prefill, decode = cluster.daemons
    pendings = in_every_phase(cluster)
    killed = prefill if victim == "prefill" else decode
    killed.kill()
    killed.start()
    assert tuple(text_of(pending) for pending in pendings) == whole
    cluster.wait_ready(killed)
    all_let_go(master, prefill, decode)
    serves_in_pairs(master)


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_when_either_is_killed_in_the_handoff_the_answer_still_comes(
    cluster: Cluster, victim: str
) -> None:
    master, prefill, decode = cluster.daemons
    killed = prefill if victim == "prefill" else decode
    with in_handoff(cluster) as pending:
        killed.kill()
    killed.start()
    assert text_of(pending) == text_of(Pending(master, pending.body))
    cluster.wait_ready(killed)
    all_let_go(master, prefill, decode)
    serves_in_pairs(master)


def test_without_another_d_a_p_that_may_decode_does(tiny_model: Path, tmp_path: Path) -> None:
    """The only D is killed for good."""
    with running(tmp_path, tiny_model) as made:
        master = made.start_master()
        prefill = made.start_instance("prefill", "PREFILL", "--block_size=16")
        decode = made.start_instance("decode", "DECODE", "--block_size=16")
        made.wait_ready()
        serves_in_pairs(master)
        asked = body([7, 9], max_tokens=1500, temperature=0.8, seed=5, stream=True)
        right = text_of(Pending(master, asked))
        pending = Pending(master, asked)
        pending.wait_pieces(20)
        decode.kill()
        assert text_of(pending) == right
        all_let_go(master, prefill)


def test_when_d_stands_still_another_goes_on_and_its_late_tokens_do_harm_to_nobody(
    direct_cluster: Cluster,
) -> None:
    master, prefill, decode = direct_cluster.daemons
    asked = {**DECODING, "max_tokens": 2000}
    right = text_of(Pending(master, asked))
    decoding = Pending(master, asked)
    decoding.wait_pieces(3)
    with decode.frozen(engine_too=True):
        assert text_of(decoding) == right  # by P, which may decode
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
