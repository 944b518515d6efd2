"""Tensors of a checkpoint folder, by name: safetensors, one file or many with an index. Read one at a time, never pickled.

`Weights.take` checks shape and converts; what nobody took is reported at the end, because a tensor without a place means that the
model is another one than the code computes. `DummyWeights` makes seeded random ones for benchmarks.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xllm_py.base.errors import ModelLoadError
from xllm_py.device.base import Quantized
from xllm_py.model.quantization import quantize

INDEX = "model.safetensors.index.json"
Part = tuple[slice, ...]  # of a tensor, one a dimension; () is all of it


class WeightSource(Protocol):
    """Where tensors come from."""

    def take(self, name: str, shape: tuple[int, ...], part: Part = ()) -> Tensor:
        """One tensor, or a part of it, in the model's dtype. Raises ModelLoadError when it is missing or has another shape.

        shape: of the whole; of a part no more than that is read.
        """
        ...

    def take_int8(self, name: str, shape: tuple[int, int], part: Part = ()) -> Quantized:
        """`name`.weight of 8-bit integers with `name`.weight_scale, one for each row. Raises ModelLoadError."""
        ...

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds it."""
        ...

    def pass_over(self, at: str) -> None:
        """What stands below this name is of the model, and another rank's."""
        ...

    def finish(self, ignored: tuple[str, ...] = ()) -> None:
        """Raise ModelLoadError when tensors are left that nobody took."""
        ...


class Weights:
    """A folder with *.safetensors."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._file_of = _index(folder)
        files = set(self._file_of.values())
        index = folder / INDEX
        # where a tensor is named that is not there
        self._origin = index if index.exists() else files.pop() if len(files) == 1 else folder
        self._taken: set[str] = set()
        self._open: dict[Path, Any] = {}  # files, until all is taken

    def has(self, name: str) -> bool:
        """See WeightSource."""
        return name in self._file_of

    def pass_over(self, at: str) -> None:
        """See WeightSource."""
        self._taken.update(name for name in self._file_of if name.startswith(f"{at}."))

    def take(self, name: str, shape: tuple[int, ...], part: Part = ()) -> Tensor:
        """See WeightSource."""
        tensor = self._read(name, shape, part)
        if not tensor.is_floating_point():
            raise ModelLoadError(
                f"{self._file_of[name]}: tensor {name} has dtype {tensor.dtype}, and there is no {name}_scale "
                "that config.json's quantization_config tells of; is one of the two of another model?"
            )
        return tensor.to(self._dtype)

    def take_int8(self, name: str, shape: tuple[int, int], part: Part = ()) -> Quantized:
        """See WeightSource."""
        values = self._read(f"{name}.weight", shape, part)
        if values.dtype is not torch.int8:
            raise ModelLoadError(
                f"{self._file_of[f'{name}.weight']}: tensor {name}.weight has dtype {values.dtype}, not int8"
            )
        scales = self._read(f"{name}.weight_scale", (shape[0], 1), part[:1]).float().flatten()
        return Quantized(values, scales)

    def _read(self, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
        path = self._file_of.get(name)
        if path is None:
            raise ModelLoadError(
                f"{self._origin}: has no tensor {name}; copy the model folder again, it is not complete"
            )
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            stored = self._open[path].get_slice(name)
            found = tuple(stored.get_shape())
            tensor: Tensor = (
                stored[part] if part and found == shape else self._open[path].get_tensor(name)
            )
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{path}: tensor {name} cannot be read ({error}); copy it again"
            ) from error
        if found != shape:
            raise ModelLoadError(
                f"{path}: tensor {name} has shape {found}, config.json implies {shape}; one of the two is of another model"
            )
        self._taken.add(name)
        return tensor

    def finish(self, ignored: tuple[str, ...] = ()) -> None:
        """See WeightSource."""
        self._open.clear()
        left = sorted(
            name
            for name in self._file_of.keys() - self._taken
            if not name.endswith(ignored or ("\0",))
        )
        if left:
            raise ModelLoadError(
                f"{self._origin}: has tensors that this model does not know: {', '.join(left[:5])}; is config.json of another model?"
            )


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    index = folder / INDEX
    if index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"]
            files = {str(name): folder / Path(str(file)).name for name, file in names.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(
                f"{index}: field weight_map is broken ({error}); copy it again"
            ) from error
        missing = sorted({file.name for file in files.values() if not file.exists()})
        if missing:
            raise ModelLoadError(
                f"{index}: names files that are not there: {', '.join(missing)}; copy them too"
            )
        return files
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelLoadError(
            f"{folder}: holds no *.safetensors; convert the checkpoint, pickled ones are not read"
        )
    names_of: dict[str, Path] = {}
    for path in found:
        try:
            with safe_open(path, framework="pt") as file:
                names_of |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{path}: is truncated or no safetensors file ({error}); copy it again"
            ) from error
    return names_of


class DummyWeights:
    """Random tensors, the same for the same name and seed; norms are ones, biases small."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self._dtype = dtype
        self._seed = seed

    def has(self, name: str) -> bool:
        """See WeightSource."""
        return True

    def pass_over(self, at: str) -> None:
        """See WeightSource."""

    def take(self, name: str, shape: tuple[int, ...], part: Part = ()) -> Tensor:
        """See WeightSource."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype)
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(name.encode()))
        tensor = torch.empty(shape, dtype=torch.float32).normal_(0.0, 0.02, generator=generator)
        return tensor.to(self._dtype)[part].contiguous()

    def take_int8(self, name: str, shape: tuple[int, int], part: Part = ()) -> Quantized:
        """See WeightSource."""
        return quantize(self.take(f"{name}.weight", shape, part))

    def finish(self, ignored: tuple[str, ...] = ()) -> None:
        """See WeightSource."""
