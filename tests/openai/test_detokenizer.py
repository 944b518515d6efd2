"""Streamed text equals the full decode, and stop strings do not depend on how the text was cut."""

from __future__ import annotations

import itertools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from xllm_py.openai.detokenizer import ByteStream, StopMatcher, WindowStream, open_stream
from xllm_py.openai.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def byte_level(model_folder):
    return load_tokenizer(model_folder)


@pytest.fixture(scope="module")
def fallback():
    """A vocabulary in the manner of sentencepiece: words with a leading bar, single bytes as <0x..>."""
    words = ["<unk>", "▁", "▁the", "▁snow", "man", "☃", "▁é"]
    vocab = {word: index for index, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(inner, {})


def cut(values, sizes):
    """`values` in pieces whose sizes repeat `sizes`."""
    left = list(values)
    for size in itertools.cycle(sizes):
        if not left:
            return
        yield left[:size]
        left = left[size:]


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(ids=st.lists(st.integers(0, 310), max_size=40), sizes=SIZES, skip=st.booleans())
def test_any_ids_stream_to_their_full_decode(byte_level, ids, sizes, skip):
    stream = open_stream(byte_level, skip_special_tokens=skip)
    assert isinstance(stream, ByteStream)
    text = "".join(stream.push(piece) for piece in cut(ids, sizes)) + stream.flush()
    assert text == byte_level.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=20), sizes=SIZES)
def test_whole_characters_only(byte_level, text, sizes):
    ids = byte_level.encode(text, add_special_tokens=False)
    stream = open_stream(byte_level, skip_special_tokens=True)
    said = ""
    for piece in cut(ids, sizes):
        said += stream.push(piece)
        assert text.startswith(said)
    assert said == text
    assert stream.flush() == ""


def test_an_emoji_over_four_tokens_appears_once_and_whole(byte_level):
    ids = byte_level.encode("a😀b", add_special_tokens=False)
    assert len(ids) == 6
    stream = open_stream(byte_level, skip_special_tokens=True)
    assert [stream.push([token]) for token in ids] == ["a", "", "", "", "😀", "b"]


def test_an_unfinished_character_is_flushed_as_a_replacement(byte_level):
    ids = byte_level.encode("a😀", add_special_tokens=False)[:-1]
    stream = open_stream(byte_level, skip_special_tokens=True)
    assert stream.push(ids) == "a"
    assert stream.flush() == "\ufffd"


@given(text=st.text(alphabet="the snowman☃é ß😀", max_size=30), sizes=SIZES)
def test_other_vocabularies_stream_to_their_full_decode(fallback, text, sizes):
    ids = fallback.encode(text, add_special_tokens=False)
    stream = open_stream(fallback, skip_special_tokens=True)
    assert isinstance(stream, WindowStream)
    said = "".join(stream.push(piece) for piece in cut(ids, sizes)) + stream.flush()
    assert said == fallback.decode(ids, skip_special_tokens=True) == text


def test_a_window_gives_up_on_bytes_that_never_become_a_character(fallback):
    lone = fallback.encode("😀", add_special_tokens=False)[2:3]
    stream = open_stream(fallback, skip_special_tokens=True)
    said = "".join(stream.push(lone) for _ in range(1000))
    assert said.strip("\ufffd") == ""
    assert len(said) > 900  # text is not held back without bound


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4),
    sizes=SIZES,
    include=st.booleans(),
)
def test_stop_strings_are_found_whatever_the_cut(text, stops, sizes, include):
    def run(pieces):
        matcher = StopMatcher(stops, include=include)
        said = ""
        for piece in pieces:
            said += matcher.push("".join(piece))
            if matcher.hit:
                return said, True
        return said + matcher.flush(), False

    assert run(cut(text, sizes)) == run(cut(text, [1])) == run([text])
    said, hit = run([text])
    assert hit == any(stop in text for stop in stops)
    assert text.startswith(said)
    if not hit:
        assert said == text
    elif not include:
        assert not any(stop in said for stop in stops)


def test_text_that_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["END"], include=False)
    assert [matcher.push(text) for text in ("aE", "N", "Eb", "EN")] == ["a", "", "ENEb", ""]
    assert matcher.flush() == "EN"


def test_the_stop_string_that_is_complete_first_wins():
    matcher = StopMatcher(["abc", "b"], include=True)
    assert matcher.push("xabc") == "xab"
    assert matcher.hit
