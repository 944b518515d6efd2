"""Where the model named by --model lies: a folder, a name under a model root, or a snapshot in the local cache. Never fetched."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from xllm_py.base.errors import ModelLoadError
from xllm_py.cli.flags import one_line


def find_model(name: str, roots: str) -> Path:
    """The folder with config.json. Raises ModelLoadError with the places tried."""
    tried: list[Path] = [Path(name)]
    if not Path(name).is_absolute():
        tried += [Path(root) / name for root in roots.split(",") if root]
        tried += _snapshots(name)
    for folder in tried:
        if _holds_a_model(folder):
            return folder.resolve()
    places = one_line(", ".join(str(folder) for folder in tried))
    raise ModelLoadError(
        f"model {one_line(name)} was not found (no config.json in: {places}). Pass --model=FOLDER or --model_root=FOLDERS; "
        "nothing is downloaded"
    )


def _snapshots(name: str) -> list[Path]:
    """Snapshots of `owner/name` or of any owner's `name` in the local Hugging Face cache, newest first."""
    home = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", str(Path(home) / "hub")))
    exact = glob.escape(name.replace("/", "--"))
    pattern = f"models--{exact}" if "/" in name else f"models--*--{exact}"
    found = hub.glob(f"{pattern}/snapshots/*")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _holds_a_model(folder: Path) -> bool:
    """Also False for a word that cannot be a path."""
    try:
        return (folder / "config.json").is_file()
    except (OSError, ValueError):
        return False
