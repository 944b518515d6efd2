"""The commands as programs: what they load, how the launchers find them, what the shell's completion says."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.cli.support import ROOT, child, python

LAUNCHERS = ("xllm", "xllm-master", "xllm_master_serving")
HEAVY = ("torch", "grpc", "transformers", "safetensors", "tokenizers", "uvicorn", "etcd3")
# a module's main is run as the console entry point would, then what was loaded is told
LOADED = f"""
import runpy, sys
sys.argv[0:1] = []
code = 0
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("xllm_py.cli.xllm", "--help"), 0),
        (("xllm_py.cli.xllm", "--helpfull"), 0),
        (("xllm_py.cli.xllm", "--version"), 0),
        (("xllm_py.cli.xllm", "--nonsense"), 2),
        (("xllm_py.cli.xllm", "--port=99999"), 2),
        (("xllm_py.cli.xllm", "--model=/nowhere"), 3),
        (("xllm_py.cli.xllm_master", "--help"), 0),
        (("xllm_py.cli.xllm_master", "--version"), 0),
        (("xllm_py.cli.xllm_master", "--nonsense"), 2),
        (("xllm_py.cli.xllm_master", "--tokenizer_path=/nowhere"), 3),
    ],
)
def test_an_answer_at_once_loads_nothing_heavy(words, code):
    ended = python(LOADED, *words)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["xllm", "xllm_master"])
def test_importing_a_command_loads_nothing_heavy(name):
    code = f"import sys, xllm_py.cli.{name}; print([m for m in {HEAVY!r} if m in sys.modules])"
    ended = python(code)
    assert (ended.returncode, ended.stdout) == (0, "[]\n")


def test_what_the_masters_daemon_loads_has_no_torch():
    code = "import sys, xllm_py.master.daemon; print('torch' in sys.modules)"
    assert python(code).stdout == "False\n"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_runs_from_another_folder_and_through_a_symlink(name, tmp_path):
    program = "xllm" if name == "xllm" else "xllm-master"
    link = tmp_path / "deep" / "link"
    link.parent.mkdir()
    link.symlink_to(ROOT / "bin" / name)
    for path in (ROOT / "bin" / name, link):
        ended = child(str(path), "--version", cwd=tmp_path, PYTHONPATH="")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith(f"{program} version ")
    ended = child(f"./{link.name}", "--help", cwd=link.parent, PYTHONPATH="")
    assert ended.returncode == 0
    assert ended.stdout.startswith(f"{program}: ")


@pytest.mark.parametrize("name", [*LAUNCHERS, "etcd"])
def test_a_launcher_of_a_checkout_without_its_environment_says_what_to_run(name, tmp_path):
    launcher = tmp_path / "bin" / name
    launcher.parent.mkdir()
    launcher.write_bytes((ROOT / "bin" / name).read_bytes())
    bare = tmp_path / "python3"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    for tool in ("bash", "dirname", "readlink"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    bash = str(tmp_path / "bash")
    ended = subprocess.run(
        [bash, launcher],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "Run scripts/setup_env.sh" in ended.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_passes_words_and_exit_code_on(name):
    ended = child(str(ROOT / "bin" / name), "--a b", "--port=' '", "word with blanks")
    assert ended.returncode == 2
    assert "unknown flag --a b" in ended.stderr
    assert "stray word 'word with blanks'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_console_entry_points_are_the_same_functions():
    from importlib.metadata import entry_points

    from xllm_py.cli import xllm, xllm_master

    ours = [each for each in entry_points(group="console_scripts") if "xllm" in each.name]
    found = {entry.name: entry.load() for entry in ours}
    assert found["xllm"] is xllm.main
    assert found["xllm-master"] is found["xllm_master_serving"] is xllm_master.main


def test_a_command_sets_what_its_engines_need_before_anything_is_loaded():
    code = (
        "import os\n"
        "from xllm_py.cli.entry import run_command\n"
        "class Command:\n"
        "    name = 'none'\n"
        "    def start(self, words):\n"
        "        print(words, os.environ['HF_HUB_OFFLINE'], os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])\n"
        "        return 7\n"
        "run_command(Command(), ['a'])\n"
    )
    ended = python(code)
    assert (ended.returncode, ended.stdout) == (7, "['a'] 1 0\n")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("xllm --enable_dis", ["--enable_disagg_pd"]),
        ("xllm --nonsense word --enable_disagg_p", ["--enable_disagg_pd"]),
        ("xllm --metrics=t", ["true"]),
    ],
)
def test_the_shells_completion_is_answered(line, offered):
    words = line.split()
    ended = child(
        *(sys.executable, "-m", "xllm_py.cli.xllm"),
        _XLLM_COMPLETE="bash_complete",
        COMP_WORDS=line,
        COMP_CWORD=str(len(words) - 1),
    )
    assert ended.returncode == 0
    assert [row.split(",")[1] for row in ended.stdout.splitlines()] == offered


def test_a_reader_that_closes_early_is_no_traceback():
    command = f"{sys.executable} -m xllm_py.cli.xllm --helpfull | true"
    ended = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.stderr == ""
