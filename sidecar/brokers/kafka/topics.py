"""Which topics there are, their partitions, and making those that are missing. Blocking."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from sidecar.brokers.kafka.client import is_missing, quiet, topic_missing, translate
from sidecar.event import has_wildcard, pattern_matcher

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sidecar.config import Kafka as Settings

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
CREATE_SECONDS = 15.0
LOOK_SECONDS = 0.01
DEAD_LETTERS = ".dlq"
"""How the topics end that hold dead letters, unless configured otherwise."""


class Topics:
    """
    Looks up and creates topics. Every method blocks for ANSWER_SECONDS at most (creating: for
    CREATE_SECONDS): call it in a thread; any number may.

    Each raises BrokerUnavailable and BrokerRefused.
    """

    def __init__(
        self, broker: str, settings: Settings, *, client_id: str, max_message_bytes: int
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._client_id = client_id
        self._max_message_bytes = max_message_bytes
        self._lock = threading.Lock()
        self._admin: AdminClient | None = None

    @property
    def admin(self) -> AdminClient:
        """Made when it is first used: its threads begin to connect at once."""
        with self._lock:
            if self._admin is None:
                self._admin = AdminClient(quiet(self._settings, self._client_id))
            return self._admin

    def ensure(self, topic: str, *, kept: bool = False) -> None:
        """
        See to it that *topic* is there. Raises TopicMissing.

        *kept*: made here, it has one partition, in which nothing expires.
        """
        known = self._metadata(topic).get(topic)
        if known is not None and known.error is None:
            return
        error = None if known is None else known.error
        if error is not None and not is_missing(error):
            if error.code() == KafkaError.LEADER_NOT_AVAILABLE:
                return  # it is there; its leader is being chosen
            raise translate(error, broker=self._broker, topic=topic)
        if not self._settings.auto_create_topics:
            raise topic_missing(self._broker, topic)
        self._create(topic, kept=kept)

    def _create(self, topic: str, *, kept: bool) -> None:
        settings = self._settings
        config = {"max.message.bytes": self._max_message_bytes} | settings.topic_settings
        if kept:
            config |= {"cleanup.policy": "delete", "retention.ms": -1, "retention.bytes": -1}
        new = NewTopic(
            topic,
            num_partitions=1 if kept else settings.topic_partitions,
            replication_factor=settings.topic_replication,
            config={name: _text(value) for name, value in config.items()},
        )
        try:
            self.admin.create_topics([new], request_timeout=CREATE_SECONDS - 5)[topic].result(
                timeout=CREATE_SECONDS
            )
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise translate(error.args[0], broker=self._broker, topic=topic) from error
        else:
            log.info("broker %s: topic %s created", self._broker, topic)
        # Its node tells of it a moment later: a subscription begins with its partitions.
        deadline = time.monotonic() + ANSWER_SECONDS
        while not self.matching(topic) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)  # noqa: TID251 - in a thread

    def matching(self, pattern: str, *, dead_letters: bool = False) -> Mapping[str, Sequence[int]]:
        """
        The topics that *pattern* names, with the numbers of their partitions.

        Those of dead letters only where it names them, or *dead_letters* is set.
        """
        known = self._metadata(pattern) if not has_wildcard(pattern) else self._metadata(None)
        return {
            name: sorted(found.partitions)
            for name, found in known.items()
            if found.error is None
            and (names(pattern, name) or (dead_letters and names_dead_letters(pattern, name)))
        }

    def _metadata(self, topic: str | None) -> Mapping[str, Any]:
        try:
            named = () if topic is None else (topic,)
            found = self.admin.list_topics(*named, timeout=ANSWER_SECONDS)
        except KafkaException as error:
            raise translate(error.args[0], broker=self._broker) from error
        topics: Mapping[str, Any] = found.topics
        return topics


def names(pattern: str, topic: str) -> bool:
    """
    Whether a subscription to *pattern* gets *topic*.

    Dead letters lie beside their topics here, so a wildcard does not match them, nor what Kafka
    keeps for itself: with "orders.>" one would get the dead letters of all who failed on those.
    """
    if not has_wildcard(pattern):
        return topic == pattern
    hidden = topic.startswith("_") or (
        topic.endswith(DEAD_LETTERS) and not pattern.endswith(DEAD_LETTERS)
    )
    return not hidden and pattern_matcher(pattern).fullmatch(topic) is not None


def names_dead_letters(pattern: str, topic: str) -> bool:
    """Whether *topic*, which holds dead letters, is one of *pattern* as any other would be."""
    return topic.endswith(DEAD_LETTERS) and pattern_matcher(pattern).fullmatch(topic) is not None


def _text(value: object) -> str:
    """As server.properties has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
