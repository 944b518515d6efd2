"""The quickstart: registry, master, one PREFILL and one DECODE instance on this box, one chat answer, and where its time went.

Called by scripts/quickstart.sh, which makes the environment. Every process it starts is its own child: it stops them by pid when
it ends, and the kernel ends them should it be killed. Never imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "run" / "quickstart"
MODEL = ROOT / "models" / "xllm-demo"
QUESTION = "What is the handoff?"
HOST = "127.0.0.1"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
ANSWER_TIMEOUT_S = 120.0
PR_SET_PDEATHSIG = 1


class QuickstartError(Exception):
    """One line of cause and fix."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM."""


@dataclass
class Ports:
    """Those of the documentation where they are free, else any."""

    etcd: int = 12389
    http: int = 28888
    rpc: int = 28889
    prefill: int = 8010
    prefill_control: int = 7777
    prefill_kv: int = 26000
    decode: int = 8020
    decode_control: int = 7787
    decode_kv: int = 26100

    def settle(self) -> None:
        """Replace each port that is taken."""
        for name, port in list(vars(self).items()):
            setattr(self, name, port if is_free(port) else any_port())


def is_free(port: int) -> bool:
    """Whether a server could listen on it now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def any_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass
class Processes:
    """What was started, in order."""

    started: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)

    def start(self, name: str, *words: str) -> None:
        """Start one program of this checkout; its output goes to run/quickstart/<name>.log."""
        LOGS.mkdir(parents=True, exist_ok=True)
        path = LOGS / f"{name}.log"
        path.unlink(missing_ok=True)  # an older quickstart that still runs writes on into its own
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                start_new_session=True,  # Ctrl-C reaches us alone; we stop the others in order
                preexec_fn=die_with_parent,
            )
        self.started.append((name, process))

    def check(self) -> None:
        """Raise QuickstartError when one of them has ended."""
        for name, process in self.started:
            if process.poll() is not None:
                lines = (LOGS / f"{name}.log").read_text(errors="replace").splitlines()
                last = lines[-1] if lines else "no output"
                raise QuickstartError(f"{name} ended with exit code {process.returncode}: {last}")

    def stop(self) -> None:
        """Instances, then master, then registry, so that each can still say goodbye to the next."""
        for names in (("decode", "prefill"), ("master",), ("registry",)):
            leaving = [each for each in self.started if each[0] in names]
            for _, process in leaving:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for name, process in leaving:
                try:
                    process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    print(f"{name} did not stop in time and is killed", file=sys.stderr)
                    process.kill()
                    process.wait()
        self.started.clear()


def die_with_parent() -> None:
    """In the child, before exec: the kernel ends it when we die."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_cluster(processes: Processes, ports: Ports, model: Path) -> None:
    """Four processes; any order would do, whoever comes first waits for the others."""
    threads = max(1, (os.cpu_count() or 2) // 2)
    etcd = f"{HOST}:{ports.etcd}"
    processes.start("registry", "xllm_py.registry.embedded", f"--listen-client-urls=http://{etcd}")
    processes.start(
        "master",
        "xllm_py.cli.xllm_master",
        f"--etcd_addr={etcd}",
        f"--http_server_port={ports.http}",
        f"--rpc_server_port={ports.rpc}",
        f"--tokenizer_path={model}",
        "--debug_endpoints=true",
    )
    for role, port, control, kv in (
        ("prefill", ports.prefill, ports.prefill_control, ports.prefill_kv),
        ("decode", ports.decode, ports.decode_control, ports.decode_kv),
    ):
        processes.start(
            role,
            "xllm_py.cli.xllm",
            f"--model={model}",
            "--devices=cpu:0",
            f"--cpu_threads={threads}",
            "--max_cache_size=268435456",
            "--block_size=16",
            "--enable_disagg_pd=true",
            f"--instance_role={role.upper()}",
            f"--etcd_addr={etcd}",
            f"--port={port}",
            f"--disagg_pd_port={control}",
            f"--transfer_listen_port={kv}",
        )


def get(port: int, path: str) -> tuple[int, Any]:
    """(status, JSON)."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def wait_ready(processes: Processes, port: int) -> None:
    """Until the master says that requests can be served by both; a lone instance would serve alone after a while."""
    deadline = time.monotonic() + START_TIMEOUT_S
    body: Any = "no answer yet"
    while time.monotonic() < deadline:
        processes.check()
        with contextlib.suppress(OSError, ValueError):
            status, body = get(port, "/ready")
            if status == 200 and body.get("mode") == "pd":
                return
        time.sleep(0.1)
    raise QuickstartError(
        f"the cluster was not ready within {START_TIMEOUT_S:.0f} s ({body}). Read {LOGS}/*.log"
    )


def ask(port: int, model: str, question: str) -> Iterator[dict[str, Any]]:
    """The chunks of the answer as they arrive; the last one carries the usage."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_TIMEOUT_S)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise QuickstartError(f"the request failed with {answer.status}: {answer.read()!r}")
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise QuickstartError(f"the stream failed: {chunk['error']['message']}")
            yield chunk
    raise QuickstartError(f"the stream broke off. Read {LOGS}/*.log")


def tell_journey(record: dict[str, Any], num_tokens: int) -> None:
    """Where the time went, from the moments the master keeps of a request."""
    moments = record["moments"]
    prefill, decode = record["prefill_instance"], record["decode_instance"]

    def between(begin: str, end: str) -> str:
        if begin not in moments or end not in moments:
            return "      none"
        return f"{1000 * (moments[end] - moments[begin]):7.1f} ms"

    print("\nWhere the time went:")
    print(f"  queue        {between('received', 'admitted')}   until P took it up")
    print(f"  prefill      {between('admitted', 'first_token')}   on P = {prefill}")
    print(
        f"  first token  {between('received', 'first_token')}   all of the above; P sends it at once"
    )
    print(f"  handoff      {between('offered', 'landed')}   P to D, KV over TCP while P computes;")
    print(f"               {between('first_token', 'landed')}   of it after the first token")
    print(
        f"  decode       {between('landed', 'finished')}   on D = {decode}, {num_tokens - 1} tokens"
    )


def tell_next(port: int, model: str, keep: bool) -> None:
    """How to send the next request."""
    body = json.dumps(
        {"model": model, "stream": True, "messages": [{"role": "user", "content": "Who are you?"}]}
    )
    print(
        f"""
The next request, with curl:
  curl -N http://{HOST}:{port}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{body}'

and with the openai client (pip install openai):
  from openai import OpenAI
  client = OpenAI(base_url="http://{HOST}:{port}/v1", api_key="none")
  answer = client.chat.completions.create(
      model="{model}", messages=[{{"role": "user", "content": "Who are you?"}}])
  print(answer.choices[0].message.content)
"""
    )
    if keep:
        print("All four processes run on. Ctrl-C stops them.")
    else:
        print("Stopping. To leave it running: ./scripts/quickstart.sh --keep")


def show(port: int, model: str, question: str) -> None:
    """One question, its answer as it comes, its journey."""
    print(f"\n> {question}\n")
    chunk: dict[str, Any] = {}
    for chunk in ask(port, model, question):
        for choice in chunk["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
    print()
    _, record = get(port, f"/debug/requests/{chunk['id']}")
    tell_journey(record, chunk["usage"]["completion_tokens"])


def run(options: argparse.Namespace) -> None:
    """Start, ask, tell; with --keep wait for Ctrl-C."""
    model = options.model.resolve()
    if not (model / "config.json").is_file():
        raise QuickstartError(f"{model} is no model folder. Pass --model=FOLDER")
    processes, ports = Processes(), Ports()
    ports.settle()
    began = time.monotonic()
    try:
        print(f"starting registry, master, prefill and decode (logs: {LOGS})", flush=True)
        start_cluster(processes, ports, model)
        wait_ready(processes, ports.http)
        print(f"ready after {time.monotonic() - began:.1f} s")
        show(ports.http, model.name, options.question)
        tell_next(ports.http, model.name, options.keep)
        while options.keep:
            processes.check()
            time.sleep(0.5)
    finally:
        processes.stop()


def on_signal(number: int, _frame: FrameType | None) -> None:
    """The first signal ends what runs; more of them change nothing while processes stop."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        prog="quickstart.sh", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--keep", action="store_true", help="leave it running until Ctrl-C")
    parser.add_argument("--model", type=Path, default=MODEL, help="another Qwen2 checkpoint folder")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    try:
        run(options)
    except QuickstartError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 1
    except Interrupted:
        print("\nstopped", file=sys.stderr)
        return 0 if options.keep else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
