"""Sequences in a device's cache, and what plain attention says of them: the oracle of the device suite, in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from xllm_py.device.base import AttentionBatch, Device, KvShape, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Heads of a layer, and how the cache is cut."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) of one sequence, computed in one step."""

    name: str
    start: int
    end: int


class Sequences:
    """Random queries, keys and values of named sequences, written into blocks that lie about at random.

    Blocks nobody owns, and slots past a sequence's end, hold numbers that are no numbers.
    """

    def __init__(
        self, device: Device, shape: Shape, lengths: dict[str, int], *, layers: int = 2
    ) -> None:
        self.device = device
        self.shape = shape
        self.layer = layers - 1
        size = shape.block_size
        counts = {name: -(-length // size) for name, length in lengths.items()}
        num_blocks = sum(counts.values()) + 3
        device.alloc_kv(
            KvShape(
                num_layers=layers,
                num_blocks=num_blocks,
                block_size=size,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                dtype=shape.dtype,
            )
        )
        self._fill_with_nan(layers, num_blocks)
        free = list(range(num_blocks))
        random.Random(1).shuffle(free)
        self.tables = {name: [free.pop() for _ in range(count)] for name, count in counts.items()}
        self.queries: dict[str, Tensor] = {}
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        for number, (name, length) in enumerate(lengths.items()):
            self._make(name, length, torch.Generator().manual_seed(number))

    def _fill_with_nan(self, layers: int, num_blocks: int) -> None:
        memory = self.device.kv_memory()
        for layer in range(layers):
            for part in range(2):
                span = memory.span(layer, part, 0, num_blocks)
                span[:] = b"\xff" * span.nbytes
        if memory.mirror is not None:
            memory.mirror.put_in(range(num_blocks))

    def _make(self, name: str, length: int, generator: torch.Generator) -> None:
        shape = self.shape

        def draw(heads: int) -> Tensor:
            made = torch.randn(length, heads, shape.head_dim, generator=generator)
            return made.to(shape.dtype)

        self.queries[name] = draw(shape.heads)
        self.keys[name], self.values[name] = draw(shape.kv_heads), draw(shape.kv_heads)

    def slots(self, piece: Piece) -> list[int]:
        """Where the keys and values of a piece lie."""
        size, table = self.shape.block_size, self.tables[piece.name]
        return [table[at // size] * size + at % size for at in range(piece.start, piece.end)]

    def write(self, pieces: list[Piece]) -> Tensor:
        """Write the pieces' keys and values in one call; their slots."""
        slots = torch.tensor([slot for piece in pieces for slot in self.slots(piece)])
        keys = torch.cat([self.keys[p.name][p.start : p.end] for p in pieces])
        values = torch.cat([self.values[p.name][p.start : p.end] for p in pieces])
        unturned = Turn(
            cos=torch.ones(1, self.shape.head_dim, dtype=self.shape.dtype),
            sin=torch.zeros(1, self.shape.head_dim, dtype=self.shape.dtype),
            positions=torch.zeros(len(slots), dtype=torch.int64),
        )
        queries = torch.cat([self.queries[p.name][p.start : p.end] for p in pieces])
        mixed = torch.cat((queries, keys, values), 1)
        self.device.rotate_and_store(mixed, self.layer, unturned, slots)
        return slots

    def step(self, pieces: list[Piece], padding: int = 0, sliding_window: int = 0) -> list[Tensor]:
        """One step: write, attend; the result of each piece. Rows of padding are checked to be zero."""
        slots = self.write(pieces)
        widest = max(-(-piece.end // self.shape.block_size) for piece in pieces)
        tables = torch.zeros(len(pieces), widest, dtype=torch.int32)
        for row, piece in enumerate(pieces):
            owned = self.tables[piece.name][: -(-piece.end // self.shape.block_size)]
            tables[row, : len(owned)] = torch.tensor(owned, dtype=torch.int32)
        counts = [piece.end - piece.start for piece in pieces]
        firsts = [sum(counts[:row]) for row in range(len(pieces))]
        batch = AttentionBatch(
            block_tables=tables,
            first_tokens=torch.tensor(firsts),
            num_tokens=torch.tensor(counts),
            context_tokens=torch.tensor([piece.end for piece in pieces]),
            slots=slots,
        )
        queries = torch.cat([self.queries[p.name][p.start : p.end] for p in pieces])
        noise = torch.randn(padding, *queries.shape[1:]).to(queries.dtype)
        asked = torch.cat((queries, noise))
        result = self.device.attend(asked, self.layer, batch, sliding_window)
        assert result.shape == (len(queries) + padding, *queries.shape[1:])
        assert result.dtype is queries.dtype
        assert not result[len(queries) :].any()
        return [result[at : at + count] for at, count in zip(firsts, counts, strict=True)]

    def expected(self, piece: Piece, sliding_window: int = 0) -> Tensor:
        """Plain causal attention in float64 over the same (rounded) numbers."""
        group = self.shape.heads // self.shape.kv_heads
        queries = self.queries[piece.name][piece.start : piece.end].double()
        keys = self.keys[piece.name][: piece.end].double().repeat_interleave(group, 1)
        values = self.values[piece.name][: piece.end].double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * self.shape.head_dim**-0.5
        where = torch.arange(piece.start, piece.end)[:, None]
        distance = where - torch.arange(piece.end)[None]
        seen = sliding_window or piece.end
        scores.masked_fill_((distance < 0) | (distance >= seen), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
