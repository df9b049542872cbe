"""A token endpoint for OAUTHBEARER by client credentials (RFC 6749, section 4.4)."""

from __future__ import annotations

import base64
import datetime
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class TokenEndpoint:
    """
    Hands out unsigned tokens (JWS, `alg: none`), good for an hour, over plain HTTP on loopback.

    A broker takes them with Kafka's own validator of unsecured tokens. Other credentials than
    *client* and *secret* get 401.
    """

    def __init__(self, client: str, secret: str) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(client, secret))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/token"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(client: str, secret: str) -> type[BaseHTTPRequestHandler]:
    wanted = "Basic " + base64.b64encode(f"{client}:{secret}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") == wanted:
                answer = {"access_token": _token(client), "token_type": "bearer"}
                self._answer(200, {**answer, "expires_in": 3600})
            else:
                self._answer(401, {"error": "invalid_client"})

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's
            pass

        def _answer(self, status: int, body: Mapping[str, object]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


def _token(subject: str) -> str:
    now = int(datetime.datetime.now(datetime.UTC).timestamp())
    header, claims = {"alg": "none"}, {"sub": subject, "iat": now, "exp": now + 3600}
    return f"{_part(header)}.{_part(claims)}."


def _part(content: Mapping[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
