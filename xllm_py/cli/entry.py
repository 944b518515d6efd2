"""What both console entry points do: set the environment the engines need, run the command, exit with its code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from xllm_py.cli.flags import FlagCommand


def run_command(command: FlagCommand, words: Sequence[str]) -> NoReturn:
    """Never returns."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = (
        "0"  # torch_npu hooks `import torch`; we load it ourselves
    )
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(command.start(words))
