"""The named moments of a request, the same wherever they are shown (DESIGN section 7).

A process stamps the moments it sees with its own monotonic clock and reports them as seconds since it received the
request; the master lays them onto its own clock, so that two clocks are never mixed.
"""

from __future__ import annotations

from enum import StrEnum


class Moment(StrEnum):
    """In the order in which they normally happen."""

    RECEIVED = "received"
    PLACED = "placed"  # the master chose instances
    ADMITTED = "admitted"  # the engine gave it blocks and a batch row
    OFFERED = "offered"  # P asked D
    GRANTED = "granted"  # D reserved
    FIRST_TOKEN = "first_token"
    LANDED = "landed"  # all KV is on D and verified
    DECODING = "decoding"  # D (or a lone instance) took it into its batch
    FINISHED = "finished"
