"""The composition root: builds everything from a Config, starts it in order, and drains it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from contextlib import AsyncExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar import config as settings
from sidecar.broker import Broker, BrokerState
from sidecar.brokers.memory import MemoryBroker
from sidecar.brokers.nats.core import NatsBroker
from sidecar.brokers.nats.jetstream import JetStreamBroker
from sidecar.delivery.hub import Hub
from sidecar.delivery.push.circuit import State as CircuitState
from sidecar.delivery.redrive.desk import Desk
from sidecar.embedded import EmbeddedServer
from sidecar.errors import ConfigInvalid, SidecarError
from sidecar.event import pattern_matcher
from sidecar.publishing.publisher import Publisher
from sidecar.publishing.routes import Routes
from sidecar.servers import sockets
from sidecar.servers.admin import AdminApp
from sidecar.servers.asgi import Door
from sidecar.servers.grpc import GrpcDoor
from sidecar.servers.http import HttpApp
from sidecar.servers.sse import EventStreams
from sidecar.services.admin import Admin, Link
from sidecar.services.dead_letters import DeadLetters
from sidecar.services.pubsub import PubSub
from sidecar.telemetry import logs
from sidecar.telemetry.metrics import BrokerGauges, Metrics, SubscriptionGauges
from sidecar.wire.cloudevents import Defaults
from sidecar.wire.timestamps import now_ns

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sidecar.config import Config
    from sidecar.delivery.push.pusher import Pusher

log = logging.getLogger(__name__)

CONNECT_PAUSE_SECONDS = (0.1, 2.0)
HEADERS_BYTES = 64 * 1024
"""Room for an event's headers in a message of the embedded server."""
GRACE_SECONDS = 0.5
"""What calls still under way get at the very end, after the drain."""
EXIT_OK = 0


def serve(config: Config, *, announce: Callable[[str], None]) -> int:
    """
    Run the sidecar until a signal ends it; returns the exit status.

    *announce* is told, in a few lines, where the sockets are and what to try first. Raises
    ConfigInvalid, AddressUnavailable or EmbeddedServerFailed when it cannot start.
    """
    logs.set_up(config.log.level, config.log.format)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(build(config).run(announce))
    except* SidecarError as group:
        # Task groups wrap what goes wrong while they start; the caller wants the error itself.
        raise _first(group) from None


def _first(group: BaseExceptionGroup[SidecarError]) -> SidecarError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def build(config: Config) -> App:
    """Everything put together, nothing bound, nothing connected."""
    return App(config)


class App:
    """One sidecar: its parts, its start and its end."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._stop = asyncio.Event()
        self._signals = 0
        self._draining = False
        self._embedded: EmbeddedServer | None = None
        self.metrics = Metrics()

    # -- life

    async def run(self, announce: Callable[[str], None]) -> int:
        """Start, serve until stopped, drain; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        async with AsyncExitStack() as stack:
            # First, because a child that is started while gRPC's threads run is trouble.
            embedded = await self._start_embedded(stack)
            self._compose(embedded)
            await self._serve(announce)
        return EXIT_OK

    async def _serve(self, announce: Callable[[str], None]) -> None:
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as doors:
            await self._open_doors(tasks, doors)
            for line in self._welcome():
                announce(line)
            # All that imports made stays for good: the collector need not look at it again.
            gc.collect()
            gc.freeze()
            background = [
                tasks.create_task(self._keep_connected(broker), name=f"broker {name}")
                for name, broker in self.brokers.items()
            ]
            background.append(tasks.create_task(self._tell_health()))
            if self._embedded is not None:
                background.append(tasks.create_task(self._embedded.supervise()))
            background.append(tasks.create_task(self.hub.run()))
            background.append(tasks.create_task(self.desk.serve()))
            await self._stop.wait()
            await self._drain()
            for task in background:
                task.cancel()

    def stop(self) -> None:
        """Begin the drain, as SIGTERM does."""
        self._stop.set()

    def _signalled(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            log.warning("second signal: ending at once")
            os._exit(128 + number)  # the embedded server notices and goes too
        log.info("signal %s: draining", signal.Signals(number).name)
        self._stop.set()

    async def _start_embedded(self, stack: AsyncExitStack) -> tuple[str, str] | None:
        if not self.config.needs_embedded_server:
            return None
        server = EmbeddedServer(
            self.config.embedded,
            max_payload_bytes=self.config.limits.max_event_bytes + HEADERS_BYTES,
            on_log=_log_of_child,
        )
        await server.start()
        stack.push_async_callback(server.stop)
        self._embedded = server
        return server.url, server.token

    def _compose(self, embedded: tuple[str, str] | None) -> None:
        config = self.config
        self.brokers = make_brokers(config, embedded)
        started = now_ns()
        self._links = {
            name: Link(BrokerState(connected=False, detail="not connected yet"), started)
            for name in self.brokers
        }
        for name, broker in self.brokers.items():
            broker.on_state = lambda state, name=name: self._link_changed(name, state)  # type: ignore[misc]
        self.publisher = Publisher(
            Routes(config.routes),
            self.brokers,
            settings=config.publishing,
            limits=config.limits,
            facts=self.metrics,
        )
        self.hub = Hub(self.brokers, self.publisher, facts=self.metrics)
        for i, declared in enumerate(config.subscriptions):
            try:
                self.hub.declare(declared)
            except SidecarError as error:
                raise ConfigInvalid([f"subscriptions[{i}]: {error.message}"]) from error
        defaults = defaults_by_topic(config)
        pubsub = PubSub(self.publisher, self.hub, defaults_for=defaults, limits=config.limits)
        admin = Admin(
            app=config.app.name,
            started_ns=started,
            brokers=self.brokers,
            links=self._links,
            publisher=self.publisher,
            hub=self.hub,
            not_ready=self.not_ready,
        )
        self.desk = Desk(self.brokers, self.publisher, self.hub)
        dead_letters = DeadLetters(self.desk)
        methods = (*pubsub.methods(), *admin.methods(), *dead_letters.methods())
        self._grpc = GrpcDoor(methods, pubsub, config.limits, streams=dead_letters.streams())
        streams = EventStreams(self.hub, max_streams=config.limits.max_streams)
        self._http = HttpApp(
            methods, pubsub.publish_events, defaults, config.limits, streams=streams
        )
        self.metrics.declared(
            (s.name for s in config.subscriptions), _topics(config), _event_types(config)
        )
        self.metrics.look_at(self._broker_gauges, self._subscription_gauges)

    async def _open_doors(self, tasks: asyncio.TaskGroup, doors: AsyncExitStack) -> None:
        config = self.config
        if config.grpc.unix_socket:
            path = Path(config.grpc.unix_socket)
            sockets.check_unix_path(path, "grpc.unix_socket")
            self._grpc.listen(f"unix:{path}", "grpc.unix_socket")
            sockets.set_mode(path)
            doors.callback(sockets.remove, path)
        if config.grpc.address:
            self._grpc.listen(config.grpc.address, "grpc.address")
        await self._grpc.start()
        doors.push_async_callback(self._grpc.stop, GRACE_SECONDS)
        http = []
        if config.http.unix_socket:
            http.append(sockets.unix_socket(Path(config.http.unix_socket), "http.unix_socket"))
        if config.http.address:
            http.append(_tcp(config.http.address, "http.address"))
        await self._open_http(tasks, doors, self._http, http)
        if config.admin.address:
            admin = AdminApp(self.not_ready, self.metrics.registry)
            listening = [_tcp(config.admin.address, "admin.address")]
            await self._open_http(tasks, doors, admin, listening)

    async def _open_http(
        self,
        tasks: asyncio.TaskGroup,
        doors: AsyncExitStack,
        app: HttpApp | AdminApp,
        listening: Sequence[socket.socket],
    ) -> None:
        if listening:
            limits = self.config.limits
            door = Door(
                app,
                listening,
                tasks=tasks,
                # Open event streams may not keep out the calls that settle their deliveries.
                max_connections=2 * limits.max_streams,
                receive_seconds=limits.open_timeout_seconds,
            )
            await door.start()
            doors.push_async_callback(door.stop, GRACE_SECONDS)

    # -- brokers

    async def _keep_connected(self, broker: Broker) -> None:
        """Connect until it works; the driver reconnects by itself, until it gives up for good."""
        pause = CONNECT_PAUSE_SECONDS[0]
        while True:
            try:
                await broker.connect()
            except SidecarError as error:
                self._cannot_connect(broker.name, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, CONNECT_PAUSE_SECONDS[1])
                continue
            pause = CONNECT_PAUSE_SECONDS[0]
            await broker.ended()

    def _cannot_connect(self, name: str, error: SidecarError) -> None:
        link = self._links[name]
        if link.state.detail != error.message:
            log.warning("broker %s: %s; trying on", name, error.message)
            link.state = BrokerState(connected=False, detail=error.message)

    def _link_changed(self, name: str, state: BrokerState) -> None:
        link = self._links[name]
        if state.connected:
            link.connects += 1
            if link.connects > 1:
                self.metrics.reconnected(name)
            log.info("broker %s: connected to %s", name, state.detail)
        elif link.state.connected and not self._draining:
            log.warning("broker %s: connection lost: %s", name, state.detail)
        link.state, link.since_ns = state, now_ns()

    # -- readiness

    def not_ready(self) -> Sequence[str]:
        """Why apps should not send traffic here; empty when ready."""
        if self._draining:
            return ["draining"]
        reasons = [
            f"broker {name}: {link.state.detail}"
            for name, link in self._links.items()
            if not link.state.connected
        ]
        reasons += [
            f"subscription {s.settings.name}: {s.detail}"
            for s in self.hub.all()
            if s.declared and s.detail
        ]
        return reasons

    async def _tell_health(self) -> None:
        """Keep the gRPC health service in step with not_ready."""
        told: bool | None = None
        while True:
            ready = not self.not_ready()
            if ready is not told:
                told = ready
                await self._grpc.set_ready(ready=ready)
                log.info("ready" if ready else "not ready")
            await asyncio.sleep(0.05)

    # -- drain

    async def _drain(self) -> None:
        """Not ready → nothing new → apps settle → publishes flushed → rest released → brokers closed."""
        deadline = asyncio.get_running_loop().time() + self.config.drain.timeout_seconds
        self._draining = self.publisher.draining = True
        await self._grpc.set_ready(ready=False)

        def remaining(reserve: float) -> float:
            return max(0.0, deadline - asyncio.get_running_loop().time() - reserve)

        self.desk.stop()
        left = await self.hub.drain(remaining(2))
        await self.desk.drain(remaining(1))
        unanswered = 0
        try:
            async with asyncio.timeout(remaining(1)):
                await self.publisher.flushed()
        except TimeoutError:
            unanswered = self.publisher.under_way
        for broker in self.brokers.values():
            await broker.close()
        log.info(
            "drained: %d deliveries were unsettled and go back, %d publishes were unanswered",
            left,
            unanswered,
        )

    # -- looks from outside

    def _broker_gauges(self) -> Sequence[BrokerGauges]:
        return [
            BrokerGauges(
                name,
                link.state.connected,
                self.publisher.pending(name).events,
                self.publisher.pending(name).bytes,
            )
            for name, link in self._links.items()
        ]

    def _subscription_gauges(self) -> Sequence[SubscriptionGauges]:
        return [
            SubscriptionGauges(
                s.settings.name,
                s.window.out,
                s.window.retrying,
                s.window.lanes,
                s.window.bytes,
                s.dropped,
                *_push_gauges(self.hub.pusher(s.settings.name)),
            )
            for s in self.hub.all()
        ]

    def _welcome(self) -> list[str]:
        config = self.config
        lines = [f"sidecar of {config.app.name!r} is up"]
        places = [
            ("gRPC", [p for p in (config.grpc.unix_socket, config.grpc.address) if p]),
            ("HTTP", [p for p in (config.http.unix_socket, config.http.address) if p]),
            ("admin", [config.admin.address] if config.admin.address else []),
        ]
        lines += [f"  {name:<6} {'  '.join(where)}" for name, where in places if where]
        if self._embedded is not None:
            lines.append(f"  data   {config.embedded.data_dir} (embedded nats-server)")
        if config.http.unix_socket:
            url = "http://sidecar/v1/topics/orders.created"
            body = "-H 'content-type: application/json' -d '{\"order\": 1}'"
            lines.append("publish your first event:")
            lines.append(f"  curl --unix-socket {config.http.unix_socket} {url} {body}")
        return lines


def _push_gauges(pusher: Pusher | None) -> tuple[int, int, bool]:
    if pusher is None:
        return 0, 0, False
    return pusher.requests, pusher.concurrency, pusher.circuit.state is CircuitState.OPEN


def _topics(config: Config) -> Iterator[str]:
    """The topics that metrics may tell apart, as the configuration spells them."""
    yield from (route.topic for route in config.routes if route.topic)
    yield from (s.dead_letter.topic for s in config.subscriptions if s.dead_letter.topic)
    yield Broker.dead_letter_topic


def _event_types(config: Config) -> Sequence[str]:
    """The types that metrics tell apart: those that are named for it, then those of the routes."""
    routed = (route.event_type for route in config.routes if route.event_type)
    entries = dict.fromkeys((*config.metrics.event_types, *routed))
    return list(entries)[: settings.MAX_EVENT_TYPES]


def make_brokers(config: Config, embedded: tuple[str, str] | None) -> Mapping[str, Broker]:
    """The drivers of the configured brokers; *embedded* is the (url, token) of our own server."""
    brokers: dict[str, Broker] = {}
    for name, broker in config.brokers.items():
        if isinstance(broker, settings.Memory):
            brokers[name] = MemoryBroker(name, broker)
            continue
        if isinstance(broker, settings.Kafka):
            brokers[name] = _kafka(name, broker, config)
            continue
        own = embedded if broker.embedded else None
        client_name = f"{config.app.name} sidecar"
        if isinstance(broker, settings.JetStream):
            brokers[name] = JetStreamBroker(name, broker, client_name=client_name, embedded=own)
        else:
            brokers[name] = NatsBroker(name, broker, client_name=client_name, embedded=own)
    return brokers


def _kafka(name: str, broker: settings.Kafka, config: Config) -> Broker:
    from sidecar.brokers.kafka.broker import KafkaBroker  # noqa: PLC0415 - librdkafka, if used

    publishing = config.publishing
    return KafkaBroker(
        name,
        broker,
        client_name=config.app.name,
        max_event_bytes=config.limits.max_event_bytes,
        max_pending=(publishing.max_pending_events, publishing.max_pending_bytes),
        timeout_seconds=publishing.timeout_seconds,
    )


async def try_brokers(config: Config) -> list[tuple[str, str | None]]:
    """Connect to each broker once: its name, and what was wrong."""
    results: list[tuple[str, str | None]] = []
    remote = {
        name: broker
        for name, broker in config.brokers.items()
        if not getattr(broker, "embedded", False)
    }
    for name, broker in make_brokers(config.model_copy(update={"brokers": remote}), None).items():
        try:
            await broker.connect()
            results.append((name, None))
        except SidecarError as error:
            results.append((name, error.message))
        finally:
            await broker.close()
    results += [(name, None) for name in config.brokers if name not in remote]
    return results


def defaults_by_topic(config: Config) -> Callable[[str], Defaults]:
    """What an event without source, type or content type has, by topic; the first match wins."""
    rules = [(pattern_matcher(rule.topic), rule) for rule in config.topics]

    @lru_cache(maxsize=1024)
    def defaults_for(topic: str) -> Defaults:
        for matcher, rule in rules:
            if matcher.fullmatch(topic):
                return Defaults(
                    source=rule.source or config.app.name,
                    type=rule.event_type or topic,
                    content_type=rule.content_type,
                )
        return Defaults(source=config.app.name, type=topic)

    return defaults_for


def _tcp(address: str, setting: str) -> socket.socket:
    return sockets.tcp_socket(*settings.split_address(address), setting)


_child_log = logging.getLogger("nats-server")


def _log_of_child(level: str, line: str) -> None:
    # Its everyday lines are about itself: of use only to who looks for a fault.
    number = logging.DEBUG if level == "info" else logging.getLevelName(level.upper())
    _child_log.log(number, "%s", line)
