"""Rules about values that no type can say, shared by both daemons. Each notes causes; none noted means all is well."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_py.base import failpoints
from xllm_py.base.errors import UsageError
from xllm_py.cli.flag_types import FALSE, TRUE
from xllm_py.cli.flags import one_line
from xllm_py.core.sampling import MAX_BEST_OF, MAX_LOGPROBS
from xllm_py.core.service_config import EtcdSlice, HttpSlice, LogSlice, TlsSlice

_ENDPOINT = re.compile(r"(https?://)?(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_MIN_KEY_BYTES = 32
_FOREIGN = (
    "MC_TCP_PROTO",
    "XLLM_PYTHON_MODEL_PATH",
    "ENABLE_XLLM_DEBUG_LOG",
)
_HOST_NAME = re.compile(r"[a-z0-9._-]{1,253}")
_API_KEY = re.compile(r"([A-Za-z0-9._-]{1,64}):([!-~]{1,512})")  # a key is what a header can carry


class Causes:
    """Collects what is wrong, so that one start tells it all."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def need(self, good: bool, cause: str) -> None:
        """Note `cause` unless `good`."""
        if not good:
            self.lines.append(one_line(cause))

    def warn(self, line: str) -> None:
        """Note what the operator should know although the start goes on."""
        self.warnings.append(one_line(line))


def is_loopback(host: str) -> bool:
    """Whether nobody beyond this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_folder(path: str) -> bool:
    """Whether it is one; also False for a word that cannot be a path."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def port(causes: Causes, values: Mapping[str, Any], name: str, *, zero: bool = True) -> int:
    """A port number."""
    number = int(values[name])
    low = 0 if zero else 1
    causes.need(low <= number <= 65535, f"--{name}={number} is no port. Use {low} to 65535")
    return number


def at_least(causes: Causes, values: Mapping[str, Any], low: float, *names: str) -> None:
    """Each of the numbers has a least value."""
    for name in names:
        causes.need(
            values[name] >= low, f"--{name}={values[name]} is too small. Use at least {low:g}"
        )


def finite(
    causes: Causes, values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The values with our defaults where the original would wait for ever."""
    endless = {name: default for name, default in defaults.items() if values[name] == -1}
    for name, default in endless.items():
        causes.warn(f"--{name}=-1 would wait for ever; {default} is used")
    return {**values, **endless}


def announced(causes: Causes, values: Mapping[str, Any], host: str) -> str:
    """The address that others are told."""
    address: str = values["advertise_host"] or host
    causes.need(
        not values["etcd_addr"] or address not in ("0.0.0.0", "::"),
        f"{address} is no address to announce. Pass --advertise_host",
    )
    hosts = [found[2].strip("[]") for found in map(_ENDPOINT.fullmatch, _parts(values)) if found]
    remote = any(not is_loopback(host) for host in hosts)
    causes.need(
        not (remote and is_loopback(address)),
        f"etcd is on another machine, but {address} would be announced. Pass --advertise_host",
    )
    return address


def _parts(values: Mapping[str, Any]) -> list[str]:
    """The addresses of the registry, one by one."""
    return values["etcd_addr"].split(",") if values["etcd_addr"] else []


def http(
    causes: Causes, values: Mapping[str, Any], concurrency: int, *, idle_s: int = 75
) -> HttpSlice:
    """The HTTP slice."""
    at_least(causes, values, 0.001, "request_timeout_s", "drain_timeout_s")
    at_least(causes, values, 1, "max_queue_size", "max_body_bytes", "max_best_of")
    at_least(causes, values, 0, "max_logprobs")
    for name, most in (("max_best_of", MAX_BEST_OF), ("max_logprobs", MAX_LOGPROBS)):
        causes.need(
            values[name] <= most, f"--{name}={values[name]} is too large. Use at most {most}"
        )
    for name in ("reasoning_parser", "tool_call_parser"):
        causes.need(not values[name], f"--{name}={values[name]} is not built yet. Leave it empty")
    return HttpSlice(
        max_concurrent_requests=concurrency or 65536,
        request_timeout_s=values["request_timeout_s"],
        drain_timeout_s=values["drain_timeout_s"],
        max_queue_size=values["max_queue_size"],
        max_body_bytes=values["max_body_bytes"],
        max_best_of=values["max_best_of"],
        max_logprobs=values["max_logprobs"],
        metrics=values["metrics"],
        debug_endpoints=values["debug_endpoints"],
        idle_connection_s=float(idle_s),
        allowed_hosts=_allowed_hosts(causes, values),
        api_keys=_api_keys(causes, values),
    )


def _allowed_hosts(causes: Causes, values: Mapping[str, Any]) -> frozenset[str]:
    names = {word.strip().lower() for word in values["allowed_hosts"].split(",") if word.strip()}
    for name in sorted(names):
        causes.need(
            name == "*" or _HOST_NAME.fullmatch(name) is not None,
            f"--allowed_hosts: '{name[:80]}' is no host name. Write names without port, or *",
        )
    return frozenset(names)


def _api_keys(causes: Causes, values: Mapping[str, Any]) -> dict[str, str]:
    """id -> key from --api_key_file: one `id:key` a line, empty lines and lines with # skipped. Keys are never shown."""
    path = values["api_key_file"]
    raw = _private_file(causes, "api_key_file", path) if path else None
    if raw is None:
        return {}
    keys: dict[str, str] = {}
    for number, line in enumerate(raw.decode("latin-1").splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        match = _API_KEY.fullmatch(entry)
        if match is None or match[1] in keys:
            what = "is no id:key" if match is None else "repeats an id"
            causes.need(False, f"--api_key_file={path}: line {number} {what}. Correct it")
        else:
            keys[match[1]] = match[2]
    causes.need(
        bool(keys), f"--api_key_file={path} holds no key. Write one id:key a line, or leave it out"
    )
    return keys


def etcd(causes: Causes, values: Mapping[str, Any], ttl_s: int) -> EtcdSlice:
    """The registry slice, with user and password from the environment."""
    address = values["etcd_addr"]
    for part in _parts(values):
        match = _ENDPOINT.fullmatch(part)
        good = match is not None and 0 < int(match[3]) <= 65535
        causes.need(
            good, f"--etcd_addr: '{part}' is no host:port. Write, as an example, 127.0.0.1:2379"
        )
    if address.startswith("https://"):
        causes.need(bool(values["tls_ca_file"]), "--etcd_addr is https. Pass --tls_ca_file")
    at_least(causes, values, 0.001, "etcd_timeout_s", "etcd_start_timeout_s")
    user, password = os.environ.get("ETCD_USERNAME", ""), os.environ.get("ETCD_PASSWORD", "")
    causes.need(
        bool(user) == bool(password),
        "ETCD_USERNAME and ETCD_PASSWORD go together. Set both or neither",
    )
    return EtcdSlice(
        address=address,
        namespace=values["etcd_namespace"],
        username=user,
        password=password,
        ca_file=values["tls_ca_file"],
        timeout_s=values["etcd_timeout_s"],
        start_timeout_s=values["etcd_start_timeout_s"],
        ttl_s=ttl_s,
    )


def tls(causes: Causes, values: Mapping[str, Any]) -> TlsSlice | None:
    """Check that the three files belong together; None when TLS is off."""
    names = ("tls_cert_file", "tls_key_file", "tls_ca_file")
    given = [bool(values[name]) for name in names]
    plain_ca = given == [False, False, True] and values["etcd_addr"].startswith("https://")
    causes.need(
        all(given) or not any(given) or plain_ca,
        "the three --tls_*_file flags go together. Pass all or none",
    )
    if not all(given):
        return None
    cert, key, authority = (values[name] for name in names)
    _private_file(causes, "tls_key_file", key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ValueError) as error:
        what = "cannot be used together" if isinstance(error, ssl.SSLError) else "cannot be read"
        causes.need(
            False,
            f"--tls_cert_file={cert} and --tls_key_file={key} {what} ({_why(error)}). Pass PEM files "
            "that belong together",
        )
    try:
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        causes.need(
            False, f"--tls_ca_file={authority} cannot be used ({_why(error)}). Pass a PEM file"
        )
    return TlsSlice(cert_file=cert, key_file=key, ca_file=authority)


def _why(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)


def security(causes: Causes, values: Mapping[str, Any], host: str, *, has_peers: bool) -> bytes:
    """Check who may come in, and read the cluster key file; empty when none was given."""
    if not is_loopback(host):
        _check_open_door(causes, values, host, has_peers=has_peers)
    path = values["cluster_key_file"]
    key = _private_file(causes, "cluster_key_file", path) if path else None
    if key is None:
        return b""
    causes.need(
        len(key) >= _MIN_KEY_BYTES,
        f"--cluster_key_file={path} holds {len(key)} bytes. Use at least 32",
    )
    return key


def _check_open_door(
    causes: Causes, values: Mapping[str, Any], host: str, *, has_peers: bool
) -> None:
    """What a bind beyond loopback needs."""
    encrypted = all(values[name] for name in ("tls_cert_file", "tls_key_file", "tls_ca_file"))
    if has_peers and not encrypted:
        causes.need(
            bool(values["cluster_key_file"]),
            f"KV and control ports on {host} need to know who comes in. Pass --cluster_key_file, better the "
            "three --tls_*_file flags, or bind to 127.0.0.1",
        )
        causes.warn(
            f"KV and control on {host} are authenticated by the cluster key but NOT encrypted: who is on the "
            "wire reads prompts and can change KV. Pass the three --tls_*_file flags"
        )
    if values["api_key_file"]:
        return
    causes.need(
        not values["debug_endpoints"],
        f"--debug_endpoints on {host} need keys. Pass --api_key_file or bind to 127.0.0.1",
    )
    if values["allow_insecure_http"]:
        causes.warn(f"HTTP on {host} is open to whoever reaches it, as --allow_insecure_http says")
    else:
        causes.need(
            False,
            f"binding HTTP to {host} without keys. Pass --api_key_file or --allow_insecure_http=true, "
            "or bind to 127.0.0.1",
        )


def _private_file(causes: Causes, name: str, path: str) -> bytes | None:
    """The bytes of a file that only its owner may read; None when it cannot be read."""
    try:
        raw = Path(path).read_bytes()
        private = not Path(path).stat().st_mode & 0o077
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        causes.need(False, f"--{name}={path} cannot be read ({why}). Check the path")
        return None
    causes.need(private, f"--{name}={path} can be read by others. Run chmod 600")
    return raw


def logs(causes: Causes, values: Mapping[str, Any]) -> LogSlice:
    """The log slice; glog's numbers map onto the level."""
    level, form = values["log_level"], values["log_format"]
    causes.need(
        level in ("debug", "info", "warning", "error"),
        f"--log_level={level} is unknown. Use debug, info, warning or error",
    )
    causes.need(form in ("text", "json"), f"--log_format={form} is unknown. Use text or json")
    if level == "info":
        level = {1: "warning", 2: "error", 3: "error"}.get(values["minloglevel"], level)
        level = "debug" if values["v"] > 0 else level
    directory = values["log_dir"]
    causes.need(
        not directory or is_folder(directory),
        f"--log_dir={directory} is no folder. Make it first",
    )
    return LogSlice(level=level, form=form, directory=directory, verbose=values["verbose"])


def foreign_environment(causes: Causes) -> None:
    """Switches of the original that do nothing here."""
    found = [name for name in _FOREIGN if name in os.environ]
    if found:
        causes.warn(f"in the environment, ignored here: {', '.join(found)}")


def failpoints_of(causes: Causes, values: Mapping[str, Any], cluster_key: bytes) -> str:
    """What XLLM_FAILPOINTS says, when --enable_failpoints lets it."""
    plan = os.environ.get("XLLM_FAILPOINTS", "")
    if not values["enable_failpoints"]:
        if plan:
            causes.warn("in the environment, ignored without --enable_failpoints: XLLM_FAILPOINTS")
        return ""
    try:
        failpoints.check(plan, cluster_key)
    except UsageError as error:
        causes.need(False, error.message)
    return plan


def environment_bool(causes: Causes, name: str, default: bool) -> bool:
    """A switch in the environment, in gflags' bool words."""
    word = os.environ.get(name)
    if word is None:
        return default
    causes.need(word.lower() in TRUE | FALSE, f"{name}={word} is no bool. Use true or false")
    return word.lower() in TRUE
