"""One suite for every device that is there: cpu with torch's kernels and those of each instruction set this machine has, what cuda
computes with where there is no Triton, and in processes of their own the simulated npu (XLLM_SIMULATE_NPU=2) and cuda's kernels in
Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from tests.conformance.attention import Piece, Sequences, Shape
from tests.conformance.hosted import Hosted, PlainTorch
from tests.devices import BLOCK_SIZE, INTERPRETED, SIMULATED
from xllm_py.base.errors import DeviceUnavailable
from xllm_py.device.base import (
    AttentionBatch,
    Device,
    Drawing,
    HeadNorms,
    KvShape,
    Quantized,
    Turn,
)
from xllm_py.device.cpu import CpuDevice
from xllm_py.device.cpu.native.build import instruction_sets
from xllm_py.device.cpu.torch_kernels import TorchKernels
from xllm_py.device.npu import NpuDevice

DTYPES = [torch.float32, torch.bfloat16]
# of values drawn from N(0, 1): bfloat16 keeps 8 bits of a result, and of a probability where the device computes in it
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
EDGES = (511, 512, 513, 1023, 1024, 1025, 1300)
HEADS = [(4, 2, 64), (7, 1, 16), (14, 2, 64), (9, 3, 24), (1, 1, 128)]


OPENED = [(kernels, threads) for kernels in ("torch", *instruction_sets()) for threads in (1, 2)]
if SIMULATED:
    OPENED = [("npu", 1)]
elif INTERPRETED:
    OPENED = [("triton", 1)]
else:
    OPENED.append(("apart", 1))


def interpreted() -> Hosted:
    from tests.device.cuda.support import Interpreted

    return Hosted(Interpreted())


APART = {
    "npu": lambda: Hosted(NpuDevice(1), block=128),
    "apart": lambda: Hosted(PlainTorch()),
    "triton": interpreted,
}


@pytest.fixture(params=OPENED, ids=lambda it: f"{it[0]}-threads{it[1]}")
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    kernels, threads = request.param
    if kernels in APART:
        with torch.inference_mode():
            apart = APART[kernels]()
            yield apart
            apart.close()
        return
    before = torch.get_num_threads()
    opened = CpuDevice(0, threads=threads, kernels=kernels)
    assert isinstance(opened._kernels, TorchKernels) == (kernels == "torch")
    yield opened
    opened.close()
    torch.set_num_threads(before)


def shape_of(
    dtype: torch.dtype, heads: tuple[int, int, int], block_size: int = BLOCK_SIZE
) -> Shape:
    return Shape(
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=heads[2],
        block_size=block_size,
        dtype=dtype,
    )


def check(sequences: Sequences, pieces: list[Piece], padding: int = 0, limit: float = 0.0) -> None:
    """One step gives what plain attention gives, within the dtype's tolerance or a wider one."""
    limit = limit or TOLERANCE[sequences.shape.dtype]
    for piece, got in zip(pieces, sequences.step(pieces, padding), strict=True):
        wanted = sequences.expected(piece)
        torch.testing.assert_close(got.double(), wanted, atol=limit, rtol=limit, msg=str(piece))


def only_exact_products(device: Device) -> None:
    """torch's own products on the host promise nothing of bits; a device finds out at start what its own do."""
    if isinstance(device, Hosted) and isinstance(device.inner, PlainTorch):
        pytest.skip("products are torch's own here")


def settle(device: Device) -> None:
    """What was written into the host's bytes of the cache is to be seen."""
    if isinstance(device, Hosted):
        device.settle()


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turn_of(cos: torch.Tensor, sin: torch.Tensor, positions: list[int]) -> Turn:
    return Turn(cos=cos, sin=sin, positions=torch.tensor(positions))


def in_pieces(sequences: Sequences, name: str, cuts: list[int]) -> torch.Tensor:
    """A whole sequence computed alone, cut at these positions."""
    done = [sequences.step([Piece(name, *edge)])[0] for edge in pairwise(cuts)]
    return torch.cat(done)


# ---- attention against the oracle ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_mixed_batch_of_prompts_chunks_and_decodes_gives_plain_attention(
    device: Device, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    lengths = {"whole": 130, "chunk": 600, "tail": 517, "one": 1, "short": 3, "long": 1100}
    sequences = Sequences(device, shape_of(dtype, heads), lengths)
    sequences.write([Piece("chunk", 0, 333), Piece("tail", 0, 510), Piece("long", 0, 1099)])
    pieces = [
        Piece("long", 1099, 1100),
        Piece("whole", 0, 130),
        Piece("one", 0, 1),
        Piece("chunk", 333, 600),
        Piece("tail", 510, 517),
        Piece("short", 0, 3),
    ]
    check(sequences, pieces, padding=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_at_every_edge_of_blocks_and_windows_give_plain_attention(
    device: Device, dtype: torch.dtype
) -> None:
    lengths = {f"s{n}": n for n in (1, 2, 15, 16, 17, 31, 32, 33, *EDGES)}
    sequences = Sequences(device, shape_of(dtype, (6, 2, 32)), lengths)
    for name, length in lengths.items():
        if length > 1:
            sequences.write([Piece(name, 0, length - 1)])
    check(sequences, [Piece(name, length - 1, length) for name, length in lengths.items()], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [512, 513, 1025])
def test_a_prompt_that_ends_at_the_edge_of_a_window_gives_plain_attention(
    device: Device, dtype: torch.dtype, length: int
) -> None:
    sequences = Sequences(device, shape_of(dtype, (4, 2, 16), block_size=128), {"a": length})
    check(sequences, [Piece("a", 0, length)])


@pytest.mark.parametrize("block_size", [1, 4, 16, 96, 128, 700])
def test_any_block_size_gives_plain_attention(device: Device, block_size: int) -> None:
    lengths = {"a": 701, "b": 40, "c": 96}
    sequences = Sequences(device, shape_of(torch.float32, (4, 2, 16), block_size), lengths)
    sequences.write([Piece("a", 0, 690)])
    check(sequences, [Piece("a", 690, 701), Piece("b", 0, 40), Piece("c", 0, 96)])


def test_scores_far_apart_neither_overflow_nor_vanish(device: Device) -> None:
    sequences = Sequences(device, shape_of(torch.float32, (2, 1, 16)), {"a": 1030})
    sequences.keys["a"][:512] *= 100  # the first window rules, the last takes over
    sequences.keys["a"][1024:] *= 200
    # scores of some hundreds are known to 1e-4 in float32, and their exponentials no better
    check(sequences, [Piece("a", 0, 1030)], limit=2e-3)


# ---- invariance, to the bit ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_chunks_of_any_size_give_the_bits_of_the_whole_prompt(
    device: Device, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    length = 530
    sequences = Sequences(device, shape_of(dtype, heads), {"a": length})
    whole = in_pieces(sequences, "a", [0, length])
    for size in (29, 64, 512):
        cuts = [*range(0, length, size), length]
        assert in_pieces(sequences, "a", cuts).equal(whole), f"chunks of {size}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_kernels_have_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    lengths = {"a": 700, "b": 130, "c": 1}
    weight, before = draw(300, 256, seed=1).to(dtype), torch.get_num_threads()
    found: list[list[torch.Tensor]] = []
    for threads in (1, 2, 3, 5):
        device = CpuDevice(0, threads=threads)
        sequences = Sequences(device, shape_of(dtype, (6, 2, 32)), lengths)
        pieces = [Piece(name, 0, length) for name, length in lengths.items()]
        x = draw(77, 256, seed=2).to(dtype)
        found.append([*sequences.step(pieces), device.pack_linear(weight, None)(x)])
        device.close()
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(mine.equal(first) for mine, first in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_decoded_token_has_the_bits_of_the_prefilled_one(
    device: Device, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    sequences = Sequences(device, shape_of(dtype, heads), {"a": 1026})
    whole = in_pieces(sequences, "a", [0, 1026])
    for at in (0, 1, 15, 16, 510, 511, 512, 1022, 1023, 1024, 1025):
        alone = sequences.step([Piece("a", at, at + 1)])[0]
        assert alone.equal(whole[at : at + 1]), f"position {at}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_token_has_the_same_bits_in_any_company(
    device: Device, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    lengths = {"a": 520, "b": 33, "c": 1, "d": 1050, "e": 200}
    sequences = Sequences(device, shape_of(dtype, heads), lengths)
    whole = {name: in_pieces(sequences, name, [0, length]) for name, length in lengths.items()}
    companies = [
        [Piece("a", 519, 520), Piece("d", 1049, 1050), Piece("b", 32, 33), Piece("c", 0, 1)],
        [Piece("b", 32, 33), Piece("a", 0, 520), Piece("c", 0, 1), Piece("e", 100, 200)],
        [Piece("e", 3, 5), Piece("d", 1000, 1050), Piece("a", 510, 514)],
    ]
    for pieces in companies:
        for piece, got in zip(pieces, sequences.step(pieces, padding=2), strict=True):
            assert got.equal(whole[piece.name][piece.start : piece.end]), str(piece)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_block_size_does_not_change_a_bit(device: Device, dtype: torch.dtype) -> None:
    results = [
        in_pieces(
            Sequences(device, shape_of(dtype, (4, 2, 16), size), {"a": 600}), "a", [0, 99, 600]
        )
        for size in (4, 16, 128, 600)
    ]
    assert all(result.equal(results[0]) for result in results)


# ---- sliding windows ----

SLIDING = (1, 2, 100, 511, 512, 513, 700)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliding", [*SLIDING, 1100, 5000])
def test_a_token_sees_itself_and_so_many_before_it_as_its_window_says(
    device: Device, dtype: torch.dtype, sliding: int
) -> None:
    lengths = {"whole": 1100, "chunk": 1090, "tail": 1030, "one": 1, "short": 3}
    sequences = Sequences(device, shape_of(dtype, (6, 2, 32)), lengths)
    sequences.write([Piece("chunk", 0, 900), Piece("tail", 0, 1029)])
    pieces = [
        Piece("tail", 1029, 1030),
        Piece("whole", 0, 1100),
        Piece("one", 0, 1),
        Piece("chunk", 900, 1090),
        Piece("short", 0, 3),
    ]
    limit = TOLERANCE[dtype]
    for piece, got in zip(pieces, sequences.step(pieces, 2, sliding), strict=True):
        wanted = sequences.expected(piece, sliding)
        torch.testing.assert_close(got.double(), wanted, atol=limit, rtol=limit, msg=str(piece))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliding", SLIDING)
def test_with_a_sliding_window_too_a_token_has_its_bits_in_any_chunk_and_company(
    device: Device, dtype: torch.dtype, sliding: int
) -> None:
    lengths = {"a": 1300, "b": 520, "c": 40}
    sequences = Sequences(device, shape_of(dtype, (6, 2, 32)), lengths)
    whole = {
        name: sequences.step([Piece(name, 0, length)], sliding_window=sliding)[0]
        for name, length in lengths.items()
    }
    companies = [[Piece("a", *edge)] for edge in pairwise([*range(0, 1300, 300), 1300])]
    companies.append([Piece("a", 1299, 1300), Piece("b", 519, 520), Piece("c", 39, 40)])
    companies.append([Piece("c", 0, 40), Piece("a", 511, 512), Piece("b", 100, 515)])
    companies.append([Piece("a", 1023, 1024), Piece("c", 5, 6), Piece("b", 512, 513)])
    for pieces in companies:
        for piece, got in zip(pieces, sequences.step(pieces, 1, sliding), strict=True):
            assert got.equal(whole[piece.name][piece.start : piece.end]), str(piece)


def test_layers_of_one_step_may_have_windows_of_their_own(device: Device) -> None:
    sequences = Sequences(device, shape_of(torch.float32, (4, 2, 16)), {"a": 600})
    sequences.write([Piece("a", 0, 600)])
    batch = AttentionBatch(
        block_tables=torch.tensor([sequences.tables["a"]], dtype=torch.int32),
        first_tokens=torch.tensor([0]),
        num_tokens=torch.tensor([600]),
        context_tokens=torch.tensor([600]),
        slots=torch.tensor(sequences.slots(Piece("a", 0, 600))),
    )
    for sliding in (0, 20, 0, 550):
        got = device.attend(sequences.queries["a"], sequences.layer, batch, sliding)
        wanted = sequences.expected(Piece("a", 0, 600), sliding)
        torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=2e-5)


# ---- packed linears ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_packed_linear_is_the_product_and_outlives_its_weight(
    device: Device, dtype: torch.dtype, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(96, 64, generator=generator) / 8).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if with_bias else None
    x = torch.randn(8, 64, generator=generator).to(dtype)
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    linear = device.pack_linear(weight, bias)
    weight.fill_(torch.nan)
    got = linear(x)
    assert got.dtype is dtype
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), wanted, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (112, 336), (896, 130), (100, 64)], ids=str)
def test_a_row_of_a_linear_does_not_depend_on_how_many_rows_there_are(
    device: Device, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    only_exact_products(device)
    generator = torch.Generator().manual_seed(3)
    linear = device.pack_linear(
        torch.randn(size[1], size[0], generator=generator).to(dtype),
        torch.randn(size[1], generator=generator).to(dtype),
    )
    step = device.row_padding()
    x = torch.randn(160 * step, size[0], generator=generator).to(dtype)
    whole = linear(x)
    for rows in (1, 2, 3, 7, 8, 16, 31, 64, 150):
        count = rows * step
        assert linear(x[:count].contiguous()).equal(whole[:count]), f"{count} rows"
        assert linear(x[-count:].contiguous()).equal(whole[-count:]), f"the last {count} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [64, 100, 33])
def test_what_follows_a_product_is_what_would_follow_it_alone(
    device: Device, dtype: torch.dtype, inner: int
) -> None:
    weight, bias = draw(2 * inner, 50, seed=4).to(dtype) / 7, draw(2 * inner, seed=5).to(dtype)
    x = draw(4 * device.row_padding(), 50, seed=6).to(dtype)
    residual = draw(len(x), 2 * inner, seed=7).to(dtype)
    limit = TOLERANCE[dtype]
    product = x.double() @ weight.double().T + bias.double()
    added = device.pack_linear(weight, bias)(x, residual)
    torch.testing.assert_close(added.double(), product + residual, atol=limit, rtol=limit)
    gate, up = product.chunk(2, 1)
    gated = device.pack_gated(weight, bias)(x)
    assert gated.shape == (len(x), inner)
    torch.testing.assert_close(gated.double(), functional.silu(gate) * up, atol=limit, rtol=limit)
    only_exact_products(device)
    one = device.pack_gated(weight, bias)(x[: device.row_padding()].contiguous())
    assert one.equal(gated[: len(one)])


def quantized(weight: torch.Tensor) -> Quantized:
    scales = weight.float().abs().amax(1) / 127.0
    return Quantized((weight.float() / scales[:, None]).round().to(torch.int8), scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (50, 201), (130, 896), (33, 7), (4864, 70)], ids=str)
def test_products_of_8_bits_are_those_of_the_integers_and_their_scales(
    device: Device, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    width, out = size
    weight, bias = quantized(draw(out, width, seed=21)), draw(out, seed=22).to(dtype)
    x = draw(40, width, seed=23).to(dtype) * torch.logspace(-3, 2, 40)[:, None].to(dtype)
    x[7] = 0
    residual = draw(40, out, seed=24).to(dtype)
    peaks = x.double().abs().amax(-1, keepdim=True)
    steps = torch.tensor(127.0) / peaks.float()
    whole = (x.float() * steps.nan_to_num(0.0, posinf=0.0)).round().double()
    exact = (whole @ weight.values.double().T) * weight.scales.double() * peaks / 127.0
    linear = device.pack_linear(weight, bias)
    got = linear(x)
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), exact + bias.double(), atol=limit, rtol=limit)
    added = linear(x, residual)
    torch.testing.assert_close(
        added.double(), (exact + bias.double() + residual.double()), atol=2 * limit, rtol=2 * limit
    )
    for rows in (1, 2, 5, 17):
        assert linear(x[:rows].contiguous()).equal(got[:rows])
        assert linear(x[-rows:].contiguous(), residual[-rows:].contiguous()).equal(added[-rows:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_of_8_bits_is_the_gate_of_its_product(device: Device, dtype: torch.dtype) -> None:
    weight, bias = quantized(draw(2 * 100, 50, seed=25) / 7), draw(200, seed=26).to(dtype)
    x = draw(9, 50, seed=27).to(dtype)
    gate, up = device.pack_linear(weight, bias)(x).float().chunk(2, 1)
    got = device.pack_gated(weight, bias)(x)
    limit = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(got.float(), functional.silu(gate) * up, atol=limit, rtol=limit)


def test_a_number_that_is_none_stays_none_in_8_bits(device: Device) -> None:
    linear = device.pack_linear(quantized(draw(20, 40, seed=28)), None)
    for bad in (torch.nan, torch.inf):
        x = torch.ones(3, 40)
        x[1, 33] = bad
        found = linear(x).isfinite().all(1).tolist()
        assert found == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_far_from_zero_is_open_or_shut(device: Device, dtype: torch.dtype) -> None:
    gates = torch.tensor([-200.0, -90.0, -20.0, 0.0, 20.0, 200.0])
    weight = torch.cat((gates, torch.ones(6)))[:, None].to(dtype)
    got = device.pack_gated(weight, None)(torch.ones(device.row_padding(), 1, dtype=dtype))
    wanted = functional.silu(gates).expand(len(got), -1)
    torch.testing.assert_close(got.float(), wanted, atol=1e-7, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_gives_logits_and_its_rows_back(device: Device, dtype: torch.dtype) -> None:
    weight = draw(201, 33, seed=8).to(dtype)
    head = device.pack_head(weight)
    ids = torch.tensor([200, 0, 64, 63, 199])
    rows = weight[ids]
    assert head.embed(ids).equal(rows)
    for outside in (-1, 201):
        with pytest.raises(IndexError):
            head.embed(torch.tensor([0, outside]))
    logits = head(rows)
    assert logits.dtype is torch.float32
    limit = TOLERANCE[dtype]
    wanted = rows.cpu().double() @ weight.cpu().double().T
    torch.testing.assert_close(logits.cpu().double(), wanted, atol=limit, rtol=limit)


@pytest.mark.parametrize("size", [1, 7, 320, 16384, 16385, 151_936])
def test_the_best_of_a_row_is_its_first_highest_and_a_row_that_is_not_finite_is_told(
    device: Device, size: int
) -> None:
    logits = draw(9, size, seed=30)
    for row in range(5):
        logits[row, [size - 1, size * row // 5, size // 2]] = 50.0 + row  # ties
    logits[5] = -torch.finfo(torch.float32).max
    for row, bad in ((6, torch.nan), (7, torch.inf), (8, -torch.inf)):
        logits[row, size // 3] = bad
    best, finite = device.fetch(device.best(device.put(logits)))().T.tolist()
    assert best[:6] == logits[:6].numpy().argmax(-1).tolist()
    assert all(0 <= each < size for each in best)
    assert finite == [1] * 6 + [0] * 3
    assert device.fetch(device.best(device.put(logits[2:3])))().tolist() == [[best[2], 1]]


def left_by_cuts(logits: torch.Tensor, cut: tuple[float, int, float, float]) -> torch.Tensor:
    """What each token weighs, in float64, after sorting it all; cut: temperature, top_k, top_p, min_p."""
    temperature, top_k, top_p, min_p = cut
    weights = ((logits.double() - logits.double().max()) / temperature).exp()
    weights[weights < min_p] = 0
    order = weights.argsort(descending=True, stable=True)
    weights[order[top_k:]] = 0
    if top_p < 1:
        reached = weights[order].cumsum(0)
        weights[order[1:][reached[:-1] >= top_p * reached[-1]]] = 0
    return weights


CUTS = [
    (temperature, top_k, top_p, min_p)
    for temperature in (1.0, 0.3, 30.0)
    for top_k in (1, 50, 1 << 20)
    for top_p in (1.0, 0.9, 0.31, 1e-6)
    for min_p in (0.0, 0.05)
]


@pytest.mark.parametrize("size", [1, 7, 513, 50_001])
def test_what_is_drawn_lies_where_its_number_points_in_what_the_cuts_leave(
    device: Device, size: int
) -> None:
    """Weights and sums are rounded, so a token that weighs nearly what the bound does may be on either side of it."""
    logits = draw(len(CUTS), size, seed=31) * 3
    logits[1::2] = logits[1::2].round()  # ties
    logits[2::3, 1 + size // 2 :] = -torch.inf
    numbers = torch.rand(40, generator=torch.Generator().manual_seed(32)).double().numpy()
    numbers[:2] = 0.0, 1 - 2.0**-53
    kept = torch.full((len(CUTS), size), torch.nan)
    wanted = [
        Drawing(
            row=row,
            temperature=cut[0],
            top_k=min(cut[1], size),
            top_p=cut[2],
            min_p=cut[3],
            numbers=numbers[: 40 - row % 3],
            weights=kept[row],
        )
        for row, cut in enumerate(CUTS)
    ]
    before = logits.clone()
    drawn = device.draw(logits, wanted)
    assert torch.equal(logits, before)
    for row, cut in enumerate(CUTS):
        expected, weights = left_by_cuts(logits[row], cut), kept[row].double()
        for each in (expected, weights):
            each[each < 1e-30] = 0  # too little for float32, and for any number
        both = (expected > 0) & (weights > 0)
        torch.testing.assert_close(weights[both], expected[both], atol=1e-30, rtol=2e-5)
        least = float(expected[expected > 0].min())
        edge = torch.where(both, 0.0, torch.maximum(expected, weights))
        assert ((edge == 0) | (edge < least * 1.0001)).all(), f"row {row}, {cut}"
        # of equal ones that the bound goes through, one more or less
        assert int((edge > 0).sum()) <= 1, f"row {row}, {cut}"
        ladder = weights.cumsum(0) / weights.sum()
        tokens = torch.tensor(drawn[row])
        assert (weights[tokens] > 0).all()
        points = torch.from_numpy(numbers[: len(tokens)])
        assert (points <= ladder[tokens] + 1e-5).all()
        assert (points >= ladder[tokens] - weights[tokens] / weights.sum() - 1e-5).all()


def test_a_row_draws_the_same_tokens_alone_and_among_others(device: Device) -> None:
    logits = draw(9, 3001, seed=33)
    numbers = torch.rand(9, 4, generator=torch.Generator().manual_seed(34)).double().numpy()
    wanted = [
        Drawing(row=row, temperature=0.8, top_k=900, top_p=0.9, min_p=0.0, numbers=numbers[row])
        for row in range(9)
    ]
    together = device.draw(logits, wanted)
    for row, each in enumerate(wanted):
        alone = device.draw(logits[row : row + 1], [dataclasses.replace(each, row=0)])
        assert alone == [together[row]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 96, 100, 7])
def test_a_norm_is_its_formula_row_by_row(device: Device, dtype: torch.dtype, size: int) -> None:
    weight, x = draw(size, seed=9).to(dtype), draw(700, size, seed=10).to(dtype) * 30
    norm = device.norm(weight, 1e-5)
    got, wide = norm(x), x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), wanted, atol=limit, rtol=limit)
    for rows in (1, 3, 17):
        assert norm(x[-rows:]).equal(got[-rows:])
    assert not norm(torch.zeros(2, size, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_are_normed_and_rotated_and_values_are_not(
    device: Device, dtype: torch.dtype, heads: tuple[int, int, int], normed: bool
) -> None:
    queries, kv_heads, dim = heads
    device.alloc_kv(kv_shape(dtype=dtype, kv_heads=kv_heads, head_dim=dim, block_size=8))
    positions = [0, 5, 11, 30, 2, 9, 0, 0]
    tables = [draw(31, dim, seed=seed).to(dtype) for seed in (11, 12)]
    mixed = draw(8, queries + 2 * kv_heads, dim, seed=13).to(dtype)
    weight = draw(queries + kv_heads, dim, seed=14).to(dtype)
    slots = torch.tensor([39, 0, 8, 7, 21])
    norms = HeadNorms(weight=weight, eps=1e-6) if normed else None
    got = device.rotate_and_store(mixed, 1, turn_of(*tables, positions), slots, norms)
    turning = mixed[:, :-kv_heads].double()
    if normed:
        mean = turning.square().mean(-1, keepdim=True)
        turning = turning / (mean + 1e-6).sqrt() * weight.double()
    cos, sin = (table[positions].double()[:, None] for table in tables)
    left, right = turning.chunk(2, -1)
    wanted = turning * cos + torch.cat((-right, left), -1) * sin
    limit = 1e-5 if dtype is torch.float32 else 6e-2
    torch.testing.assert_close(got.double(), wanted[:, :queries], atol=limit, rtol=limit)
    memory, token = device.kv_memory(), kv_heads * dim * dtype.itemsize
    for place, slot in enumerate(slots.tolist()):
        for part, there in enumerate((wanted[place, queries:], mixed[place, -kv_heads:].double())):
            raw = memory.span(1, part, slot // 8)[slot % 8 * token :][:token]
            kept = torch.frombuffer(bytearray(raw), dtype=dtype).view(kv_heads, dim)
            torch.testing.assert_close(kept.double(), there, atol=limit, rtol=limit)


# ---- the cache as memory ----


def kv_shape(dtype: torch.dtype = torch.float32, **fields: int) -> KvShape:
    sizes = {"num_layers": 3, "num_blocks": 5, "block_size": 4, "kv_heads": 2, "head_dim": 8}
    return KvShape(**{**sizes, **fields}, dtype=dtype)


def rows(count: int, start: float) -> torch.Tensor:
    return torch.arange(count * 16, dtype=torch.float32).view(count, 2, 8) + start


def test_what_is_written_lies_in_its_layer_part_block_and_offset_and_nowhere_else(
    device: Device,
) -> None:
    device.alloc_kv(kv_shape())
    keys, values = rows(3, 1000.0), rows(3, 5000.0)
    unturned = turn_of(torch.ones(1, 8), torch.zeros(1, 8), [0, 0, 0, 0])
    mixed = torch.cat((torch.ones(3, 4, 8), keys, values), 1)
    mixed = torch.cat((mixed, torch.full((1, 8, 8), 7.0)))  # a row of padding
    slots = torch.tensor([2 * 4 + 3, 0, 4 * 4 + 1])
    queries = device.rotate_and_store(mixed, 1, unturned, slots)
    assert queries[:3].equal(torch.ones(3, 4, 8))
    memory = device.kv_memory()
    token_bytes = memory.layout.block_bytes // 4
    found = {}
    for layer in range(3):
        for part in range(2):
            for block in range(5):
                for offset in range(4):
                    raw = memory.span(layer, part, block)[offset * token_bytes :][:token_bytes]
                    if any(raw):
                        found[layer, part, block, offset] = bytes(raw)
    places = ((2, 3), (0, 0), (4, 1))
    assert found == {
        (1, part, *place): tensor[index].numpy().tobytes()
        for part, tensor in enumerate((keys, values))
        for index, place in enumerate(places)
    }


def test_heads_larger_than_the_kernels_buffers_are_refused() -> None:
    with pytest.raises(DeviceUnavailable, match="heads of 1026 numbers"):
        CpuDevice(0, threads=1).alloc_kv(kv_shape(head_dim=1026))


def test_bytes_that_arrive_from_outside_are_what_attention_sees(device: Device) -> None:
    shape = shape_of(torch.float32, (4, 2, 16))
    sequences = Sequences(device, shape, {"a": 40, "b": 40})
    asked = Piece("a", 39, 40)
    wanted = sequences.step([Piece("a", 0, 40)])[0][39:]
    memory = device.kv_memory()
    sequences.queries["b"] = sequences.queries["a"]
    sequences.write([Piece("b", 0, 40)])
    assert not sequences.step([Piece("b", 39, 40)])[0].equal(wanted)
    for here, there in zip(sequences.tables["a"], sequences.tables["b"], strict=True):
        for part in range(2):
            source = memory.span(sequences.layer, part, here)
            memory.span(sequences.layer, part, there)[:] = source
    settle(device)
    sequences.keys["b"], sequences.values["b"] = sequences.keys["a"], sequences.values["a"]
    assert sequences.step([Piece("b", 39, 40)])[0].equal(wanted)
    assert sequences.step([asked])[0].equal(wanted)


def test_the_layout_says_what_the_cache_is(device: Device) -> None:
    device.alloc_kv(kv_shape())
    memory = device.kv_memory()
    assert memory.num_blocks == 5
    assert (memory.layout.num_layers, memory.layout.block_size) == (3, 4)
    assert memory.layout.block_bytes == 4 * 2 * 8 * 4
    others = [kv_shape(kv_heads=1, head_dim=16), kv_shape(num_layers=2)]
    names = {memory.layout.fingerprint}
    for other in others:
        device.alloc_kv(other)
        names.add(device.kv_memory().layout.fingerprint)
    assert len(names) == 3
    device.alloc_kv(kv_shape(block_size=8))
    assert device.kv_memory().layout.fingerprint == memory.layout.fingerprint, "other blocks fit"


def test_a_cache_too_large_is_refused_with_the_flag_to_lower(device: Device) -> None:
    with pytest.raises(DeviceUnavailable, match="max_cache_size"):
        device.alloc_kv(kv_shape(num_blocks=1 << 48))


def test_there_is_no_cache_before_it_is_allocated_nor_after_close(device: Device) -> None:
    with pytest.raises(DeviceUnavailable):
        device.kv_memory()
    device.alloc_kv(kv_shape())
    device.kv_memory()
    device.close()
    with pytest.raises(DeviceUnavailable):
        device.kv_memory()
    device.close()  # a second time is harmless


def test_memory_is_told_in_bytes(device: Device) -> None:
    free, total = device.memory()
    assert 1 << 20 < free <= total
