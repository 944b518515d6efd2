"""What both console entry points do: set the environment the engines need, answer the shell's completion, run the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from click.shell_completion import shell_complete

from xllm_py.cli.flags import FlagCommand


def run_command(command: FlagCommand, words: Sequence[str]) -> NoReturn:
    """Never returns."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = (
        "0"  # torch_npu hooks `import torch`; we load it ourselves
    )
    os.environ["HF_HUB_OFFLINE"] = "1"
    program = command.name or ""
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    wanted = os.environ.get(variable)
    if wanted:
        sys.exit(shell_complete(command, {}, program, variable, wanted))
    sys.exit(command.start(words))
