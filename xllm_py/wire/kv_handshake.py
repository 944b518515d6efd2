"""Who a side of a KV link is, and what both sides derive from their first messages: proofs and link keys.

Used by wire/kv_session.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from xllm_py.base.hashing import derive_key, mac
from xllm_py.core.kv_memory import KvLayout
from xllm_py.wire import codec
from xllm_py.wire.codec import Hello, Payloads, Reason, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What one side says of itself in a handshake, and the secret that both share."""

    incarnation: str
    layout: KvLayout
    cluster_key: bytes
    nonce: bytes  # fresh for every link
    payloads: Payloads = Payloads.SOCKET  # how this side wants them to go
    stream: int = 0  # which of the links between these two; the side that connects says it

    def hello(self, step: Step) -> bytes:
        """CALL, HELLO or WELCOME."""
        return codec.pack_hello(
            Hello(
                step=step,
                incarnation=self.incarnation,
                layout=self.layout.fingerprint,
                nonce=self.nonce,
                block_size=self.layout.block_size,
                stream=self.stream,
                payloads=self.payloads,
            )
        )

    def agreement(self, said: bytes) -> Agreement:
        """What follows from the key and all that was said: CALL, when there was one, HELLO and WELCOME."""
        secret = derive_key(self.cluster_key, "kv transfer")
        return Agreement(
            taker_proof=mac(secret, b"taker" + said),
            giver_proof=mac(secret, b"giver" + said),
            giver_key=derive_key(secret, "giver to taker", said),
            taker_key=derive_key(secret, "taker to giver", said),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Proofs of the cluster key, and one key per direction."""

    taker_proof: bytes
    giver_proof: bytes
    giver_key: bytes
    taker_key: bytes


def payloads_with(peer: Hello, own: Payloads) -> Payloads:
    """How payloads go between these two."""
    return own if peer.payloads == own else Payloads.SOCKET


def fits(peer: Hello, layout: KvLayout) -> bool:
    """Whether KV can be exchanged with the peer."""
    return peer.layout == layout.fingerprint and (peer.rank, peer.num_ranks) == (0, 1)


def answering(call: bytes, identity: Identity) -> tuple[str, Identity] | Reason:
    """Giver, to the CALL of a taker: who it says it is, and who we are on the link that it wants. WELCOME has to prove it."""
    peer = codec.unpack_hello(call, Step.CALL)
    if isinstance(peer, Reason):
        return peer
    layout = (
        cut_as(peer, identity.layout) or identity.layout
    )  # on_welcome refuses what does not fit
    return peer.incarnation, replace(identity, layout=layout, stream=peer.stream)


def cut_as(peer: Hello, layout: KvLayout) -> KvLayout | None:
    """Our layout in blocks of the size that the link counts in, as the peer says; None when it does not fit."""
    if not fits(peer, layout) or not peer.block_size or layout.block_size % peer.block_size:
        return None
    return layout.at(peer.block_size)
