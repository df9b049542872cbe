"""Log lines: one JSON object each, or for people on a terminal. No event data, no secrets."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Literal


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the error's text."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(level: str, style: Literal["auto", "json", "text"]) -> None:
    """Send the process's log to standard error. *auto*: text on a terminal, JSON elsewhere."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json" or (style == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries speak up only when something is wrong.
    for library in ("uvicorn", "asyncio", "grpc", "nats"):
        logging.getLogger(library).setLevel(logging.WARNING)
