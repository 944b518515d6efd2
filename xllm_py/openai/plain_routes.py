"""The routes that do not generate: models, health, readiness, metrics, version, tokenize, and the list of 501s."""

from __future__ import annotations

import platform
from collections.abc import Callable

from xllm_py import __version__
from xllm_py.base.errors import InvalidValue, ModelNotFound, RouteNotImplemented
from xllm_py.base.metrics import CONTENT_TYPE, Metrics
from xllm_py.openai.backend import Backend, ServedModel
from xllm_py.openai.exchange import Handler, Plain, Request
from xllm_py.openai.intake import Intake
from xllm_py.openai.key_check import KeyRing
from xllm_py.openai.schema import DetokenizeBody, TokenizeBody
from xllm_py.openai.settings import HttpSettings
from xllm_py.openai.tokenizer import Tokenizer

# readiness reasons that mean this process itself is broken, not only waiting for others
_SICK = frozenset({"engine_stalled", "engine_down"})
_MAX_DETOKENIZE = 65_536
_ON_LOOP_TOKENS = 1000

_NOT_BUILT = (
    *("/v1/embeddings", "/v1/rerank", "/v1/sample", "/v1/messages", "/v1/messages/count_tokens"),
    *(f"/v1/{kind}/generation" for kind in ("image", "audio", "text", "video")),
    *("/v2/repository/index", "/sleep", "/wakeup", "/pause", "/resume", "/fork_master"),
    *("/start_profile", "/stop_profile", "/link_p2p", "/unlink_p2p"),
)


class PlainRoutes:
    """Their handlers; `table` is what App adds to its routes."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        intake: Intake,
        *,
        settings: HttpSettings,
        metrics: Metrics,
        draining: Callable[[], bool],
        keys: KeyRing,
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._intake = intake
        self._settings = settings
        self._metrics = metrics
        self._draining = draining
        self._keys = keys

    def table(self) -> dict[tuple[str, str], Handler]:
        """(method, pattern) -> handler."""
        routes: dict[tuple[str, str], Handler] = {
            ("GET", "/v1/models"): self.models,
            ("GET", "/v1/models/*"): self.model,
            ("GET", "/health"): self.health,
            ("GET", "/health/live"): self.health,
            ("GET", "/ready"): self.ready,
            ("GET", "/health/ready"): self.ready,
            ("GET", "/version"): self.version,
            ("POST", "/tokenize"): self.tokenize,
            ("POST", "/detokenize"): self.detokenize,
        }
        if self._settings.serve_metrics:
            routes[("GET", "/metrics")] = self.metrics
        for path in _NOT_BUILT:
            routes[("GET", path)] = routes[("POST", path)] = _not_built
        return routes

    async def models(self, request: Request) -> tuple[int, object]:
        """All routable models."""
        rows = [_model_row(model) for model in self._backend.models()]
        return 200, {"object": "list", "data": rows}

    async def model(self, request: Request) -> tuple[int, object]:
        """One model; its name may hold slashes."""
        for model in self._backend.models():
            if model.name == request.params["*"]:
                return 200, _model_row(model)
        raise ModelNotFound("no such model is served; see /v1/models", param="model")

    async def health(self, request: Request) -> tuple[int, object]:
        """Whether this process works; says nothing about others."""
        if _SICK.intersection(self._backend.ready().reasons):
            return 503, {"status": "unhealthy"}
        return 200, {"status": "healthy"}

    async def ready(self, request: Request) -> tuple[int, object]:
        """Whether a request would be served now, and if not, why."""
        state = self._backend.ready()
        if state.ready and not self._draining():
            return 200, {"status": "ready", **({"mode": state.mode} if state.mode else {})}
        answer: dict[str, object] = {"status": "not_ready"}
        if self._keys.holder(request.headers.get("authorization")) is not None:
            draining = self._draining()
            answer["reasons"] = ["draining"] if draining else list(state.reasons)
            answer["details"] = [] if draining else list(state.details)
        return 503, answer

    async def version(self, request: Request) -> tuple[int, object]:
        """Name, version and what the daemon knows of its libraries and device."""
        known = {"name": "xllm_py", "version": __version__, "python": platform.python_version()}
        return 200, {**known, **self._settings.version}

    async def metrics(self, request: Request) -> tuple[int, object]:
        """Prometheus text."""
        return 200, Plain(body=self._metrics.text(), content_type=CONTENT_TYPE)

    async def tokenize(self, request: Request) -> tuple[int, object]:
        """Text to ids."""
        body = await self._intake.read(request.body, TokenizeBody)
        model = self._named(body.model)
        special = body.add_special_tokens is not False
        (ids,) = await self._intake.encode([body.prompt], special=special, param="prompt")
        return 200, {"tokens": ids, "count": len(ids), "max_model_len": model.max_model_len}

    async def detokenize(self, request: Request) -> tuple[int, object]:
        """Ids to text."""
        body = await self._intake.read(request.body, DetokenizeBody)
        model = self._named(body.model)
        tokens = body.tokens
        if len(tokens) > _MAX_DETOKENIZE:
            raise InvalidValue(f"more than {_MAX_DETOKENIZE} tokens", param="tokens")
        if tokens and (min(tokens) < 0 or max(tokens) >= model.vocab_size):
            raise InvalidValue("tokens holds an id outside the vocabulary", param="tokens")
        skip = body.skip_special_tokens is True
        decode = self._tokenizer.decode
        text = await self._intake.do(
            len(tokens) > _ON_LOOP_TOKENS, lambda: decode(tokens, skip_special_tokens=skip)
        )
        return 200, {"prompt": text}

    def _named(self, name: str | None) -> ServedModel:
        models = self._backend.models()
        return self._intake.find_model(models[0].name if name is None and models else name or "")


def _model_row(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "xllm",
        "max_model_len": model.max_model_len,
    }


async def _not_built(request: Request) -> tuple[int, object]:
    raise RouteNotImplemented("this route is known but not built")
