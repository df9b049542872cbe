"""What the tests of the command line share."""

import uuid

import pytest


@pytest.fixture
def topic() -> str:
    """A topic of its own, with a first token of its own: it gets a stream of its own."""
    return f"cli{uuid.uuid4().hex[:12]}.made"
