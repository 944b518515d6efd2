"""Which handler answers (method, path). Patterns: literal segments, `{name}` for one segment, a trailing `*` for the rest.

Built once by App from its own routes and the daemon's extra ones; matching looks at the raw path, so that an escaped
slash stays inside its segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar
from urllib.parse import unquote

from xllm_py.base.errors import MethodNotAllowed, UnknownRoute

H = TypeVar("H")


class RouteTable(Generic[H]):
    """Exact paths in a dict, patterns in a short list."""

    def __init__(self, routes: Mapping[tuple[str, str], H]) -> None:
        self._exact: dict[str, dict[str, H]] = {}
        self._patterns: list[tuple[tuple[str, ...], dict[str, H]]] = []
        for (method, path), handler in routes.items():
            self._methods_of(path)[method] = handler

    def _methods_of(self, path: str) -> dict[str, H]:
        if "{" not in path and not path.endswith("*"):
            return self._exact.setdefault(path, {})
        segments = tuple(path.split("/"))
        for known, methods in self._patterns:
            if known == segments:
                return methods
        self._patterns.append((segments, {}))
        return self._patterns[-1][1]

    def find(self, method: str, raw_path: str) -> tuple[H, dict[str, str]]:
        """Handler and path parameters (`*` under the key "*"); raises UnknownRoute or MethodNotAllowed. HEAD counts as GET."""
        params: dict[str, str] = {}
        methods = self._exact.get(raw_path)
        if methods is None:
            methods, params = self._match(raw_path)
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            raise MethodNotAllowed("this route does not take that method; see the Allow header")
        return handler, params

    def allowed(self, raw_path: str) -> str:
        """The Allow header of a path that exists."""
        methods = self._exact.get(raw_path) or self._match(raw_path)[0]
        return ", ".join(sorted(methods))

    def _match(self, raw_path: str) -> tuple[dict[str, H], dict[str, str]]:
        parts = raw_path.split("/")
        for segments, methods in self._patterns:
            params = _fit(segments, parts)
            if params is not None:
                return methods, params
        raise UnknownRoute("there is no such route; see /v1/models, /v1/completions, /health")


def _fit(segments: tuple[str, ...], parts: list[str]) -> dict[str, str] | None:
    params: dict[str, str] = {}
    if segments[-1] == "*":
        if len(parts) < len(segments):
            return None
        params["*"] = unquote("/".join(parts[len(segments) - 1 :]))
        segments, parts = segments[:-1], parts[: len(segments) - 1]
    if len(segments) != len(parts):
        return None
    for segment, part in zip(segments, parts, strict=True):
        if segment.startswith("{"):
            params[segment[1:-1]] = unquote(part)
        elif segment != part:
            return None
    return None if "" in params.values() else params
