"""Flags that reach a running part: API keys at both daemons' doors, seeds, the model's sampling defaults."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import ROOT, say, write_model
from tests.master.support import running_master
from tests.openai.support import MODEL, EchoBackend, make_door, write_model_folder
from tests.ports import free_port
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import ProtocolViolation
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.instance_info import Card, Role, card_from_json, card_to_json
from xllm_py.instance import daemon as instance_daemon
from xllm_py.instance.card import Identity
from xllm_py.instance.parts import Parts
from xllm_py.master import daemon as master_daemon
from xllm_py.openai.backend import ServedModel

WAIT_S = 20.0


class Daemon:
    """A real process that serves HTTP from its start on, whatever it still waits for."""

    def __init__(self, module: str, log: Path, *flags: str) -> None:
        self.port = free_port()
        name = "port" if module == "xllm" else "http_server_port"
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"xllm_py.cli.{module}", f"--{name}={self.port}", *flags],
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def get(self, path: str, key: str = "") -> tuple[int, Any]:
        """(status, JSON); status 0 while nobody listens."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            try:
                connection.request("GET", path, headers=headers)
            except OSError:
                return 0, None
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons that are gone at the end of the test."""
    daemons: list[Daemon] = []

    def make(module: str, *flags: str) -> Daemon:
        daemons.append(Daemon(module, tmp_path / f"{module}.log", *flags))
        return daemons[-1]

    yield make
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.wait()


@pytest.mark.parametrize("module", ["xllm", "xllm_master"])
def test_a_daemon_with_api_keys_lets_nobody_else_in(start, tmp_path, module):
    folder = write_model_folder(write_model(tmp_path / "model"))
    keys = tmp_path / "keys"
    keys.write_text("ann:first-key\n")
    keys.chmod(0o600)
    model = "model" if module == "xllm" else "tokenizer_path"
    # nobody answers there, so that it goes on waiting behind its open door
    etcd = f"--etcd_addr=127.0.0.1:{free_port()}"
    daemon = start(module, f"--api_key_file={keys}", f"--{model}={folder}", etcd)
    deadline = time.monotonic() + WAIT_S
    while daemon.get("/health")[0] != 200:
        assert time.monotonic() < deadline, (tmp_path / f"{module}.log").read_text()
        time.sleep(0.02)
    assert daemon.get("/ready") == (503, {"status": "not_ready"})
    status, body = daemon.get("/v1/models")
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert daemon.get("/v1/models", "first-ke")[0] == 401
    assert daemon.get("/metrics")[0] == 401
    assert daemon.get("/v1/models", "first-key") == (200, {"object": "list", "data": []})
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(WAIT_S) == 0
    log = (tmp_path / f"{module}.log").read_text()
    assert "first-key" not in log
    assert f"--api_key_file={keys}" in log


# ---- seeds


async def seeds(folder: Path, count: int, random_seed: int = -1, **fields: Any) -> list[int]:
    """The seeds of so many requests."""
    door = make_door(folder, random_seed=random_seed)
    for _ in range(count):
        assert (await door.complete("ab", **fields)).status == 200
    await door.app.close()
    return [submission.sampling.seed for submission in door.backend.submissions]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path)


async def test_seeds_of_one_base_are_the_same_in_a_row(folder):
    first = await seeds(folder, 5, random_seed=7)
    assert first == await seeds(folder, 5, random_seed=7)
    assert first != await seeds(folder, 5, random_seed=8)
    assert len(set(first)) == 5
    assert all(0 <= seed < 2**63 for seed in first)


async def test_without_a_base_no_two_runs_draw_the_same(folder):
    assert not set(await seeds(folder, 5)) & set(await seeds(folder, 5))


async def test_a_clients_seed_stands_whatever_the_base(folder):
    assert await seeds(folder, 2, random_seed=7, seed=-3) == [-3, -3]


# ---- sampling defaults


async def test_the_models_defaults_fill_what_a_request_leaves_out(folder):
    model = ServedModel(
        name="tiny",
        max_model_len=MODEL.max_model_len,
        vocab_size=MODEL.vocab_size,
        sampling_defaults={"temperature": 0.5, "top_k": 7, "top_p": 1},
    )
    door = make_door(folder, EchoBackend(served=(model,)))
    await door.complete("ab")
    await door.complete("ab", temperature=1.5, top_k=-1)
    await door.app.close()
    found = [each.sampling for each in door.backend.submissions]
    assert [(each.temperature, each.top_k, each.top_p, each.min_p) for each in found] == [
        (0.5, 7, 1.0, 0.0),
        (1.5, -1, 1.0, 0.0),
    ]


KEY = b"k" * 32
CARD = Card(name="a:1", rpc_address="a:2", type=0, incarnation_id="i")


def with_defaults(values: Any) -> bytes:
    return card_to_json(
        Card(name="a:1", rpc_address="a:2", type=0, incarnation_id="i", sampling_defaults=values),
        KEY,
    )


def test_a_card_carries_the_defaults():
    card = card_from_json(with_defaults({"temperature": 0.7, "top_k": 20}), KEY)
    assert card.sampling_defaults == {"temperature": 0.7, "top_k": 20}
    assert card_from_json(card_to_json(CARD, KEY), KEY).sampling_defaults == {}


@pytest.mark.parametrize(
    "values", [{"top_k": "7"}, {"top_k": True}, {"top_k": None}, [1], 7], ids=str
)
def test_a_card_with_other_defaults_than_numbers_is_refused(values):
    with pytest.raises(ProtocolViolation, match="sampling_defaults"):
        card_from_json(with_defaults(values), KEY)


async def test_the_master_takes_the_defaults_from_the_card():
    async with running_master() as master:
        await master.add("a", Role.DEFAULT, sampling_defaults={"temperature": 0.0})
        await master.mode("default")
        (model,) = master.parts.backend.models()
        assert model.sampling_defaults == {"temperature": 0.0}


def test_an_instance_puts_the_defaults_into_its_card(tmp_path):
    """The card is what `xllm` was told; the engine's part of it is not looked at here."""
    write_model(tmp_path / "tiny")
    (tmp_path / "tiny" / "generation_config.json").write_text('{"do_sample": false}')
    config = say("xllm", f"--model={tmp_path / 'tiny'}").config
    parts = Parts(config, clock=RealClock(), tasks=TaskFamily("card"), metrics=Metrics())
    identity = Identity(incarnation="i", cluster_key=KEY, http_port=1)
    card = parts.card(identity, 2, "READY")
    assert card.sampling_defaults == {"temperature": 0.0}


# ---- limits of the door


@pytest.mark.parametrize(
    ("program", "settings"),
    [("xllm", instance_daemon._settings), ("xllm-master", master_daemon._settings)],
)
def test_names_of_the_door_reach_it(tmp_path, program, settings):
    folder = write_model_folder(write_model(tmp_path / "model"))
    name = "model" if program == "xllm" else "tokenizer_path"
    said = say(program, f"--{name}={folder}", "--allowed_hosts=Api.example.org, xllm")
    assert settings(said.config).allowed_hosts == {"api.example.org", "xllm", "127.0.0.1"}
    assert say(program, f"--{name}={folder}", "--allowed_hosts=http://x").code == 2


@pytest.mark.parametrize(
    ("program", "settings"),
    [("xllm", instance_daemon._settings), ("xllm-master", master_daemon._settings)],
)
def test_limits_of_choices_and_logprobs_reach_the_door(tmp_path, program, settings):
    folder = write_model_folder(write_model(tmp_path / "model"))
    name = "model" if program == "xllm" else "tokenizer_path"
    said = say(program, f"--{name}={folder}", "--max_best_of=3", "--max_logprobs=5")
    assert (said.code, said.config.warnings) == (0, ())
    door = settings(said.config)
    assert (door.max_best_of, door.max_logprobs) == (3, 5)
