"""Loading a tokenizer: what works, and what a broken folder says."""

from __future__ import annotations

import threading

import pytest

from xllm_py.base.errors import InvalidValue, ModelLoadError
from xllm_py.openai.tokenizer import load_tokenizer


def test_text_comes_back(model_folder):
    tokenizer = load_tokenizer(model_folder)
    ids = tokenizer.encode("a wide word ☃<|end|>", add_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a wide word ☃<|end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a wide word ☃"
    assert tokenizer.vocab_size == 260
    assert tokenizer.special_tokens == {"eos_token": "<|end|>"}


def test_half_a_surrogate_pair_is_a_client_error(model_folder):
    with pytest.raises(InvalidValue):
        load_tokenizer(model_folder).encode("\ud800", add_special_tokens=False)


def test_a_long_text_in_a_thread_stops_nobody_else(model_folder):
    """Whoever holds the interpreter's lock all along leaves the others no turn but those of its start."""
    tokenizer = load_tokenizer(model_folder)
    begun, ended = threading.Event(), threading.Event()

    def work():
        begun.set()
        for _ in range(3):
            tokenizer.encode("ab " * 200_000, add_special_tokens=False)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(10)
    turns = 0
    while not ended.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 150  # 600 were counted; 40 with a lock that is only let go between two texts


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "tokenizer.json"),
        ({"tokenizer.model": "x"}, "tokenizer.model"),
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"tokenizer.json": "{}"}, "tokenizer.json"),
    ],
)
def test_a_broken_folder_is_named_with_its_file(tmp_path, files, named):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelLoadError, match=named):
        load_tokenizer(tmp_path)


def test_a_broken_config_is_named(model_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
