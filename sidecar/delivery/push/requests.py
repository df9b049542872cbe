"""Deliveries as HTTP requests: CloudEvents in binary, structured or batched mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sidecar
from sidecar.delivery.push.client import header_lines
from sidecar.wire.attributes import header_text
from sidecar.wire.cloudevents import BATCH_TYPE, JSON_TYPE, to_http, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.config import Subscription as Settings
    from sidecar.delivery.consumers import Delivery

OURS = frozenset({"sidecar-subscription", "sidecar-topic", "sidecar-attempt"})
_TRACE = frozenset({"traceparent", "tracestate", "baggage"})


def _goes_along(name: str) -> bool:
    """
    Of an event's own headers, the trace context and what a sidecar added, as to dead letters.

    Others are chosen by whoever published it, and an app may trust what is in a request's headers.
    """
    return name in _TRACE or (name.startswith("sidecar-") and name not in OURS)


class Requests:
    """Makes the requests of one subscription: the lines that repeat are made once."""

    def __init__(self, settings: Settings) -> None:
        push = settings.push
        assert push is not None
        self._structured = push.content_mode == "structured"
        self._batches = push.max_batch_events > 1
        fixed = {
            "user-agent": f"sidecar/{sidecar.__version__}",
            "sidecar-subscription": settings.name,
            **{name.lower(): value for name, value in push.headers.items()},
        }
        self._fixed = header_lines(list(fixed.items()))

    def of(self, deliveries: Sequence[Delivery]) -> tuple[bytes, bytes]:
        """Header lines and body of one request with all of them."""
        if self._batches:
            body = b"[%s]" % b",".join([to_json(delivery.event) for delivery in deliveries])
            return self._fixed + b"content-type: %s; charset=utf-8\r\n" % BATCH_TYPE.encode(), body
        (delivery,) = deliveries
        event = delivery.event
        if self._structured:
            body = to_json(event)
            headers = [("content-type", f"{JSON_TYPE}; charset=utf-8")]
        else:
            headers, body = to_http(event)
        if event.headers:
            headers = [one for one in headers if one[0] not in event.headers]
            headers += [
                (name, header_text(value, ascii_only=True))
                for name, value in event.headers.items()
                if _goes_along(name)
            ]
        headers.append(("sidecar-topic", delivery.topic))
        headers.append(("sidecar-attempt", str(delivery.attempt)))
        return self._fixed + header_lines(headers), body
