"""Text to ids and back with the model's own tokenizer.json (the `tokenizers` library).

`load_tokenizer` is called once by a daemon; the HTTP door encodes prompts and opens detokenisers over the result. Never
downloads, never runs code of the model folder.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tokenizers

from xllm_py.base.errors import InvalidValue, ModelLoadError

_MAX_CONFIG_BYTES = 64 << 20
_LARGE_CHARS = 64 << 10  # such a text needs tens of megabytes while it is read


class Tokenizer:
    """One vocabulary. Encoding and decoding are safe from several threads."""

    def __init__(self, inner: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.byte_level = _is_byte_level(inner)
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = inner.get_vocab_size()
        self._bytes: dict[int, bytes] = {}
        self.special_tokens = {
            name: text
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (text := _token_text(config.get(name))) is not None
        }

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; raises InvalidValue for text that is no Unicode (lone surrogates).

        Batch, because the library's plain `encode` keeps the interpreter's lock: 1 MiB in a thread stopped the event loop for
        half a second. Fast means without offsets into the text.
        """
        try:
            (found,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidValue("the text holds half of a surrogate pair; send UTF-8") from error
        ids: list[int] = found.ids
        if len(text) > _LARGE_CHARS:
            del found
            _give_back_memory()
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of a whole sequence; ids outside the vocabulary have none."""
        text: str = self._inner.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token of a byte-level vocabulary stands for; b"" for an unknown id."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._inner.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        return str(token).encode()  # an added token, by its own text, as the library does


def _byte_alphabet() -> dict[str, int]:
    """The characters byte-level vocabularies write bytes with: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_CHAR = _byte_alphabet()


def _is_byte_level(inner: tokenizers.Tokenizer) -> bool:
    if inner.decoder is None:
        return False
    return bool(json.loads(inner.decoder.__getstate__()).get("type") == "ByteLevel")


def _token_text(token: object) -> str | None:
    """A special token of tokenizer_config.json: a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the model folder, {} when the file is missing; raises ModelLoadError naming the file."""
    path = folder / name
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelLoadError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is no valid JSON; copy the model folder again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds no JSON object; copy the model folder again")
    return value


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read `<folder>/tokenizer.json`; raises ModelLoadError naming the file and what to do."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelLoadError(f"the tokenizer folder {folder} does not exist; check the path")
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = (folder / "tokenizer.model").is_file()
        fix = "convert its tokenizer.model" if found else "copy it from the model's repository"
        raise ModelLoadError(f"{path} is missing; {fix}")
    # the library raises bare Exception; a future hands that over as a value
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(tokenizers.Tokenizer.from_file, str(path))
    error = reading.exception()
    if error is not None:
        raise ModelLoadError(f"{path} is no usable tokenizer ({error}); copy it again") from error
    _give_back_memory()
    return Tokenizer(reading.result(), read_config(folder, "tokenizer_config.json"))


def _give_back_memory() -> None:
    """What work needed beside its result: 19 MB of 121 when a vocabulary of 151,936 is read, 100 MB a thread for a text of 1 MiB.

    Only glibc keeps it, and has the call, which takes 4 ms and no interpreter's lock.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
