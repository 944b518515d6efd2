"""Deaths at named moments (base/failpoints): one instance, or one master, dies there while requests are under way, and no text changes.

    python -m tests.faults.points [NAME ...]

With every name it has, each in turn; tests/faults/test_points.py takes some of them in every run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, Daemon, running, wait_for
from tests.e2e.pending import Pending
from tests.e2e.phases import body, serves_in_pairs

BLOCK = 16
PROMPT, ANSWER = 10 * BLOCK + 3, 2 * BLOCK + 4
CHUNK = 4 * BLOCK
FATAL = "299"  # a token
OF_P = (
    "p.recv",
    "p.prefill.chunk",
    "p.prefill.chunk.2",
    "p.prefill.chunk.3",
    "p.first_token",
    "p.offer.pre",
    "p.offer.post",
    "p.kv.pre_commit",
    "p.kv.post_commit",
    "p.first_generation.pre",
    "p.first_generation.post",
    "p.release",
    "P:d.delta.post_send",  # its own first token
)
OF_D = (
    "d.grant.pre",
    "d.grant.post",
    "d.kv.frame",
    "d.kv.frame.4",
    "d.kv.pre_commit",
    "d.kv.post_commit",
    "d.first_generation.pre",
    "d.first_generation.post",
    "d.step",
    "d.step.2",
    *(f"d.step.{count}" for count in (BLOCK - 1, BLOCK, BLOCK + 1)),
    "d.delta.pre_send",
    "d.delta.post_send",
    "d.delta.post_send.9",
    "d.fin",
)
OF_MASTER = (
    "m.submit.pre",
    "m.submit.post",
    "m.delta.pre_accept",
    "m.delta.post_accept.3",
    "m.client.pre_write.2",
    "m.client.post_write.5",
)


@dataclass
class House:
    """A master, a P and a D that live, and victims that come and go."""

    cluster: Cluster
    key_file: Path
    random: random.Random = field(default_factory=lambda: random.Random(5))

    @property
    def master(self) -> Daemon:
        return self.cluster.daemons[1]

    @property
    def survivors(self) -> list[Daemon]:
        return self.cluster.daemons[2:4]

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            f"--block_size={BLOCK}",
            f"--max_tokens_per_chunk_for_prefill={CHUNK}",
            f"--cluster_key_file={self.key_file}",
        )

    def prompts(self, count: int) -> list[list[int]]:
        """Nobody has seen them: what is cached is neither computed nor handed over."""
        return [self.random.choices(range(300), k=PROMPT) for _ in range(count)]

    @contextlib.contextmanager
    def victim(self, point: str, action: str = "kill9") -> Iterator[Daemon]:
        """One more instance, or master, that will not live long."""
        env = {"XLLM_FAILPOINTS": f"{point.removeprefix('P:')}:{action}"}
        if point in OF_MASTER:
            key = f"--cluster_key_file={self.key_file}"
            daemon = self.cluster.start_master(key, "--enable_failpoints", name="victim", env=env)
        else:
            role = "PREFILL" if point in OF_P else "DECODE"
            daemon = self.cluster.start_instance(
                "victim", role, *self.flags, "--enable_failpoints", env=env
            )
        try:
            wait_for(f"{point} to be ready or gone", lambda: ended(daemon) or daemon.is_ready())
            if point in OF_MASTER:
                serves(daemon)
            yield daemon
        finally:
            self.cluster.daemons.remove(daemon)
            daemon.process.kill()
            daemon.process.wait()

    def answers_right(self, prompts: list[list[int]], texts: list[str], **fields: object) -> None:
        """Asked again of those that live."""
        for prompt, text in zip(prompts, texts, strict=True):
            status, answer = self.master.request(
                "POST", "/v1/completions", {**asked(prompt), **fields}
            )
            assert status == 200, answer
            assert text == answer["choices"][0]["text"]

    def settles(self) -> None:
        """Nothing is left."""
        for daemon in self.survivors:
            wait_for(f"{daemon.name} to be idle", daemon.idle)


def serves(master: Daemon) -> None:
    """Whether it has the pair, without a request, which would set the points off."""
    wait_for("the pair", lambda: master.request("GET", "/ready")[1].get("mode") == "pd")


def ended(daemon: Daemon) -> bool:
    return daemon.process.poll() is not None


def asked(prompt: list[int]) -> dict[str, object]:
    return body(prompt, max_tokens=ANSWER)


@contextlib.contextmanager
def house(folder: Path) -> Iterator[House]:
    """With a model of its own."""
    model = make_checkpoint(folder / "tiny", seed=8, layers=4, with_tokenizer=True)
    key_file = folder / "key"
    key_file.write_text("test key of no secrecy whatsoever, 1234")
    key_file.chmod(0o600)
    with running(folder, model) as cluster:
        cluster.start_registry()
        made = House(cluster, key_file)
        cluster.start_master(
            f"--cluster_key_file={key_file}", "--suspect_after_ms=1500", "--gone_after_ms=3000"
        )
        for role in ("PREFILL", "DECODE"):
            cluster.start_instance(role.lower(), role, *made.flags)
        cluster.wait_ready(*cluster.daemons[1:])
        serves_in_pairs(made.master)
        yield made


def kill_instance_at(made: House, point: str) -> None:
    """Requests until it has struck; all of them are answered as if nothing had happened."""
    with made.victim(point) as victim:
        prompts: list[list[int]] = []
        texts: list[str] = []
        deadline = time.monotonic() + 30
        while not ended(victim):
            assert time.monotonic() < deadline, f"{point} was not come to"
            more = made.prompts(3)
            pending = [Pending(made.master, asked(prompt)) for prompt in more]
            for each in pending:
                answer = each.answer()
                assert answer.status == 200, (point, answer.body)
                texts.append(answer.body["choices"][0]["text"])
            prompts += more
        name = point.removeprefix("P:").rstrip(".0123456789")
        assert f"failpoint {name}: " in victim.log(), victim.tail()
    made.answers_right(prompts, texts)
    made.settles()


def kill_master_at(made: House, point: str) -> None:
    """A client with an Idempotency-Key goes on at the other one, behind the last event it has."""
    with made.victim(point) as victim:
        (prompt,) = made.prompts(1)
        wanted, key, seen, last_id = {**asked(prompt), "stream": True}, point, "", ""
        for master in (victim, made.master):
            headers = {"idempotency-key": key} | ({"last-event-id": last_id} if last_id else {})
            with contextlib.suppress(OSError, http.client.HTTPException):
                for event_id, text in events(master, wanted, headers):
                    seen, last_id = seen + text, event_id
        wait_for(f"{point} to be come to", lambda: ended(victim), 5.0)
    made.answers_right([prompt], [seen])
    made.settles()


def events(
    master: Daemon, wanted: dict[str, object], headers: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """(id, text) of each event that has come whole."""
    connection = http.client.HTTPConnection("127.0.0.1", master.port, timeout=30)
    try:
        sent = {"content-type": "application/json", **headers}
        connection.request("POST", "/v1/completions", json.dumps(wanted).encode(), sent)
        answer, event_id = connection.getresponse(), ""
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"id: "):
                event_id = line[4:].strip().decode()
            elif line.startswith(b"data: {"):
                yield event_id, json.loads(line[6:])["choices"][0]["text"]
    finally:
        connection.close()


def query_of_death(made: House) -> None:
    """Q-1: a request whose first token kills whichever D works on it. It ends with one error, its like is refused, all others are answered."""
    master, healthy = made.master, made.survivors[1]
    (prompt, *others), never = made.prompts(9), {"logit_bias": {FATAL: -100}}
    deadly = {**asked(prompt), "logit_bias": {FATAL: 100}}
    env = {"XLLM_FAILPOINTS": f"d.step@{FATAL}:kill9"}
    victims = [
        made.cluster.start_instance(f"d{n}", "DECODE", *made.flags, "--enable_failpoints", env=env)
        for n in range(4)
    ]
    made.cluster.wait_ready(*victims)
    made.cluster.daemons.remove(healthy)
    healthy.stop()
    pending = [Pending(master, {**asked(each), **never}) for each in others]
    answer = Pending(master, deadly).answer()
    assert (answer.status, answer.error["code"]) == (500, "request_quarantined"), answer.body
    texts = []
    for each in pending:
        told = each.answer()
        assert told.status == 200, told.body
        texts.append(told.body["choices"][0]["text"])
    # two, or a third one where the first two died within half a second, which may have been one event
    struck = [each for each in victims if "failpoint d.step: " in each.log()]
    assert 2 <= len(struck) <= 3
    for each in struck:
        each.process.wait(10)
    again = master.exchange("POST", "/v1/completions", json.dumps(deadly).encode())
    assert (again.status, again.error["code"]) == (500, "request_quarantined")
    assert [each for each in victims if "failpoint d.step: " in each.log()] == struck
    for each in struck:
        made.cluster.daemons.remove(each)
    made.answers_right(others, texts, **never)


def crash_loop(made: House, lives: int = 10) -> None:
    """M-5: a D that dies at its twentieth step, and is started again each time."""
    prompts: list[list[int]] = []
    texts: list[str] = []
    with made.victim("d.step.20") as victim:
        for _ in range(lives):
            wait_for("the next life", lambda: ended(victim) or victim.is_ready(), 30)
            while not ended(victim):
                more = made.prompts(3)
                for each in [Pending(made.master, asked(prompt)) for prompt in more]:
                    answer = each.answer()
                    assert answer.status == 200, answer.body
                    texts.append(answer.body["choices"][0]["text"])
                prompts += more
            victim.start()
    made.answers_right(prompts, texts)
    made.settles()


def kill_at(made: House, point: str) -> None:
    """Whoever comes by there."""
    (kill_master_at if point in OF_MASTER else kill_instance_at)(made, point)


def main() -> None:
    """Command line."""
    with tempfile.TemporaryDirectory() as folder, house(Path(folder)) as made:
        for point in sys.argv[1:] or (*OF_P, *OF_D, *OF_MASTER):
            start = time.monotonic()
            kill_at(made, point)
            print(f"{point}: right, {time.monotonic() - start:.1f} s", flush=True)
        if not sys.argv[1:]:
            crash_loop(made)
            query_of_death(made)


if __name__ == "__main__":
    main()
