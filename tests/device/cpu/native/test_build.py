"""The native kernels are compiled once, for what the machine has; without a compiler torch computes and the log says so."""

from __future__ import annotations

import platform
import stat
import subprocess
from pathlib import Path

import pytest

from xllm_py.base.errors import DeviceUnavailable
from xllm_py.device.cpu import CpuDevice
from xllm_py.device.cpu import device as cpu
from xllm_py.device.cpu.native import build as builder
from xllm_py.device.cpu.native.build import build, instruction_sets
from xllm_py.device.cpu.torch_kernels import TorchKernels

OLD = "flags : fpu sse2 avx\n"
AVX2 = "processor: 0\nflags\t\t: fpu sse2 avx avx2 fma f16c\nbugs: none\n"
AVX512 = AVX2.replace("fma", "fma avx512f avx512bw avx512vl avx512dq")
AVX512_BF16 = AVX512.replace("fma", "fma avx512_vnni avx512_bf16")


@pytest.mark.parametrize(
    ("cpuinfo", "best"),
    [
        ("", "plain"),
        (OLD, "plain"),
        (AVX2, "avx2"),
        (AVX512, "avx512"),
        (AVX512.replace("avx512dq", ""), "avx2"),
        (AVX512_BF16, "avx512_bf16"),
        (AVX512_BF16.replace("fma", "fma amx_tile amx_bf16"), "avx512_bf16"),
        (AVX512_BF16.replace("fma", "fma amx_tile amx_bf16 amx_int8"), "amx"),
    ],
)
def test_the_best_set_is_the_first_whose_every_instruction_the_cpu_has(
    cpuinfo: str, best: str
) -> None:
    found = instruction_sets(cpuinfo)
    assert found[0] == best
    assert found[-1] == "plain"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the user, empty. Nothing is computed with what is compiled into it, so nobody waits for it to be made fast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hasty = tuple("-O0" if each == "-O3" else each for each in builder._OPTIONS)
    monkeypatch.setattr(builder, "_OPTIONS", hasty)
    return tmp_path / "xllm_py"


def test_the_second_time_nothing_is_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build("plain")
    assert first.parent == cache
    assert [path.name for path in cache.iterdir()] == [first.name]

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(builder, "_compile", refuse)
    assert build("plain") == first
    with pytest.raises(AssertionError, match="compiled again"):
        build(next((name for name in instruction_sets() if name != "plain"), "avx2"))


def test_a_cache_that_others_may_write_to_is_not_used(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    built = build("plain")
    assert built.parent != cache
    assert not any(cache.iterdir())
    assert not built.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    """What the device will have said."""
    said: list[tuple[str, dict[str, object]]] = []
    log = type("Log", (), {"warning": lambda _, text, **more: said.append((text, more))})()
    monkeypatch.setattr(cpu, "_log", log)
    return said


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("compiler", "cause"), [("no-such-compiler", "no no-such-compiler"), ("false", "false failed")]
)
def test_without_a_compiler_torch_computes_and_one_line_says_what_to_install(
    compiler: str,
    cause: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(DeviceUnavailable, match=cause):
        build("plain")
    said = warnings_of(monkeypatch)
    device = CpuDevice(0, threads=1)
    assert isinstance(device._kernels, TorchKernels)
    assert len(said) == 1
    assert "torch computes" in said[0][0]
    assert cause in str(said[0][1]["cause"])


def test_a_set_that_the_system_does_not_allow_gives_way_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    said = warnings_of(monkeypatch)

    class Strict(cpu.Library):
        def __init__(self, path: Path, instruction_set: str) -> None:
            opened.append(instruction_set)
            if instruction_set == "first":
                raise DeviceUnavailable("the system does not let this process use first")

    monkeypatch.setattr(cpu, "Library", Strict)
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ["first", "second", "third"])
    monkeypatch.setattr(cpu, "build", lambda name: Path(name))
    assert cpu.open_library() is not None
    assert opened == ["first", "second"]
    (_, more), *others = said
    assert not others
    assert more["used"] == "second"
    assert "does not let this process use first" in str(more["cause"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates another machine's flags")
def test_it_compiles_for_every_set_of_this_family_of_machines(cache: Path) -> None:
    names = ("amx", "avx512_bf16", "avx512", "avx2", "plain")
    for name in names:
        symbols = subprocess.run(
            ["nm", "-D", "--defined-only", str(build(name))],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "xllm_attend" in symbols.stdout
    assert len(list(cache.iterdir())) == len(names)
