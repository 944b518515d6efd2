"""benchmarks/offline reaches into the model: what it times must be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import offline


def test_a_row_has_its_speed_its_limit_and_their_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(offline, "SHAPE", offline.SHAPE | small)
    monkeypatch.setattr(offline, "VOCABULARY", 500)
    (tmp_path / "config.json").write_text(json.dumps(offline.SHAPE))
    executor = offline.open_engine(tmp_path, 1)
    with torch.inference_mode():
        offline.measure(executor, "decode", [0, 1], [1, 1], [3, 3], 1, {"shape": "small"})
    executor.close()
    row = json.loads(capsys.readouterr().out)
    assert row["what"] == "decode"
    assert row["tokens_per_s"]["median"] > 0 and row["limit"]["median"] > 0 and row["share"] > 0
