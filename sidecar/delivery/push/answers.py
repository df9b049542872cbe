"""What the app's answer to a push means for the events in it. Decides; does no I/O."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import NamedTuple

from sidecar.event import Verdict

MAX_RETRY_AFTER_SECONDS = 3600.0
"""Longer is taken for this: whoever wants more stops the subscription."""
MAX_TEXT = 200
_AGAIN = frozenset({408, 425, 429})
_PUSHED_BACK = frozenset({429, 503})
_DOWN = frozenset({502, 503, 504})


class Answer(NamedTuple):
    """An HTTP response, as far as it matters."""

    status: int
    retry_after: str = ""
    content_type: str = ""
    text: bytes = b""
    """The beginning of the body."""


class Meaning(NamedTuple):
    """What is done about the events, and what it says of the app."""

    verdict: Verdict
    delay: float | None
    """Seconds to the next try, where the app said so."""
    reason: str
    """For the dead letter and the retry rules: the status, and what the app said behind a colon."""
    pushed_back: bool
    """The app has too much to do."""
    works: bool
    """The app, or what is before it, is not just broken."""


def meaning(answer: Answer, now: float) -> Meaning:
    """*now* in seconds since 1970, for a Retry-After that is a date."""
    status = answer.status
    if 200 <= status < 300:  # noqa: PLR2004
        return Meaning(Verdict.ACK, None, "", pushed_back=False, works=True)
    reason = f"{status}: {_text(answer)}"
    delay = None
    if status in _AGAIN or status >= 500:  # noqa: PLR2004
        verdict = Verdict.NACK
        delay = retry_after(answer.retry_after, now)
    else:
        verdict = Verdict.REJECT
    works = status not in _DOWN or delay is not None
    return Meaning(verdict, delay, reason, pushed_back=status in _PUSHED_BACK, works=works)


def retry_after(value: str, now: float) -> float | None:
    """Seconds, from seconds or a date (RFC 9110, 10.2.3); None for what is neither."""
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_SECONDS)
    if not text:
        return None
    try:
        seconds = parsedate_to_datetime(text).timestamp() - now
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)


def _text(answer: Answer) -> str:
    """The first line of what the app said, if it is text."""
    if 300 <= answer.status < 400:  # noqa: PLR2004
        return "a redirect, which push does not follow: set push.url to where it leads"
    if not answer.content_type.startswith(
        ("text/plain", "application/json", "application/problem")
    ):
        return "the app's answer"
    lines = answer.text[:MAX_TEXT].decode("utf-8", "replace").strip().splitlines()
    return lines[0] if lines else "the app's answer"
