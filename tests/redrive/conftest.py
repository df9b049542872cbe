"""The same loops as delivery's."""

from tests.delivery.conftest import anyio_backend

__all__ = ["anyio_backend"]
