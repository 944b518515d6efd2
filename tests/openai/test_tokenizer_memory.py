"""What loading a vocabulary of a real size leaves resident: the tokenizer, not what was needed to read it."""

from __future__ import annotations

import ctypes
import itertools
import json
import string
import subprocess
import sys
from pathlib import Path

import pytest

BARE = "import tokenizers; kept = tokenizers.Tokenizer.from_file(sys.argv[1] + '/tokenizer.json')"
OURS = "from xllm_py.openai.tokenizer import load_tokenizer; kept = load_tokenizer(sys.argv[1])"
MOST = 0.9  # of what the library alone leaves behind; 0.68 was measured


@pytest.fixture
def large_vocabulary(tmp_path: Path) -> Path:
    """26 letters, their 676 pairs and 100,000 pairs of those, with the merges that make them."""
    letters = list(string.ascii_lowercase)
    pairs = [left + right for left in letters for right in letters]
    fours = [left + right for left, right in itertools.product(pairs, pairs)][:100_000]
    merges = [f"{pair[0]} {pair[1]}" for pair in pairs] + [f"{w[:2]} {w[2:]}" for w in fours]
    words = {word: token for token, word in enumerate([*letters, *pairs, *fours])}
    model = {"type": "BPE", "vocab": words, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    return tmp_path


def grown_by(load: str, folder: Path) -> int:
    """Resident bytes that loading adds in a process of its own, its imports done before."""
    modules = "import sys, psutil, tokenizers, xllm_py.openai.tokenizer"
    now = "psutil.Process().memory_info().rss"
    program = f"{modules}; start = {now}; {load}; print({now} - start)"
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(run.stdout)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps what was freed"
)
def test_what_reading_a_tokenizer_needed_is_given_back(large_vocabulary: Path) -> None:
    assert grown_by(OURS, large_vocabulary) < MOST * grown_by(BARE, large_vocabulary)
