"""Who a side of a KV link is, and what both sides derive from their first messages: proofs and link keys.

Used by wire/kv_session.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from xllm_py.base.hashing import derive_key, mac
from xllm_py.core.kv_memory import KvLayout
from xllm_py.core.kv_plan import Share
from xllm_py.wire import codec
from xllm_py.wire.codec import Hello, Payloads, Reason, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What one side says of itself in a handshake, and the secret that both share."""

    incarnation: str
    layout: KvLayout  # of this rank's cache, in blocks of the size that the link counts in
    cluster_key: bytes
    nonce: bytes  # fresh for every link
    payloads: Payloads = Payloads.SOCKET  # how this side wants them to go
    stream: int = 0  # which of the links between these two; the side that connects says it
    share: Share = field(default_factory=Share)

    @property
    def whole(self) -> str:
        """Name of what a token's KV looks like with the heads of all ranks: what both sides must have in common."""
        return self.layout.heads(self.share.num_heads).fingerprint

    def hello(self, step: Step) -> bytes:
        """CALL, HELLO or WELCOME."""
        return codec.pack_hello(
            Hello(
                step=step,
                incarnation=self.incarnation,
                layout=self.whole,
                rank=self.share.rank,
                num_ranks=self.share.num_ranks,
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


@dataclass(frozen=True, slots=True)
class Peer:
    """One rank of another instance."""

    incarnation: str
    rank: int = 0
    num_ranks: int = 1

    @property
    def name(self) -> str:
        """What links and grants know it by."""
        return self.incarnation if self.num_ranks == 1 else f"{self.incarnation}/{self.rank}"


def peer_of(hello: Hello) -> Peer:
    """Who says this."""
    return Peer(hello.incarnation, hello.rank, hello.num_ranks)


def answering(call: bytes, identity: Identity) -> tuple[Peer, Identity] | Reason:
    """Giver, to the CALL of a taker: who it says it is, and who we are on the link that it wants. WELCOME has to prove it."""
    peer = codec.unpack_hello(call, Step.CALL)
    if isinstance(peer, Reason):
        return peer
    layout = cut_as(peer, identity) or identity.layout  # on_welcome refuses what does not fit
    return peer_of(peer), replace(identity, layout=layout, stream=peer.stream)


def cut_as(peer: Hello, identity: Identity) -> KvLayout | None:
    """Our layout in blocks of the size that the link counts in, as the peer says; None when it does not fit."""
    layout = identity.layout
    if peer.layout != identity.whole or not peer.block_size or layout.block_size % peer.block_size:
        return None
    return layout.at(peer.block_size)
