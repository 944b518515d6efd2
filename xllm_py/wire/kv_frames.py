"""One direction of a KV link: headers out or in, numbered and signed. Used by both machines of wire/kv_session."""

from __future__ import annotations

from xllm_py.wire import codec
from xllm_py.wire.codec import Header, Reason


class Frames:
    """One direction of a link: sequence and key."""

    def __init__(self, key: bytes) -> None:
        self._signer = codec.Signer(key)
        self._seq = 0

    @property
    def seq(self) -> int:
        """Of the next frame."""
        return self._seq

    @property
    def signer(self) -> codec.Signer:
        """Of this direction."""
        return self._signer

    def pack(self, header: Header) -> bytes:
        """The next frame out; `header.seq` must be `seq`."""
        self._seq += 1
        return codec.pack_header(header, self._signer)

    def unpack(self, data: bytes) -> Header | Reason:
        """The next frame in: the first three checks."""
        header, ours = codec.unpack_header(data)
        if not ours:
            return Reason.BAD_FRAME
        if header.seq != self._seq:
            return Reason.BAD_SEQUENCE
        if not codec.is_signed(data, self._signer):
            return Reason.BAD_MAC
        self._seq += 1
        return header
