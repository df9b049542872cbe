"""Events that are to be another sidecar's, while the app still has them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sidecar.delivery.held import State

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from sidecar.delivery.held import Held
    from sidecar.delivery.window import Window

PARTING_SECONDS = 3.0
"""So long a partition that is to be another sidecar's waits for the app to settle what it has."""
WITH_THE_APP = frozenset({State.OUT, State.LEAVING})


class Parting:
    """What the app has of one lot that is to leave."""

    def __init__(self, staying: Sequence[Held], done: asyncio.Future[None]) -> None:
        self.staying = staying
        self.done = done

    def over(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Partings:
    """All lots of one subscription that are about to leave."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._lots: list[Parting] = []

    def __bool__(self) -> bool:
        return bool(self._lots)

    def begin(self, identities: Sequence[Hashable]) -> asyncio.Future[None] | None:
        """Another sidecar is to have these: the app may settle what it has of them, for a moment."""
        staying = self._window.revoke(identities, but=WITH_THE_APP)
        if not staying:
            return None
        loop = asyncio.get_running_loop()
        parting = Parting(staying, loop.create_future())
        self._lots.append(parting)
        loop.call_later(PARTING_SECONDS, parting.over)
        return parting.done

    def look(self) -> None:
        """What the app settled of what is leaving is not tried again here."""
        window = self._window
        for parting in self._lots:
            settled = [held for held in parting.staying if held.state not in WITH_THE_APP]
            window.revoke([held.incoming.identity for held in settled])
            parting.staying = [
                held
                for held in parting.staying
                if held.state in WITH_THE_APP and window.holds(held)
            ]
            if not parting.staying:
                parting.over()
        self._lots = [parting for parting in self._lots if not parting.done.done()]
