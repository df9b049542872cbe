"""What all clients of one Kafka broker share: librdkafka's settings, and its errors as ours."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaError, KafkaException

from sidecar.errors import (
    BrokerRefused,
    BrokerUnavailable,
    EventTooLarge,
    OutcomeUnknown,
    SidecarError,
    TopicMissing,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sidecar.config import Kafka as Settings

Conf = dict[str, Any]
"""librdkafka's settings by name."""

LEAVE_SECONDS = 1.0
FRAMING_BYTES = 1024
"""What a record takes beside its key, value and headers, and its batch; both far less."""

_UNAVAILABLE = {
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TRANSPORT,
    KafkaError._RESOLVE,
    KafkaError._TIMED_OUT,
    KafkaError._WAIT_COORD,
    KafkaError._DESTROY,
    KafkaError._FAIL,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.NOT_COORDINATOR,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.NOT_ENOUGH_REPLICAS,
    KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
}
_CREDENTIALS = {
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}
_MISSING = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
}
_TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
_UNKNOWN = {KafkaError._MSG_TIMED_OUT, KafkaError.REQUEST_TIMED_OUT}


def translate(error: KafkaError, *, broker: str, topic: str = "") -> SidecarError:
    """Our error for librdkafka's."""
    code, text = error.code(), error.str()
    facts: dict[str, Any] = {"broker": broker, **({"topic": topic} if topic else {})}
    if code in _MISSING and topic:
        return topic_missing(broker, topic)
    if code in _TOO_LARGE:
        return EventTooLarge(
            f"broker {broker!r} takes no event this large for {topic!r}: raise the topic's "
            "max.message.bytes",
            **facts,
        )
    if code in _UNKNOWN:
        return OutcomeUnknown(
            f"broker {broker!r} did not answer in time: the event may be stored. Publish it again "
            "with the same id",
            **facts,
        )
    if code in _UNAVAILABLE or (error.retriable() and not is_refusal(error)):
        return BrokerUnavailable(f"broker {broker!r}: {text}", **facts)
    return BrokerRefused(f"broker {broker!r}: {text}", **facts)


def is_missing(error: KafkaError) -> bool:
    """There is no such topic, or no such partition of it."""
    return error.code() in _MISSING


def is_refusal(error: KafkaError) -> bool:
    """Connecting again will not help until somebody changes something: credentials, certificates."""
    return error.code() in _CREDENTIALS


def topic_missing(broker: str, topic: str) -> TopicMissing:
    return TopicMissing(
        f"topic {topic!r} does not exist on broker {broker!r}: create it, or set "
        f"brokers.{broker}.auto_create_topics = true",
        topic=topic,
        broker=broker,
    )


def quiet(settings: Settings, client_id: str) -> Conf:
    """For clients that nobody polls, so that nothing piles up: they do not log."""
    return common(settings, client_id) | options(settings) | {"log_level": 0}


def common(settings: Settings, client_id: str) -> Conf:
    """What every client needs to connect. Raises ConfigInvalid when a secret's file is gone."""
    return {
        "bootstrap.servers": ",".join(settings.bootstrap_servers),
        "client.id": client_id,
        # With the broker's own auto-creation a typing error would become a topic.
        "allow.auto.create.topics": False,
        # Idle connections are closed by brokers; that is no news.
        "log.connection.close": False,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 2000,
        "socket.keepalive.enable": True,
        # How long a request may be unanswered before the connection counts as dead.
        "socket.timeout.ms": 15_000,
        "topic.metadata.refresh.interval.ms": 10_000,
        **_security(settings),
    }


def logged(error_cb: Callable[[KafkaError], None]) -> Conf:
    """For clients that are polled: what librdkafka says goes to our log, and errors to *error_cb*."""
    return {"logger": _Log(), "log_level": 4, "error_cb": error_cb}


def make_consumer(conf: Conf, *, broker: str) -> Any:
    """
    Raises BrokerRefused for settings that librdkafka does not take.

    Those of consumers are found out here: a producer takes no notice of them.
    """
    try:
        return Consumer(conf)
    except (KafkaException, TypeError, ValueError) as error:
        raise BrokerRefused(f"broker {broker!r}: {refusal(error)}", broker=broker) from error


def refusal(error: Exception) -> str:
    """Why a client could not be made."""
    reason = error.args[0] if error.args else error
    return reason.str() if isinstance(reason, KafkaError) else str(reason)


_NO_NEWS = frozenset({"FAIL", "ERROR", "REQTMOUT", "GETPID", "CONFWARN"})
"""A connection that fails is a line at each try, and the broker's state says it once. And each client
warns of the options that are for another kind of client."""


class _Log:
    """Stands in for a logger: librdkafka calls its `log` within poll."""

    _to = logging.getLogger("librdkafka")

    def log(self, level: int, text: str, *arguments: object) -> None:
        if not arguments or arguments[0] not in _NO_NEWS:
            self._to.log(level, text, *arguments)


def leave(consumer: Any) -> None:
    """
    Close a consumer, so that its group knows at once. Calls back for its partitions.

    Non-obvious: closed while a rebalance is under way it would say nothing, and its group wait for
    the end of its session. Raises KafkaException, RuntimeError when it is closed already.
    """
    consumer.unsubscribe()
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        consumer.poll(0.05)
        if not consumer.assignment() or time.monotonic() > deadline:
            break
    consumer.close()


def options(settings: Settings) -> Conf:
    return dict(settings.options)


def _security(settings: Settings) -> Conf:
    protocol = "sasl_" if settings.sasl_mechanism else ""
    conf: Conf = {"security.protocol": protocol + ("ssl" if settings.tls else "plaintext")}
    if settings.tls:
        files = {
            "ssl.ca.location": settings.tls_ca_file,
            "ssl.certificate.location": settings.tls_certificate_file,
            "ssl.key.location": settings.tls_key_file,
        }
        conf |= {name: path for name, path in files.items() if path}
    if settings.sasl_mechanism == "OAUTHBEARER":
        conf |= {
            "sasl.mechanism": "OAUTHBEARER",
            "sasl.oauthbearer.method": "oidc",
            "sasl.oauthbearer.client.id": settings.user,
            "sasl.oauthbearer.client.secret": settings.secret("password"),
            "sasl.oauthbearer.token.endpoint.url": settings.oauth_token_url,
        }
        if settings.oauth_scope:
            conf["sasl.oauthbearer.scope"] = settings.oauth_scope
    elif settings.sasl_mechanism:
        conf |= {
            "sasl.mechanism": settings.sasl_mechanism,
            "sasl.username": settings.user,
            "sasl.password": settings.secret("password"),
        }
    return conf
