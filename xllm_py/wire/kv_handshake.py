"""Who a side of a KV link is, and what both sides derive from their first two messages: proofs and link keys.

Used by wire/kv_session.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm_py.base.hashing import derive_key, mac
from xllm_py.core.kv_memory import KvLayout
from xllm_py.wire import codec
from xllm_py.wire.codec import Hello, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What one side says of itself in a handshake, and the secret that both share."""

    incarnation: str
    layout: KvLayout
    cluster_key: bytes
    nonce: bytes  # fresh for every link
    stream: int = 0  # giver: which of its links to this peer

    def hello(self, step: Step) -> bytes:
        """HELLO or WELCOME."""
        return codec.pack_hello(
            Hello(
                step=step,
                incarnation=self.incarnation,
                layout=self.layout.fingerprint,
                nonce=self.nonce,
                block_size=self.layout.block_size,
                stream=self.stream,
            )
        )

    def agreement(self, hello: bytes, welcome: bytes) -> Agreement:
        """What follows from the key and both messages."""
        secret = derive_key(self.cluster_key, "kv transfer")
        both = hello + welcome
        return Agreement(
            taker_proof=mac(secret, b"taker" + both),
            giver_proof=mac(secret, b"giver" + both),
            giver_key=derive_key(secret, "giver to taker", both),
            taker_key=derive_key(secret, "taker to giver", both),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Proofs of the cluster key, and one key per direction."""

    taker_proof: bytes
    giver_proof: bytes
    giver_key: bytes
    taker_key: bytes


def fits(peer: Hello, layout: KvLayout) -> bool:
    """Whether KV can be exchanged with the peer."""
    return peer.layout == layout.fingerprint and (peer.rank, peer.num_ranks) == (0, 1)


def cut_as(peer: Hello, layout: KvLayout) -> KvLayout | None:
    """Taker: our layout in blocks of the size that the giver counts in; None when it does not fit."""
    if not fits(peer, layout) or not peer.block_size or layout.block_size % peer.block_size:
        return None
    return layout.at(peer.block_size)
