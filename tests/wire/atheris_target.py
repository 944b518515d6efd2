"""The KV parser under coverage-guided fuzzing, by hand; atheris is not among the test dependencies.

pip install atheris==3.0.0 && python -m tests.wire.atheris_target -max_total_time=600 [corpus folder]
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["xllm_py.wire"]):
    from tests.wire.test_kv_fuzz import Hostile
    from xllm_py.wire.codec import Header


def try_one(data: bytes) -> None:
    """A peer that holds the key says what these bytes say; nothing is written outside its grants."""
    source, hostile = atheris.FuzzedDataProvider(data), Hostile(patience=3)
    while source.remaining_bytes() > 8:
        if source.ConsumeIntInRange(0, 9) == 0:
            verb = ("revoke", "commit")[source.ConsumeIntInRange(0, 1)]
            hostile.act((verb, source.ConsumeIntInRange(0, 4)))
            continue
        right = source.ConsumeBool()
        hostile.send(
            Header(
                type=source.ConsumeIntInRange(0, 255),
                seq=0,
                grant=source.ConsumeIntInRange(0, 6).to_bytes(16, "big"),
                part=source.ConsumeIntInRange(0, 255),
                layer=source.ConsumeIntInRange(0, 65535),
                first=source.ConsumeIntInRange(0, 2**32 - 1),
                num_blocks=source.ConsumeIntInRange(0, 65535),
                length=None if right else source.ConsumeIntInRange(0, 2**32 - 1),  # type: ignore[arg-type]
                checksum=None if right else source.ConsumeIntInRange(0, 2**32 - 1),  # type: ignore[arg-type]
            )
        )
    if not hostile.taker.written() <= hostile.allowed:
        raise AssertionError(f"blocks {hostile.taker.written() - hostile.allowed} were written")


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_one)
    atheris.Fuzz()
