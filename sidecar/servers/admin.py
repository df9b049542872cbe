"""The admin port's app: alive, ready, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.exposition import choose_encoder

from sidecar.servers.asgi import Headers, Receive, Response, Scope, Send, respond

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prometheus_client import CollectorRegistry

_TEXT = b"text/plain; charset=utf-8"


class AdminApp:
    """The ASGI app of the admin port."""

    def __init__(self, not_ready: Callable[[], Sequence[str]], registry: CollectorRegistry) -> None:
        """*not_ready* gives one line per reason; none means ready."""
        self._not_ready = not_ready
        self._registry = registry
        self._pages = {"/healthz": self._health, "/readyz": self._ready, "/metrics": self._metrics}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = self._pages.get(scope["path"])
        if page is None:
            response = _text(404, "here are: " + " ".join(self._pages))
        elif scope["method"] not in {"GET", "HEAD"}:
            response = _text(405, "use GET")
            response[1].append((b"allow", b"GET, HEAD"))
        else:
            response = page(scope["headers"])
        await respond(send, response)

    def _health(self, headers: Headers) -> Response:
        return _text(200, "ok")  # whoever gets it knows that the loop turns

    def _ready(self, headers: Headers) -> Response:
        reasons = self._not_ready()
        return _text(503, "\n".join(reasons)) if reasons else _text(200, "ready")

    def _metrics(self, headers: Headers) -> Response:
        accepted = b",".join(value for name, value in headers if name == b"accept")
        encode, content_type = choose_encoder(accepted.decode("latin-1"))
        return 200, [(b"content-type", content_type.encode())], encode(self._registry)


def _text(status: int, text: str) -> Response:
    return status, [(b"content-type", _TEXT)], f"{text}\n".encode()
