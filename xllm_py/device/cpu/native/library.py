"""The compiled kernels as Python calls them: names, arguments, and the structures of kernels.cpp. Without torch: pointers are ints."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_double, c_float, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path

import numpy as np

from xllm_py.base.errors import DeviceUnavailable

PLAIN, ADD, GATE = 0, 1, 2  # what follows a linear, `After` in linear.h


class Rotation(ctypes.Structure):
    """`Rotation` of rowwise.h."""

    _fields_ = (
        ("mixed", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("head_norms", c_void_p),
        ("queries", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("tokens", c_int64),
        ("real", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("eps", c_double),
    )


class Attention(ctypes.Structure):
    """`Attention` of attention.h."""

    _fields_ = (
        ("queries", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("out", c_void_p),
        ("tables", c_void_p),
        ("first_tokens", c_void_p),
        ("num_tokens", c_void_p),
        ("context_tokens", c_void_p),
        ("sequences", c_int64),
        ("table_width", c_int64),
        ("block_size", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("sliding_window", c_int64),
    )


class Drawing(ctypes.Structure):
    """`Drawing` of draw.h."""

    _fields_ = (
        ("numbers", c_void_p),
        ("tokens", c_void_p),
        ("weights", c_void_p),
        ("row", c_int64),
        ("count", c_int64),
        ("most", c_int64),
        ("temperature", c_double),
        ("share", c_double),
        ("least", c_double),
    )


class Library:
    """One compiled file; see kernels.cpp for what each function does. Calls release the interpreter's lock.

    Raises DeviceUnavailable where the system does not let this process use what the file is compiled for.
    """

    def __init__(self, path: Path, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        found = _open(path, instruction_set)
        size, pointer = c_int64, c_void_p
        self.packed_size = found.xllm_packed_size
        self.packed_size.argtypes, self.packed_size.restype = [size, size, c_int, c_int], size
        self.num_columns = found.xllm_num_columns
        self.num_columns.argtypes, self.num_columns.restype = [size, c_int], size
        self.columns = found.xllm_columns
        self.columns.argtypes, self.columns.restype = [pointer, size, c_int], None
        self.pack = found.xllm_pack
        self.pack.argtypes = [pointer, pointer, size, size, c_int, c_int, c_int]
        self.pack.restype = None
        self.rows = found.xllm_rows
        # packed, ids, out; how many, width, rows there are; dtype, threads
        self.rows.argtypes, self.rows.restype = [*[pointer] * 3, *[size] * 3, c_int, c_int], c_int
        self.most_head_dim = found.xllm_most_head_dim
        self.most_head_dim.argtypes, self.most_head_dim.restype = [], size
        self.linear = found.xllm_linear
        # x, packed, bias, what is added, out; rows, in, out; after, wide, dtype, threads
        self.linear.argtypes = [*[pointer] * 5, *[size] * 3, *[c_int] * 4]
        self.linear.restype = None
        self.linear8 = found.xllm_linear8
        # x, packed, scales, totals, bias, what is added, out; rows, in, out; after, dtype, threads
        self.linear8.argtypes = [*[pointer] * 7, *[size] * 3, *[c_int] * 3]
        self.linear8.restype = None
        self.norm = found.xllm_norm
        self.norm.argtypes = [pointer, pointer, pointer, size, size, c_float, c_int, c_int]
        self.norm.restype = None
        self.rotate = found.xllm_rotate
        self.rotate.argtypes, self.rotate.restype = [pointer, c_int, c_int], None
        self.best = found.xllm_best
        self.best.argtypes = [pointer, pointer, size, size, c_int]
        self.best.restype = None
        self.draw = found.xllm_draw
        # logits, Drawings, how many, vocabulary, threads
        self.draw.argtypes, self.draw.restype = [pointer, pointer, size, size, c_int], None
        self.attend = found.xllm_attend
        self.attend.argtypes, self.attend.restype = [pointer, c_int, c_int], None
        self._gather, self._scatter = found.xllm_gather, found.xllm_scatter
        for carry in (self._gather, self._scatter):
            # region, numbers of blocks, the flat side; how many, bytes of one
            carry.argtypes, carry.restype = [*[pointer] * 3, *[size] * 2], c_uint32
        self.huge_pages = found.xllm_huge_pages
        self.huge_pages.argtypes, self.huge_pages.restype = [pointer, size], None

    def gather(self, region: memoryview, blocks: memoryview, flat: memoryview) -> int:
        """See core.kv_memory.Carrier."""
        count = len(blocks)
        found: int = self._gather(_at(region), _at(blocks), _at(flat), count, flat.nbytes // count)
        return found

    def scatter(self, region: memoryview, blocks: memoryview, flat: memoryview) -> int:
        """See core.kv_memory.Carrier."""
        count = len(blocks)
        found: int = self._scatter(_at(region), _at(blocks), _at(flat), count, flat.nbytes // count)
        return found


def _open(path: Path, instruction_set: str) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.xllm_allowed.argtypes, found.xllm_allowed.restype = [], c_int
    if not found.xllm_allowed():
        raise DeviceUnavailable(
            f"the system does not let this process use {instruction_set}; name another set of instructions"
        )
    return found


def _at(view: memoryview) -> int:
    """Where its bytes are, which stay there while it is alive."""
    if view.readonly:
        return np.frombuffer(view, np.uint8).ctypes.data
    return ctypes.addressof(c_char.from_buffer(view))
