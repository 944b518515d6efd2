"""The full names of the control services, as clients call and servers register them."""

from __future__ import annotations

INSTANCE = "xllm.v1.DisaggPDService"
MASTER = "xllm.v1.XllmRpcService"
