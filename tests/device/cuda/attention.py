"""cuda's attention in Triton's interpreter, a program of which takes milliseconds: tiles and windows are small here, so that short sequences have many.

Run by test_interpreted in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from tests.conformance.attention import Piece, Sequences, Shape
from tests.conformance.hosted import Hosted
from tests.device.cuda.support import Interpreted
from xllm_py.device.cuda import launch

WINDOW, KEYS, ROWS = 64, 32, 32
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
CASES = [
    (torch.float32, (4, 2, 24)),
    (torch.bfloat16, (7, 1, 16)),
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosted]:
    for name, value in (("WINDOW", WINDOW), ("_KEYS", KEYS), ("_ROWS", ROWS)):
        monkeypatch.setattr(launch, name, value)
    with torch.inference_mode():
        yield Hosted(Interpreted())


def made(
    device: Hosted,
    dtype: torch.dtype,
    lengths: dict[str, int],
    heads: tuple[int, int, int] = (4, 2, 32),
    block_size: int = 16,
) -> Sequences:
    shape = Shape(
        heads=heads[0], kv_heads=heads[1], head_dim=heads[2], block_size=block_size, dtype=dtype
    )
    return Sequences(device, shape, lengths, layers=1)


def check(sequences: Sequences, pieces: list[Piece]) -> None:
    limit = TOLERANCE[sequences.shape.dtype]
    for piece, got in zip(pieces, sequences.step(pieces, padding=3), strict=True):
        wanted = sequences.expected(piece)
        torch.testing.assert_close(got.double(), wanted, atol=limit, rtol=limit, msg=str(piece))


@pytest.mark.parametrize(("dtype", "heads"), CASES, ids=str)
def test_a_mixed_batch_gives_plain_attention(
    device: Hosted, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    lengths = {"whole": 70, "chunk": 90, "tail": 65, "one": 1, "long": 150}
    sequences = made(device, dtype, lengths, heads)
    sequences.write([Piece("chunk", 0, 33), Piece("tail", 0, 60), Piece("long", 0, 149)])
    check(
        sequences,
        [
            Piece("whole", 0, 70),
            Piece("chunk", 33, 90),
            Piece("tail", 60, 65),
            Piece("one", 0, 1),
            Piece("long", 149, 150),
        ],
    )


@pytest.mark.parametrize(("dtype", "heads"), CASES, ids=str)
def test_a_token_has_its_bits_whole_in_chunks_decoded_and_in_company(
    device: Hosted, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    sequences = made(device, dtype, {"a": 100, "b": 50}, heads)
    (whole,) = sequences.step([Piece("a", 0, 100)])
    cuts = [0, 29, 64, 65, 100]
    chunks = [sequences.step([Piece("a", *edge)])[0] for edge in pairwise(cuts)]
    assert torch.cat(chunks).equal(whole)
    for at in (0, 31, 63, 64, 99):
        found = sequences.step([Piece("b", 0, 17), Piece("a", at, at + 1)])[1]
        assert found.equal(whole[at : at + 1]), f"position {at}"


@pytest.mark.parametrize("sliding", [1, 100])
def test_a_sliding_window_hides_what_is_older(device: Hosted, sliding: int) -> None:
    sequences = made(device, torch.float32, {"a": 150, "b": 140})
    (whole,) = sequences.step([Piece("a", 0, 150)], sliding_window=sliding)
    wanted = sequences.expected(Piece("a", 0, 150), sliding)
    torch.testing.assert_close(whole.double(), wanted, atol=2e-5, rtol=2e-5)
    pieces = [Piece("a", 149, 150), Piece("b", 0, 3)]
    decoded = sequences.step(pieces, sliding_window=sliding)[0]
    assert decoded.equal(whole[149:])


@pytest.mark.parametrize("block_size", [4, 96])
def test_the_block_size_changes_no_bit(device: Hosted, block_size: int) -> None:
    wanted = made(device, torch.bfloat16, {"a": 100}).step([Piece("a", 0, 100)])
    found = made(device, torch.bfloat16, {"a": 100}, block_size=block_size)
    assert found.step([Piece("a", 0, 100)])[0].equal(wanted[0])
