"""Delivers one subscription to the app by HTTP POST: a thin shell around what decides."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import TYPE_CHECKING

from sidecar.config import push_address
from sidecar.delivery.push.answers import Meaning, meaning
from sidecar.delivery.push.circuit import Circuit, State
from sidecar.delivery.push.client import Broken, Client, NoAnswer, Unreachable
from sidecar.delivery.push.concurrency import Concurrency
from sidecar.delivery.push.requests import Requests
from sidecar.errors import Draining
from sidecar.event import Settlement, Verdict
from sidecar.telemetry.facts import Facts, Pushed
from sidecar.wire.timestamps import now_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.delivery.consumers import Delivery
    from sidecar.delivery.subscription import Subscription

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
MARGIN = 0.9
"""Of the lease: so long the app has to answer, unless the configuration says how long."""


class Pusher:
    """
    The consumer of a subscription that has push: each batch it is handed is one request.

    Its credit is what its concurrency leaves. While the circuit is open it is no consumer, so that
    what is here goes back to the broker, for the replicas whose app is up. Requests under way go on.
    """

    def __init__(self, subscription: Subscription, *, facts: Facts) -> None:
        settings = subscription.settings
        push = settings.push
        assert push is not None
        self._subscription = subscription
        self._facts = facts
        self._requests = Requests(settings)
        self._timeout = push.timeout_seconds or MARGIN * settings.lease_seconds
        self._extends = self._timeout > MARGIN * settings.lease_seconds
        self.url = push.url
        self._client = Client(
            *push_address(push.url), connect_seconds=min(CONNECT_SECONDS, self._timeout)
        )
        self._concurrency = Concurrency(push.max_concurrency)
        self.circuit = Circuit(random.Random())
        self.requests = 0
        """Under way."""
        self.credit = 0
        self.max_batch = push.max_batch_events
        self._attached = False
        self._closed = False
        self._changed = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def concurrency(self) -> int:
        """How many requests may be under way now."""
        return self._concurrency.limit if self.circuit.state is State.CLOSED else 1

    # -- life

    async def run(self) -> None:
        """Push until the subscription ends; then what is under way is cut off."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while not self._closed:
                    if self.circuit.state is State.OPEN:
                        self._leave()
                        await self._probe()
                        continue
                    self._join()
                    self._changed.clear()
                    await self._changed.wait()
                self._client.close()
        finally:
            self._leave()
            self._client.close()

    def _join(self) -> None:
        if not self._attached:
            self._recredit()
            try:
                self._subscription.attach(self)
            except Draining:
                self.closed(Draining("the sidecar is stopping"))
                return
            self._attached = True

    def _leave(self) -> None:
        """Take nothing more; what is under way stays out until it is settled."""
        self.credit = 0
        if self._attached:
            self._attached = False
            self._subscription.stopped_waiting(self)

    async def _probe(self) -> None:
        """Try now and then whether the app is back."""
        name = self._subscription.settings.name
        log.warning("subscription %s: push waits: %s", name, self.circuit.detail)
        while self.circuit.state is State.OPEN and not self._closed:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self.circuit.probe_at):
                    await self._changed.wait()
                continue
            self.circuit.probed(await self._client.probe(), self._now())
        if not self._closed:
            log.info("subscription %s: the app can be reached again", name)
        self._concurrency.restart()

    # -- what the subscription calls

    @property
    def takes_more(self) -> bool:
        return True

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        assert self._tasks is not None  # attached only while it runs
        self.requests += 1
        self._recredit()
        self._tasks.create_task(self._push(deliveries))

    def closed(self, why: Exception) -> None:
        if isinstance(why, Draining):
            self._closed = True
            self._changed.set()

    # -- one request

    async def _push(self, deliveries: Sequence[Delivery]) -> None:
        begun = self._now()
        tokens = [delivery.token for delivery in deliveries]
        if self._extends:
            self._settle(tokens, Verdict.EXTEND, delay=self._timeout + 1)
        outcome = "broken"
        try:
            head, body = self._requests.of(deliveries)
            answer = await self._client.post(head, body, seconds=self._timeout)
        except NoAnswer:
            outcome = "timeout"
            self._timed_out(tokens, begun)
        except Unreachable as error:
            outcome = "unreachable"
            self.circuit.unreachable(f"{self.url}: {error}", self._now())
            self._subscription.hand_back(tokens)
        except Broken as error:
            self.circuit.unreachable(f"{self.url}: {error}", self._now())
            self._subscription.crashed(tokens, f"the app was gone: {error}")
        else:
            outcome = self._answered(tokens, meaning(answer, now_ns() / 1e9), begun)
        finally:
            self.requests -= 1
            seconds = self._now() - begun
            self._facts.pushed(Pushed(self._subscription.settings.name, outcome, seconds))
            self._recredit()

    def _timed_out(self, tokens: Sequence[str], begun: float) -> None:
        why = f"timeout: no answer within {self._timeout:g} s"
        trial = self.circuit.state is State.HALF_OPEN
        self._concurrency.pushed_back(begun, self._now())
        self.circuit.answered(works=False, now=self._now(), why=f"{self.url}: {why}")
        self._settle(tokens, Verdict.NACK, reason=why, uncounted=trial)

    def _answered(self, tokens: Sequence[str], said: Meaning, begun: float) -> str:
        now = self._now()
        # What only told that the app is still down is no attempt, or a long outage behind a proxy,
        # which answers 503 for it, would make dead letters.
        uncounted = self.circuit.state is State.HALF_OPEN and not said.works
        if said.pushed_back:
            self._concurrency.pushed_back(begun, now)
        elif said.works:
            self._concurrency.succeeded(now - begun, under_way=self.requests)
        self.circuit.answered(works=said.works, now=now, why=f"{self.url}: {said.reason}")
        self._settle(
            tokens, said.verdict, delay=said.delay, reason=said.reason, uncounted=uncounted
        )
        return said.verdict.name.lower()

    def _settle(
        self,
        tokens: Sequence[str],
        verdict: Verdict,
        *,
        delay: float | None = None,
        reason: str = "",
        uncounted: bool = False,
    ) -> None:
        """What does not count any more (the lease ended, the subscription moved) comes again."""
        self._subscription.settle(
            [Settlement(token, verdict, delay, reason, uncounted) for token in tokens]
        )

    def _recredit(self) -> None:
        if self.circuit.state is State.OPEN or self._closed:
            self.credit = 0
            self._changed.set()
            return
        batch = 1 if self.circuit.state is State.HALF_OPEN else self.max_batch
        more = max(0, self.concurrency - self.requests) * batch - self.credit
        if more > 0 and self._attached:
            self._subscription.credit(self, more)
        else:
            self.credit += more

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
