"""What to say of a port that is taken: which, by whom when that can be seen, and the flag that chooses another.

Called by every room that listens, when its bind failed. It binds nothing itself.
"""

from __future__ import annotations

import psutil

from xllm_py.base.errors import PortInUse


def port_taken(port: int, flag: str) -> PortInUse:
    """The error to raise."""
    return PortInUse(f"port {port} is taken{_holder(port)}; free it or pass another {flag}")


def _holder(port: int) -> str:
    """` by pid 412 (nginx)`, or nothing when its owner is somebody else's."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.pid
            if listens and connection.laddr and connection.laddr.port == port:
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):
        pass
    return ""
