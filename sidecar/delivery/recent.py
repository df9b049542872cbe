"""A bounded memory of what happened lately, at constant cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

T = TypeVar("T")


class Recent(Generic[T]):
    """
    Remembers the newest *limit* keys at least, and less than twice as many.

    Two generations: a full one becomes the old one, and the old one is forgotten at once. Deleting
    the oldest key of one dict instead costs a walk over all that was deleted before it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._new: dict[Hashable, T] = {}
        self._old: dict[Hashable, T] = {}

    def __len__(self) -> int:
        return len(self._new.keys() | self._old.keys())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._new or key in self._old

    def get(self, key: Hashable, default: T) -> T:
        value = self._new.get(key)
        return self._old.get(key, default) if value is None else value

    def put(self, key: Hashable, value: T) -> None:
        self._new[key] = value
        if len(self._new) >= self._limit:
            self._new, self._old = {}, self._new

    def clear(self) -> None:
        self._new.clear()
        self._old.clear()
