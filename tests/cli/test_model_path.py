"""Where --model looks, and what the model's folder says about sampling."""

from __future__ import annotations

import json
import os

import pytest

from tests.cli.support import say, write_model
from xllm_py.base.errors import ModelLoadError
from xllm_py.cli.generation_config import sampling_defaults
from xllm_py.cli.model_path import find_model
from xllm_py.cli.rules import Causes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hub"


def test_a_folder_is_taken_as_it_stands(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "here")
    assert find_model(str(folder), "") == folder
    monkeypatch.chdir(tmp_path)
    assert find_model("here", "") == folder
    assert find_model("here/", "") == folder


def test_a_name_is_looked_for_under_each_root_in_turn(tmp_path):
    second = write_model(tmp_path / "b" / "name")
    assert find_model("name", f"{tmp_path / 'a'},,{tmp_path / 'b'}") == second
    first = write_model(tmp_path / "a" / "name")
    assert find_model("name", f"{tmp_path / 'a'},{tmp_path / 'b'}") == first


def test_the_newest_snapshot_of_the_local_cache_comes_last(cache):
    old = write_model(cache / "models--Qwen--tiny" / "snapshots" / "1")
    new = write_model(cache / "models--Qwen--tiny" / "snapshots" / "2")
    os.utime(old, (1, 1))
    assert find_model("tiny", "") == new
    assert find_model("Qwen/tiny", "") == new


def test_what_is_not_there_names_the_places_tried(tmp_path, cache):
    (tmp_path / "root" / "name").mkdir(parents=True)  # a folder without config.json
    with pytest.raises(ModelLoadError) as error:
        find_model("name", str(tmp_path / "root"))
    assert f"{tmp_path / 'root' / 'name'}" in error.value.message
    assert "nothing is downloaded" in error.value.message
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    "name",
    ["a**b", "[", "x" * 5000, "a\0b", "..", "*", "~", "//", "a/b/c", "?"],
    ids=lambda n: ascii(n)[:12],
)
def test_an_odd_name_is_not_found_and_nothing_worse(cache, name):
    write_model(cache / "models--Qwen--tiny" / "snapshots" / "1")
    with pytest.raises(ModelLoadError):
        find_model(name, "/nowhere")


# ---- generation_config.json


def defaults(folder, body) -> tuple[dict[str, float], list[str]]:
    text = body if isinstance(body, str) else json.dumps(body)
    (folder / "generation_config.json").write_text(text)
    causes = Causes()
    found = sampling_defaults(causes, folder)
    assert causes.lines == []
    return found, causes.warnings


def test_no_file_means_no_defaults(tmp_path):
    assert sampling_defaults(Causes(), tmp_path) == {}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "max_new_tokens": 5},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1},
        ),
        ({"do_sample": True, "temperature": 1}, {"temperature": 1}),
        ({"top_k": 0, "temperature": None}, {"top_k": -1}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, {"temperature": 0.0}),
        ({}, {}),
    ],
)
def test_what_the_file_says_of_sampling_is_taken(tmp_path, body, found):
    assert defaults(tmp_path, body) == (found, [])


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 2.5},
        {"temperature": "0.7"},
        {"top_p": 0},
        {"top_p": True},
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_k": 2**40},
        {"min_p": 1.5},
        '{"temperature": NaN}',
        {"temperature": [1]},
    ],
    ids=str,
)
def test_a_value_we_do_not_take_is_left_out_with_a_warning(tmp_path, body):
    found, warnings = defaults(tmp_path, body)
    assert found == {}
    assert len(warnings) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000], ids=lambda text: text[:3])
def test_a_broken_file_is_exit_code_3(tmp_path, text):
    folder = write_model(tmp_path / "tiny")
    (folder / "generation_config.json").write_text(text)
    said = say("xllm", f"--model={folder}")
    assert (said.code, len(said.errors)) == (3, 1)
    assert "--generation_config=none" in said.err
    assert say("xllm", f"--model={folder}", "--generation_config=none").code == 0


def test_the_defaults_and_their_warnings_reach_the_instance(tmp_path):
    folder = write_model(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"top_k": 7, "top_p": 9}')
    said = say("xllm", f"--model={folder}")
    assert said.config.sampling_defaults == {"top_k": 7}
    assert said.config.warnings == (
        "generation_config.json: top_p is 9, which is not taken; our default stands",
    )
    said = say("xllm", f"--model={folder}", "--generation_config=none")
    assert (said.config.sampling_defaults, said.config.warnings) == ({}, ())
