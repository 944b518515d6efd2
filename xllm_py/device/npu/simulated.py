"""A device named `npu` where there is none: torch's PrivateUse1 backend in Python, tensors that are host tensors in disguise.

It shows that everything is put where it belongs (an operand on the host beside one on the npu is an error, as on the real one), that the operators
are called by their names with what they take (`simulated_operators`), and that a whole instance runs. It shows nothing of speed or of the
hardware's numbers. Works once per process: the engine's own. Source: torch.utils.backend_registration, experimental in torch 2.13.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from xllm_py.base import process
from xllm_py.device.npu import simulated_operators

VERSION = simulated_operators.VERSION  # of what stands for torch_npu
_MEMORY = 2 << 30  # bytes of each
_ROWS = 16  # of a product that is computed at once, so that a row's bits do not depend on how many there are
_aten = torch.ops.aten
_MIXES = frozenset(
    {
        _aten.copy_.default,
        _aten._copy_from.default,
        _aten.index.Tensor,
        _aten.index_put_.default,
        _aten._index_put_impl_.default,
    }
)  # take operands of both sides, as on a real device
_installed: list[SimpleNamespace] = []
_libraries: list[Any] = []


class SimulatedTensor(torch.Tensor):
    """host: where the numbers really are; npu: the index of the one it claims to be on."""

    host: Tensor
    npu: int

    @staticmethod
    def __new__(cls, host: Tensor, index: int) -> SimulatedTensor:
        """Disguise a host tensor."""
        with torch.inference_mode(False):  # else a view of what was made outside of it fails
            made: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=torch.device("npu", index),
            )
        made.host, made.npu = host, index
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own subclasses do

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the operator
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every operator with one of these among its operands."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the host, and disguised again."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if func is not _aten.linear.default and func.has_kernel_for_dispatch_key(composite):
        return func.decompose(*args, **kwargs)  # into what a device is really asked
    operands = [each for each in _pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    ours = [each for each in operands if isinstance(each, SimulatedTensor)]
    if ours and func not in _MIXES:
        _require_one_place(func, operands, ours)
    place = kwargs.get("device")
    if place is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
        index = _index(place)
    else:
        index = ours[0].npu if ours else 0
    compute: Callable[..., Any] = _PRODUCTS.get(func, func)
    done = compute(*_pytree.tree_map(_bare, args), **_pytree.tree_map(_bare, kwargs))
    if index is None:
        return done  # copied to the host
    known = {id(each.host): each for each in ours}

    def disguised(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        same = known.get(id(each))
        return SimulatedTensor(each, index) if same is None else same

    return _pytree.tree_map(disguised, done)


def _require_one_place(
    func: Any, operands: Sequence[Tensor], ours: Sequence[SimulatedTensor]
) -> None:
    """Raise as a real device does when operands lie apart; numbers without a dimension may lie anywhere."""
    places = {f"npu:{each.npu}" for each in ours}
    for each in operands:
        if not isinstance(each, SimulatedTensor) and each.dim():
            places.add(str(each.device))
    if len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got {', '.join(sorted(places))}"
        )


def _index(place: Any) -> int | None:
    """Of the npu that is meant; None: the host."""
    device = torch.device(place)
    return (device.index or 0) if device.type == "npu" else None


def _bare(each: Any) -> Any:
    return each.host if isinstance(each, SimulatedTensor) else each


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, some rows at a time, always as many."""
    rows = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % _ROWS))
    parts = [part @ matrix for part in torch.split(padded, _ROWS)]
    return torch.cat(parts)[:rows] if parts else x.new_zeros(0, matrix.shape[1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _product(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _addmm(bias: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    return bias + _product(x, matrix)


_PRODUCTS = {
    _aten.linear.default: _linear,
    _aten.mm.default: _product,
    _aten.addmm.default: _addmm,
}


def _empty(
    size: Sequence[int],
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    return SimulatedTensor(torch.empty(size, dtype=dtype), _index(device) or 0)


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Tensor:
    made = torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype())
    return SimulatedTensor(made, _index(device) or 0)


class _Runtime:
    """What is found as torch.npu."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._current = 0

    def device_count(self) -> int:
        """How many there are."""
        return self._count

    def is_available(self) -> bool:
        """Whether there are any."""
        return True

    def current_device(self) -> int:
        """Which one is computed on."""
        return self._current

    def set_device(self, at: torch.device) -> None:
        """Compute on this one."""
        self._current = at.index

    def mem_get_info(self, at: torch.device) -> tuple[int, int]:
        """(free, total) bytes."""
        return min(process.host_memory()[0], _MEMORY), _MEMORY

    def get_device_name(self, at: torch.device) -> str:
        """As the log shows it."""
        return "simulated"

    def empty_cache(self) -> None:
        """Nothing is kept."""

    def manual_seed_all(self, seed: int) -> None:
        """There is no generator to seed."""

    def _is_in_bad_fork(self) -> bool:
        return False


def install(count: int) -> SimpleNamespace:
    """From now on torch has so many devices `npu`; what stands for the module torch_npu. Once per process, later calls return the same."""
    if _installed:
        return _installed[0]
    if "torch_npu" in sys.modules:
        raise RuntimeError("torch_npu is loaded; an NPU is not simulated beside a real one")
    torch.set_num_threads(
        1
    )  # threads may share a row, and then its bits depend on how many there are
    _setup_privateuseone_for_python_backend("npu", backend_module=_Runtime(count))
    library: Any = Library  # untyped in torch
    kernels, others = library("aten", "IMPL"), library("_", "IMPL")
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    others.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    _libraries.extend((kernels, others))
    names = simulated_operators.define(_libraries)
    module = SimpleNamespace(
        __version__=VERSION, **{name: _on_npu(getattr(torch.ops.npu, name)) for name in names}
    )
    _installed.append(module)
    return module


def _on_npu(operator: Any) -> Callable[..., Any]:
    """The operators know no other device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = _pytree.tree_leaves((args, kwargs))
        if not any(isinstance(each, SimulatedTensor) for each in leaves):
            raise RuntimeError(f"{operator} is called without a tensor on an npu")
        return operator(*args, **kwargs)

    return call
