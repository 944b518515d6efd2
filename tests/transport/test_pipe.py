"""The engine pipe carries every message type and refuses what is none."""

import asyncio
import socket
import struct

import pytest

from xllm_py.base.errors import PeerUnavailable, ProtocolViolation
from xllm_py.core.config import EngineConfig
from xllm_py.core.plan import Outputs
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Receiver, Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.transport.pipe import ApiPipe, EnginePipe
from xllm_py.wire import messages as m

SUBMISSION = Submission(
    request_id="cmpl-1",
    prompt_ids=(1, 2, 3),
    sampling=SamplingParams(max_tokens=4, seed=-5, stop=("a",)),
    receiver=Receiver(name="d", address="127.0.0.1:1", incarnation="x"),
)
OFFER = Offer(
    submission=SUBMISSION,
    giver_name="p",
    giver_address="127.0.0.1:2",
    giver_incarnation="y",
    model_fingerprint="m",
    layout_fingerprint="l",
    block_size=4,
)
ANSWER = OfferAnswer(request_id="cmpl-1", attempt=1, grant=b"g" * 16, endpoints=("127.0.0.1:3",))
FIRST = FirstToken(request_id="cmpl-1", attempt=1, grant=b"g" * 16, token_ids=(7,))


def outputs() -> Outputs:
    made = Outputs(step=3)
    index = made.add("cmpl-1", 1, position=0, token_id=5, finish_reason="stop")
    made.journeys[index] = {"admitted": 0.5}
    made.messages[index] = "text"
    return made


COMMANDS = [
    m.Start(config=EngineConfig(cluster_key=b"k" * 32)),
    m.Submit(submissions=[SUBMISSION]),
    m.Abort(request_ids=["a"], attempts=[0]),
    m.Offers(offers=[OFFER]),
    m.Answers(answers=[ANSWER]),
    m.FirstTokens(firsts=[FIRST]),
    m.FirstTaken(request_ids=["a"], attempts=[1], accepted=[True]),
    m.PeerGone(incarnation="z"),
    m.Inspect(call=4),
    m.Drain(),
]
EVENTS = [
    m.Stepped(outputs=outputs()),
    m.Answers(answers=[ANSWER]),
    m.OffersOut(offers=[OFFER]),
    m.FirstTokensOut(receivers=["127.0.0.1:1"], firsts=[FIRST]),
    m.CancelsOut(receivers=["r"], request_ids=["a"], attempts=[1]),
    m.Progress(steps=4, blocks={"free": 3}),
    m.Ledger(call=4, counts={"free": 3}),
    m.Failed(exit_code=3, message="no"),
]


async def opened() -> tuple[ApiPipe, EnginePipe]:
    ours, theirs = socket.socketpair()
    return await ApiPipe.open(ours), EnginePipe(theirs)


async def test_every_command_arrives_as_it_was_sent():
    api, engine = await opened()
    for command in COMMANDS:
        api.send(command)
    seen: list[object] = []
    while len(seen) < len(COMMANDS):
        seen += await asyncio.wait_for(asyncio.to_thread(engine.receive), 5)
    assert seen == COMMANDS
    engine.close()
    await api.close()


async def test_every_event_arrives_as_it_was_sent():
    api, engine = await opened()
    for event in EVENTS:
        engine.send(event)
    seen: list[object] = []
    while len(seen) < len(EVENTS):
        seen += await asyncio.wait_for(api.receive(), 5)
    assert seen == EVENTS
    engine.close()
    await api.close()


async def test_the_end_of_either_side_is_an_error_at_the_other():
    api, engine = await opened()
    engine.close()
    with pytest.raises(PeerUnavailable):
        await asyncio.wait_for(api.receive(), 5)
    await api.close()
    api, engine = await opened()
    await api.close()
    with pytest.raises(PeerUnavailable):
        engine.receive()
    engine.close()


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<IB", 1, 200),  # unknown kind
        struct.pack("<IB", 0, 0),  # no length
        struct.pack("<IB", 1 << 31, 0),  # absurd length
        struct.pack("<IB", 3, 8) + b"\xc2\xc2",  # Inspect with trailing bytes
        struct.pack("<IB", 9, 8) + b"\x81\xa4call\xa1x\xc0",  # wrong type of field
    ],
)
def test_a_malformed_message_is_refused(raw: bytes):
    ours, theirs = socket.socketpair()
    engine = EnginePipe(theirs)
    ours.sendall(raw)
    with pytest.raises(ProtocolViolation):
        engine.receive()
    ours.close()
    engine.close()
