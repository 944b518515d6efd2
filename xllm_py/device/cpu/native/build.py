"""Compiles the kernels for this machine's instruction set and keeps the result: two or three seconds, once per machine and version.

The file is kept in the user's cache folder under a hash of sources, compiler and options. A cache that others could write to is not
used; then the kernels are built anew for the process. Called by cpu.device; `python -m xllm_py.device.cpu.native.build` does it ahead.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from xllm_py.base import log
from xllm_py.base.errors import DeviceUnavailable

_FOLDER = Path(__file__).parent
_SOURCES = (
    "kernels.cpp",
    "linear.h",
    "attention.h",
    "carry.h",
    "rowwise.h",
    "draw.h",
    "tiles.h",
    "products.h",
    "simd.h",
)
_COMPILERS = ("c++", "g++", "clang++")
_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-w")
_TIMEOUT_S = 120.0
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX512_BF16 = (*_AVX512, "fma", "avx512_vnni", "avx512_bf16")
# instruction set -> what the CPU must have, which is also what the compiler may use; the best one first
_SETS = {
    "amx": (*_AVX512_BF16, "amx_tile", "amx_bf16", "amx_int8"),
    "avx512_bf16": _AVX512_BF16,
    "avx512": (*_AVX512, "fma"),
    "avx2": ("avx2", "fma"),
    "plain": (),
}

_log = log.get(__name__)
_private: list[tempfile.TemporaryDirectory[str]] = []  # of this process, removed when it ends


def instruction_sets(cpuinfo: str | None = None) -> list[str]:
    """Those this machine has, the best one first. cpuinfo: the text of /proc/cpuinfo, read when it is None and there."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        known = platform.machine() in ("x86_64", "AMD64") and path.exists()
        cpuinfo = path.read_text() if known else ""
    lines = [line for line in cpuinfo.splitlines() if line.startswith("flags")]
    flags = set(lines[0].split()) if lines else set()
    return [name for name, needed in _SETS.items() if flags.issuperset(needed)]


def build(instruction_set: str) -> Path:
    """The compiled library. Raises DeviceUnavailable when there is no compiler or it fails."""
    given = os.environ.get("CXX", "")
    compiler = (
        shutil.which(given) if given else next(filter(None, map(shutil.which, _COMPILERS)), None)
    )
    if compiler is None:
        wanted = given or "C++ compiler"
        raise DeviceUnavailable(f"no {wanted} is there; install one (Debian: apt-get install g++)")
    flags = [
        f"-m{name.replace('_', '-' if name.startswith('amx') else '')}"
        for name in _SETS[instruction_set]
    ]
    name = f"kernels-{instruction_set}-{_version(compiler, flags)}.so"
    folder = _cache()
    if folder is None:
        _private.append(tempfile.TemporaryDirectory(prefix="xllm-kernels-"))
        folder = Path(_private[-1].name)
    target = folder / name
    if not target.exists():
        _compile(compiler, flags, target)
    return target


def _version(compiler: str, flags: list[str]) -> str:
    told = subprocess.run(
        [compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=False
    )
    digest = hashlib.blake2b(told.stdout, digest_size=8)
    for part in (*_OPTIONS, *flags):
        digest.update(part.encode())
    for source in _SOURCES:
        digest.update((_FOLDER / source).read_bytes())
    return digest.hexdigest()


def _cache() -> Path | None:
    """The user's own cache folder; None when it cannot be made or others may write to it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if base else Path("~/.cache").expanduser()) / "xllm_py"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    shared = found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return None if shared or not os.access(folder, os.W_OK) else folder


def _compile(compiler: str, flags: list[str], target: Path) -> None:
    """With OpenMP, or with one thread where the compiler has none. Another process may do the same at the same time."""
    making = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *_OPTIONS, *flags, str(_FOLDER / "kernels.cpp"), "-o", str(making)]
    told = ""
    for threads in (["-fopenmp"], []):
        try:
            run = subprocess.run(
                [*command, *threads],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeviceUnavailable(
                f"{compiler} could not be run ({error}); set CXX to another"
            ) from error
        if run.returncode == 0:
            making.replace(target)
            _log.info(
                "kernels compiled", compiler=compiler, file=str(target), threads=bool(threads)
            )
            return
        told = told or _cause(run.stderr) or f"exit code {run.returncode}"
    raise DeviceUnavailable(f"{compiler} failed on the kernels ({told[:200]}); set CXX to another")


def _cause(stderr: str) -> str:
    """Of all lines the one that says what is wrong."""
    lines = stderr.strip().splitlines()
    return next((line for line in lines if "error" in line), "".join(lines[:1]))


if __name__ == "__main__":
    build(instruction_sets()[0])
