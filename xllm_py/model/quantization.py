"""8-bit weights with 8-bit activations (w8a8): made from the checkpoint's own at load, or read from one that has them.

Weights: a scale for each output channel, symmetric. Activations: a scale for each token, found when it is computed; the device does that.
Read are checkpoints of compressed-tensors, the format of llm-compressor, whose linears hold int8 weights beside a `weight_scale`. Which ones
do, their names say; the head and a router are left as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xllm_py.device.base import Quantized
from xllm_py.model.fields import Fields

W8A8 = "w8a8"
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


def read_quantization(fields: Fields) -> bool:
    """Whether the checkpoint's linears are 8-bit. Raises ModelLoadError for any other quantisation than w8a8 of compressed-tensors."""
    for name in ("quantization_config", "compression_config"):
        found = fields.part(name)
        if found is None:
            continue
        method = found.get("quant_method")
        if method != "compressed-tensors":
            found.refuse("quant_method", f"is {str(method)[:40]!r}; known: compressed-tensors")
        if found.get("kv_cache_scheme"):
            found.refuse("kv_cache_scheme", "is set; 8-bit caches are not supported")
        groups = found.part("config_groups")
        if groups is None:
            found.refuse("config_groups", "is missing; copy the model folder again")
        for group in groups.raw:
            _check_group(groups, group)
        return True
    return False


def _check_group(groups: Fields, name: str) -> None:
    group = groups.part(name)
    if group is None:
        groups.refuse(name, "is empty; copy the model folder again")
    for part, wanted in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        found = group.part(part)
        if found is None:
            group.refuse(part, "is missing; only w8a8 with dynamic activations is supported")
        for key, value in wanted.items():
            if found.get(key) != value:
                found.refuse(key, f"is {found.get(key)!r}; only {value!r} is supported")


def quantize(weight: Tensor) -> Quantized:
    """weight: [out, in]. Each row's largest magnitude becomes 127; a row of zeros stays one."""
    wide = weight.float()
    scales = wide.abs().amax(1) / 127.0
    steps = torch.where(scales > 0, scales, 1.0)
    return Quantized((wide / steps[:, None]).round().to(torch.int8), scales)
