"""What instances have said of a request that another master was asked for: their logs put together.

P has the first token, D all others, and an attempt may have begun where an earlier one ended, so each log has gaps; what none of them fills
is where the answer goes on. The last token is left to be said again: with it comes how the answer ends, if it does.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

from xllm_py.base import log
from xllm_py.base.errors import XllmError
from xllm_py.cluster.instance_info import Card
from xllm_py.cluster.membership import InstanceState
from xllm_py.control.bounds import MAX_IDS
from xllm_py.core.request import MAX_ORIGIN
from xllm_py.master.instance_manager import InstanceManager
from xllm_py.master.peers import Peers
from xllm_py.openai.backend import Told

_log = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One instance's word; -1 for a token that it has not seen."""

    ids: Sequence[int]
    origin: bytes = b""
    numerics: str = ""


async def recall(manager: InstanceManager, peers: Peers, stream_id: str) -> Told | None:
    """Ask every instance that is not gone; those that do not answer are passed over, since whatever they know can be computed again."""
    cards = [each.card for each in manager.members() if each.view.state is not InstanceState.GONE]
    heard = await asyncio.gather(*(_ask(peers, card, stream_id) for card in cards))
    return together([each for each in heard if each is not None])


async def _ask(peers: Peers, card: Card, stream_id: str) -> Said | None:
    try:
        found = await peers.of(card).describe(stream_id)
    except XllmError as error:
        _log.info("not recalled", instance=card.name, reason=error.message)
        return None
    token_ids, origin = found.get("ids"), found.get("origin", "")
    if not (isinstance(token_ids, list) and isinstance(origin, str)):
        return None
    sound = len(token_ids) <= MAX_IDS and all(type(each) is int for each in token_ids)
    if not sound or len(origin) > 2 * MAX_ORIGIN:
        _log.warning("not recalled", instance=card.name, reason="its log makes no sense")
        return None
    try:
        asked = base64.b64decode(origin, validate=True)
    except binascii.Error:
        asked = b""
    return Said(ids=token_ids, origin=asked, numerics=card.numerics_fingerprint)


def together(heard: Sequence[Said]) -> Told | None:
    """One story of many; None when there is none. Of logs that contradict each other nothing is believed but what was asked."""
    if not heard:
        return None
    origin = next((each.origin for each in heard if each.origin), b"")
    token_ids: list[int] = []
    while True:
        at = len(token_ids)
        said = {each.ids[at] for each in heard if len(each.ids) > at and each.ids[at] >= 0}
        if len(said) > 1:
            return Told(origin=origin)
        if not said:
            break
        token_ids += said
    numerics = {each.numerics for each in heard}
    return Told(
        ids=tuple(token_ids[:-1]),
        numerics=numerics.pop() if len(numerics) == 1 else "",
        origin=origin,
    )
