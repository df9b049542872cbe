"""The configuration: its defaults, its reference file, its errors, its environment and its secrets."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from sidecar import config
from sidecar.config import Config
from sidecar.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLE = Path(__file__).parents[1] / "config.example.toml"
MEMORY = {"type": "memory"}
NATS = {"type": "nats", "servers": ["nats://one:4222"]}
JETSTREAM = {"type": "jetstream", "servers": ["nats://one:4222"]}


def problems(data: dict[str, Any]) -> list[str]:
    """What is wrong with *data*, one line each."""
    with pytest.raises(ConfigInvalid) as caught:
        config.check(data)
    return list(caught.value.problems)


def problem(data: dict[str, Any]) -> str:
    """The one thing that is wrong with *data*."""
    (only,) = problems(data)
    return only


def answer(ask: Callable[[], Config]) -> Config | list[str]:
    """The configuration, or its problems; any other exception is the test's to fail with."""
    try:
        return ask()
    except ConfigInvalid as error:
        return list(error.problems)


def problems_from(environment: dict[str, str], path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigInvalid) as caught:
        config.load(path, environment)
    return list(caught.value.problems)


def broker(**keys: object) -> dict[str, Any]:
    return {"brokers": {"work": {**JETSTREAM, **keys}}}


def subscribed(**keys: object) -> dict[str, Any]:
    return {"subscriptions": [{"name": "billing", "topic": "orders.created", **keys}]}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "sidecar.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# -- the defaults


def test_nothing_configured_means_one_embedded_broker_for_every_topic() -> None:
    """No brokers at all: the embedded server, one JetStream broker that makes its streams."""
    found = config.load(None, {})

    assert found.needs_embedded_server
    assert list(found.brokers) == ["embedded"]
    (embedded,) = found.brokers.values()
    assert isinstance(embedded, config.JetStream)
    assert (embedded.embedded, embedded.auto_create_streams, embedded.servers) == (True, True, [])
    assert found.routes == [config.Route(topic=">", broker="embedded")]


def test_the_default_doors_are_loopback_and_http_is_for_the_unix_socket() -> None:
    found = config.load(None, {})

    assert found.grpc.address == "127.0.0.1:7400"
    assert found.http.address == ""
    assert found.admin.address == "127.0.0.1:7402"


def test_a_subscription_needs_only_its_name_and_topic() -> None:
    (found,) = config.check(subscribed()).subscriptions

    assert (found.ordering, found.max_in_flight, found.lease_seconds) == ("key", 256, 30)
    assert found.retry == config.Retry(
        max_attempts=5, initial_seconds=0.2, max_seconds=30, multiplier=2, jitter=0.2, max_crashes=3
    )
    assert found.dead_letter == config.DeadLetter(topic=None, broker=None)
    assert (found.start, found.broker, found.event_types) == ("earliest", None, [])


def test_a_declared_broker_makes_its_streams_only_when_told() -> None:
    found = config.check(broker()).brokers["work"]

    assert isinstance(found, config.JetStream)
    assert not found.auto_create_streams


def test_events_are_limited_to_a_mebibyte() -> None:
    assert config.load(None, {}).limits.max_event_bytes == 1024 * 1024


def test_an_only_broker_has_every_topic() -> None:
    assert config.check(broker()).routes == [config.Route(topic=">", broker="work")]


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n"])
def test_an_empty_file_is_the_default_configuration(
    text: str, written: Callable[[str], Path]
) -> None:
    assert config.load(written(text), {}) == config.load(None, {})


def test_a_configuration_is_frozen() -> None:
    found = config.load(None, {})

    with pytest.raises(ValueError, match="frozen"):
        found.grpc.address = "127.0.0.1:1"


# -- the places


def test_unnamed_places_are_below_the_directories_of_the_user() -> None:
    environment = {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_STATE_HOME": "/home/ann/state"}
    found = config.with_places(config.load(None, environment), environment)

    assert found.grpc.unix_socket == "/run/user/7/sidecar/grpc.sock"
    assert found.http.unix_socket == "/run/user/7/sidecar/http.sock"
    assert found.embedded.data_dir == "/home/ann/state/sidecar"


def test_named_places_stay() -> None:
    named = config.check(
        {
            "grpc": {"unix_socket": "/run/a.sock"},
            "http": {"unix_socket": "/run/b.sock"},
            "embedded": {"data_dir": "/var/c"},
        }
    )

    assert config.with_places(named, {"XDG_RUNTIME_DIR": "/elsewhere"}) == named


def test_a_socket_path_has_at_most_107_bytes() -> None:
    """sockaddr_un has room for 107 bytes and the closing NUL; letters may take several."""
    longest = "/" + 53 * "é"
    found = config.check({"grpc": {"unix_socket": longest}})

    assert found.grpc.unix_socket == longest
    assert problem({"grpc": {"unix_socket": longest + "x"}}) == (
        f"grpc.unix_socket: '{longest}x' has 108 bytes; a Unix socket's path has at most 107: "
        'name a shorter one, as "/run/sidecar/grpc.sock"'
    )


def test_a_default_socket_path_that_is_too_long_is_a_problem_too() -> None:
    environment = {"XDG_RUNTIME_DIR": "/" + 120 * "x"}
    with pytest.raises(ConfigInvalid) as caught:
        config.with_places(config.load(None, environment), environment)

    doors = [line.split(":")[0] for line in caught.value.problems]
    assert doors == ["grpc.unix_socket", "http.unix_socket"]


# -- config.example.toml

_TABLE = re.compile(r"\[\[?([a-z_.]+)\]\]?")
_KEY = re.compile(r"(?P<off># )?(?P<key>[a-z_]+) = (?P<value>.+?)  # (?P<meaning>.+)")
_DEFAULT = re.compile(r"\(default: (.+)\)$")


def sections() -> dict[str, list[re.Match[str]]]:
    """The keys of each table of the example, commented-out ones too, in their order."""
    found: dict[str, list[re.Match[str]]] = {}
    keys: list[re.Match[str]] = []
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if table := _TABLE.fullmatch(line):
            assert table[1] not in found, f"{table[1]} occurs twice"
            keys = found.setdefault(table[1], [])
        elif key := _KEY.fullmatch(line):
            keys.append(key)
        else:
            assert line in {"", "#"} or line.startswith("# "), f"{line!r} has no meaning behind it"
    return found


def models(model: type[config.Settings], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every table of the code, by the path that the example has it under."""
    for name, field in model.model_fields.items():
        if name == "brokers":
            for at, broker_type in (
                ("brokers.scratch", config.Memory),
                ("brokers.realtime", config.Nats),
                ("brokers.work", config.JetStream),
                ("brokers.log", config.Kafka),
            ):
                yield at, broker_type
                yield from models(broker_type, f"{at}.")
        for inner in (field.annotation, *get_args(field.annotation)):
            if inner is config.Filter:  # in themselves, so the example shows them as a value
                continue
            if isinstance(inner, type) and issubclass(inner, config.Settings):
                yield f"{path}{name}", inner
                yield from models(inner, f"{path}{name}.")


def keys_of(model: type[config.Settings], path: str, tables: dict[str, Any]) -> list[str]:
    """The keys that are no tables; a broker's type comes first, for it says what the rest means."""
    keys = [name for name in model.model_fields if f"{path}.{name}" not in tables]
    return sorted(keys, key=lambda name: name != "type")


def test_the_example_is_a_valid_configuration() -> None:
    found = config.load(EXAMPLE, {})

    assert list(found.brokers) == ["scratch", "realtime", "work", "log"]
    assert [s.name for s in found.subscriptions] == ["billing"]


def test_the_example_is_valid_with_every_key_that_is_commented_out() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    everything, count = re.subn(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    found = config.check(tomllib.loads(everything))

    assert count == 6
    assert found.subscriptions[0].dead_letter.broker == "work"


def test_the_example_has_every_key_of_the_code_in_its_order_and_no_other() -> None:
    tables = dict(models(Config))
    expected = {path: keys_of(model, path, tables) for path, model in tables.items()}

    assert {path: [key["key"] for key in keys] for path, keys in sections().items()} == expected
    assert list(sections()) == list(tables)


def test_the_example_shows_the_defaults_of_the_code() -> None:
    """A value is the default, or the comment says which is: "(default: …)", "(required)"."""
    tables = dict(models(Config))
    shown, expected = {}, {}
    for path, keys in sections().items():
        for key in keys:
            field = tables[path].model_fields[key["key"]]
            at = f"{path}.{key['key']}"
            shown[at] = shown_default(key)
            expected[at] = "required" if field.is_required() else plain(field.default)

    assert shown == expected


def shown_default(key: re.Match[str]) -> object:
    if key["meaning"].endswith("(required)"):
        return "required"
    named = _DEFAULT.search(key["meaning"])
    text = named[1] if named else "absent" if key["off"] else key["value"]
    return None if text == "absent" else tomllib.loads(f"value = {text}")["value"]


def plain(value: object) -> object:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def test_the_example_has_a_unit_in_the_name_of_every_time_and_size() -> None:
    """A key whose type has a unit ends in it; counts and shares need none."""
    fractions = {"multiplier", "jitter"}
    bare = [
        f"{path}.{name}"
        for path, model in models(Config)
        for name, field in model.model_fields.items()
        if field.annotation is float and name not in fractions and not name.endswith("_seconds")
    ]

    assert bare == []


# -- all problems at once


def test_every_problem_is_told_at_once_with_its_key_path() -> None:
    """Wrong types, unknown keys, broken rules of one table and of several: one run shows them all."""
    found = problems(
        {
            "grpc": {"adress": "127.0.0.1:1", "address": "0.0.0.0:7400"},
            "log": {"level": "loud"},
            "limits": {"max_event_bytes": 32 * config.MIB, "max_streams": "many"},
            "brokers": {
                "a b": MEMORY,
                "log": {"type": "pulsar"},
                "work": {**JETSTREAM, "embedded": True, "streams": [{"name": "A"}, {"name": "A"}]},
            },
            "routes": [{"broker": "worc"}, {"topic": "a..b", "broker": "work"}],
            "subscriptions": [
                {"name": "billing", "topic": "orders.>", "lease_seconds": "30", "broker": "nope"},
                {"name": "billing", "topic": "orders.>", "retry": {"max_seconds": 0.1}},
                {"name": "shipping", "topic": "x", "dead_letter": {"broker": "gone"}},
                5,
            ],
            "subscription": [],
        }
    )

    assert [line.split(": ", 1)[0] for line in found] == [
        "subscription",
        "grpc.address",
        "grpc.adress",
        "log.level",
        "limits.max_batch_bytes",
        "limits.max_streams",
        'brokers."a b"',
        "brokers.log.type",
        "brokers.work.embedded",
        "brokers.work.streams[0].subjects",
        "brokers.work.streams[1].subjects",
        "brokers.work.streams[1].name",
        "routes[0].event_type",
        "routes[1].topic",
        "routes[0].broker",
        "subscriptions[0].lease_seconds",
        "subscriptions[1].retry.max_seconds",
        "subscriptions[3]",
        "subscriptions[1].name",
        "subscriptions[0].broker",
        "subscriptions[2].dead_letter.broker",
    ]


def test_the_text_of_the_error_is_all_its_problems() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        config.check({"app": 5, "log": 5})

    assert str(caught.value) == "app: must be a table\nlog: must be a table"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"grpc": {"adress": ""}},
            "grpc.adress: unknown key; did you mean 'address'? accepted here: address, unix_socket",
        ),
        (
            {"drain": {"zzz": 1}},
            "drain.zzz: unknown key; accepted here: timeout_seconds",
        ),
        (
            broker(streams=[{"name": "A", "subjects": ["a"], "replica": 3}]),
            (
                "brokers.work.streams[0].replica: unknown key; did you mean 'replicas'? accepted here: "
                "name, subjects, storage, retention, max_age_seconds, max_bytes, max_events, replicas, "
                "duplicate_window_seconds"
            ),
        ),
        (
            subscribed(dead_letter={"topics": "x"}),
            (
                "subscriptions[0].dead_letter.topics: unknown key; did you mean 'topic'? "
                "accepted here: topic, broker"
            ),
        ),
        (
            {"brokers": {"work": {"type": "memory", "max_event": 5}}},
            (
                "brokers.work.max_event: unknown key; did you mean 'max_events'? accepted here: "
                "type, max_events, max_bytes, duplicate_window_seconds"
            ),
        ),
    ],
)
def test_an_unknown_key_is_told_what_was_meant(data: dict[str, Any], expected: str) -> None:
    assert problem(data) == expected


LONG = "n" * (config.MAX_NAME_LENGTH + 1)
TOO_LONG = f"'{LONG[:100]}…' has 129 characters; use at most 128"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"app": {"name": LONG}}, f"app.name: {TOO_LONG}"),
        ({"subscriptions": [{"name": LONG, "topic": "a"}]}, f"subscriptions[0].name: {TOO_LONG}"),
        (
            {
                "brokers": {
                    "work": JETSTREAM | {"streams": [{"name": LONG, "subjects": ["orders.>"]}]}
                }
            },
            f"brokers.work.streams[0].name: {TOO_LONG}",
        ),
        ({"brokers": {LONG: MEMORY}}, f"brokers.{LONG[:100]}…: {TOO_LONG}"),
        (
            {"subscriptions": [{"name": "a", "topic": "a", "broker": LONG}]},
            f"subscriptions[0].broker: no broker '{LONG[:100]}…'; there are: embedded",
        ),
    ],
)
def test_a_name_is_short_and_so_is_what_is_said_of_it(data: dict[str, Any], expected: str) -> None:
    assert problem(data) == expected


@pytest.mark.parametrize("name", ["n", LONG[1:]])
def test_a_name_may_have_128_characters(name: str) -> None:
    data = {"app": {"name": name}, "brokers": {name: MEMORY}}

    assert list(config.check(data).brokers) == [name]


@pytest.mark.parametrize("topic", ["_INBOX.>", "_INBOX.x", "_sys.*"])
def test_a_subscription_cannot_ask_for_the_brokers_own_topics(topic: str) -> None:
    assert "is reserved" in problem({"subscriptions": [{"name": "a", "topic": topic}]})


def test_a_type_of_events_may_begin_with_an_underscore() -> None:
    wanted: dict[str, object] = {"name": "a", "topic": "a", "event_types": ["_internal.>"]}

    assert config.check_subscription(wanted).event_types == ["_internal.>"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"app": {"name": 5}}, 'app.name: must be a string, as "text"'),
        ({"app": {"name": ""}}, 'app.name: is not a name; use letters, digits, "-" and "_"'),
        ({"limits": {"max_streams": 1.0}}, "limits.max_streams: must be a whole number"),
        ({"limits": {"max_streams": True}}, "limits.max_streams: must be a whole number"),
        (
            {"limits": {"max_streams": 0}},
            "limits.max_streams: must be greater than or equal to 1",
        ),
        ({"drain": {"timeout_seconds": "5"}}, "drain.timeout_seconds: must be a number"),
        ({"drain": {"timeout_seconds": True}}, "drain.timeout_seconds: must be a number"),
        ({"drain": {"timeout_seconds": 0}}, "drain.timeout_seconds: must be greater than 0"),
        (
            {"log": {"level": "loud"}},
            "log.level: must be 'debug', 'info', 'warning' or 'error'",
        ),
        (
            {"metrics": {"event_types": ["a"] * 201}},
            "metrics.event_types: must have at most 200 items, not 201",
        ),
        (
            {"metrics": {"event_types": ["order.*", "a..b"]}},
            (
                "metrics.event_types[1]: 'a..b' is not a topic pattern: use tokens joined by dots, "
                '"*" for any one token, ">" at the end for one or more, as "orders.*" or "orders.>"'
            ),
        ),
        ({"topics": [{}]}, "topics[0].topic: is missing; it has no default"),
        ({"topics": {}}, "topics: must be an array, as [1, 2]"),
        ({"brokers": []}, "brokers: must be a table"),
        (
            {"brokers": {"work": {}}},
            "brokers.work.type: must be one of 'memory', 'nats', 'jetstream', 'kafka'",
        ),
        ({"brokers": {"work": 5}}, "brokers.work: must be a table"),
        (broker(embedded="yes"), "brokers.work.embedded: must be true or false"),
        (
            broker(streams=[{"name": "A", "subjects": ["a"], "max_bytes": 0}]),
            "brokers.work.streams[0].max_bytes: must not be 0; use -1 for no limit",
        ),
        (
            broker(streams=[{"name": "A", "subjects": ["a"], "max_age_seconds": 60}]),
            (
                "brokers.work.streams[0].duplicate_window_seconds: 120 is more than max_age_seconds; "
                "use at most 60"
            ),
        ),
    ],
)
def test_a_wrong_value_is_told_what_is_accepted(data: dict[str, Any], expected: str) -> None:
    assert problem(data) == expected


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_refused_everywhere(number: float) -> None:
    """TOML can write nan and inf; a bound lets nan through, so each field refuses it as such."""
    refused = 0
    for path, model in models(Config):
        names = [n for n, f in model.model_fields.items() if f.annotation is float]
        for name in names:
            with pytest.raises(ValidationError) as caught:
                model.model_validate({name: number})
            wrong = {error["loc"][0]: error["type"] for error in caught.value.errors()}
            assert wrong[name] == "finite_number", f"{path}.{name}"
        refused += len(names)

    assert refused > 10


@pytest.mark.parametrize(
    "address",
    [
        "7400",
        "localhost",
        "localhost:",
        ":7400",
        "127.0.0.1:65536",
        "127.0.0.1:²",
        "::1:7400",
        "http://localhost:1",
        "[localhost]:1",
        "127.0.0.1:" + 5000 * "9",
        "a b:1",
        "127.0.0.1:-1",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    expected = (
        'admin.address: is not an address; one looks like "127.0.0.1:7400", and "" turns it off'
    )

    assert problem({"admin": {"address": address}}) == expected


@pytest.mark.parametrize("door", ["grpc", "http"])
@pytest.mark.parametrize(
    "address", ["0.0.0.0:7400", "[::]:7400", "10.1.2.3:7400", "example.org:7400"]
)
def test_an_address_that_others_reach_is_refused(door: str, address: str) -> None:
    """There is neither TLS nor a token yet."""
    assert problem({door: {"address": address}}) == (
        f"{door}.address: '{address}' is not a loopback address, and this door has neither TLS nor "
        "a token; use 127.0.0.1, or the Unix socket"
    )


@pytest.mark.parametrize("address", ["", "127.0.0.1:0", "127.9.9.9:80", "localhost:80", "[::1]:80"])
def test_a_loopback_address_is_accepted(address: str) -> None:
    assert config.check({"grpc": {"address": address}}).grpc.address == address


def test_a_probe_may_come_from_outside() -> None:
    assert config.check({"admin": {"address": "0.0.0.0:7402"}}).admin.address == "0.0.0.0:7402"


def test_two_doors_never_share_a_place() -> None:
    found = problems(
        {
            "grpc": {"unix_socket": "/run/a.sock"},
            "http": {"unix_socket": "/run/a.sock", "address": "127.0.0.1:7402"},
        }
    )

    assert found == [
        "http.unix_socket: is grpc.unix_socket already; give each its own",
        "admin.address: is http.address already; give each its own",
    ]


def test_what_waits_can_hold_the_largest_event() -> None:
    limits = {"max_event_bytes": 64 * config.MIB, "max_batch_bytes": 64 * config.MIB}

    assert problem({"limits": limits}) == (
        "publishing.max_pending_bytes: 33554432 is less than limits.max_event_bytes; "
        "use at least 67108864"
    )


@pytest.mark.parametrize(
    "text", ["app", "x = " + 5000 * "9", "x = " + 5000 * "[", "[app]\n[app]", "x = 1\nx = 2"]
)
def test_a_file_that_is_not_toml_is_told_so(text: str, written: Callable[[str], Path]) -> None:
    path = written(text)
    (only,) = problems_from({}, path)

    assert only.startswith(f"{path} is not TOML: ")


def test_a_file_that_is_not_utf_8_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "sidecar.toml"
    path.write_bytes(b"[app]\nname = '\xff'")
    (only,) = problems_from({}, path)

    assert only.startswith(f"{path} is not TOML: ")


def test_a_file_that_is_missing_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"

    assert problems_from({}, path) == [f"cannot read {path}: No such file or directory"]


# -- brokers, routes, subscriptions


def test_a_broker_that_is_named_is_there() -> None:
    found = problems(
        {
            "brokers": {"work": MEMORY, "spare": MEMORY},
            "routes": [{"topic": ">", "broker": "wrok"}],
            **subscribed(broker="zzz"),
        }
    )

    assert found == [
        "routes[0].broker: no broker 'wrok'; did you mean 'work'? there are: work, spare",
        "subscriptions[0].broker: no broker 'zzz'; there are: work, spare",
    ]


def test_names_of_brokers_are_checked_where_brokers_are_broken() -> None:
    found = problems(
        {
            "brokers": {"work": {"type": "jetstream", "servers": 5}},
            "routes": [{"topic": ">", "broker": "work"}, {"topic": ">", "broker": "none"}],
        }
    )

    assert found == [
        "brokers.work.servers: must be an array, as [1, 2]",
        "routes[1].broker: no broker 'none'; there are: work",
    ]


def test_without_brokers_the_embedded_one_can_be_named() -> None:
    found = config.check({"routes": [{"topic": "orders.>", "broker": "embedded"}]})

    assert [route.topic for route in found.routes] == ["orders.>"]


def test_several_brokers_need_a_route() -> None:
    assert problem({"brokers": {"a": MEMORY, "b": MEMORY}}) == (
        'routes: no topic has a broker; add topic = ">" for one of: a, b'
    )


def test_a_route_says_what_it_matches() -> None:
    assert problem({**broker(), "routes": [{"broker": "work"}]}) == (
        'routes[0].event_type: the route matches nothing; set it, or topic, as topic = ">"'
    )


@pytest.mark.parametrize(
    "server", ["nats", "nats:4222", "http://a:4222", "nats://", "nats://a:0", "nats://a:x", ""]
)
def test_a_server_is_a_nats_url(server: str) -> None:
    assert problem(broker(servers=["nats://one", server])) == (
        'brokers.work.servers[1]: is not a server; one looks like "nats://host:4222" '
        'or "tls://host:4222"'
    )


def test_a_broker_connects_somewhere_and_only_there() -> None:
    nowhere = problem(broker(servers=[]))
    both = problem(broker(embedded=True))

    assert nowhere == (
        "brokers.work.embedded: there is no server; set this to true, or name servers, "
        'as ["nats://host:4222"]'
    )
    assert both == (
        "brokers.work.embedded: brings a server of its own; leave out servers, or embedded"
    )


def test_names_of_subscriptions_are_unique() -> None:
    twice = [{"name": "a", "topic": "x"}, {"name": "b", "topic": "x"}, {"name": "a", "topic": "y"}]

    assert problem({"subscriptions": twice}) == (
        "subscriptions[2].name: 'a' is subscriptions[0] already; choose another"
    )


def test_names_of_streams_are_unique() -> None:
    stream = {"name": "A", "subjects": ["a"]}

    assert problem(broker(streams=[stream, stream])) == (
        "brokers.work.streams[1].name: 'A' is brokers.work.streams[0] already; choose another"
    )


def test_a_subscription_has_a_route() -> None:
    routes = [{"topic": "bills.>", "broker": "work"}, {"event_type": ">", "broker": "work"}]

    assert problem({**broker(), "routes": routes, **subscribed()}) == (
        "subscriptions[0].topic: no route has 'orders.created'; add one, or name a broker here"
    )


BOTH = {"brokers": {"fast": NATS, "work": JETSTREAM}}


def to(name: str, topic: str) -> dict[str, Any]:
    return {"topic": topic, "broker": name}


@pytest.mark.parametrize(
    ("routes", "keys"),
    [
        ([to("work", ">")], {"broker": "fast"}),
        ([to("work", ">")], {"dead_letter": {"broker": "fast"}}),
        ([to("work", ">")], {"broker": "work", "dead_letter": {"broker": "fast"}}),
        ([to("fast", ">")], {}),
        ([to("fast", "orders.created")], {}),
        ([to("fast", "orders.*"), to("work", ">")], {}),
        ([to("fast", "*.created"), to("work", ">")], {}),
        ([to("work", "bills.>"), to("fast", ">")], {}),
        ([to("fast", "orders.>")], {"topic": "orders.*"}),
        ([to("fast", "orders.>")], {"topic": "orders.>"}),
        ([{"event_type": "a", "broker": "work"}, to("fast", ">")], {}),
        ([to("fast", ">")], {"dead_letter": {"topic": "lost"}}),
    ],
)
def test_dead_letters_go_to_a_broker_that_stores(
    routes: list[dict[str, Any]], keys: dict[str, Any]
) -> None:
    """dead_letter.broker, else the subscription's, else the one its topic's route names."""
    assert problem({**BOTH, "routes": routes, **subscribed(**keys)}) == (
        "subscriptions[0].dead_letter.broker: dead letters need a broker that stores, and 'fast' is "
        "core NATS; use work"
    )


@pytest.mark.parametrize(
    ("routes", "keys"),
    [
        ([to("fast", ">")], {"dead_letter": {"broker": "work"}}),
        ([to("fast", ">")], {"broker": "work"}),
        ([to("work", "orders.>"), to("fast", ">")], {}),
        ([to("fast", "orders"), to("work", ">")], {}),
        ([to("fast", "orders.created.>"), to("work", ">")], {}),
        ([to("fast", "orders.*"), to("work", ">")], {"topic": "orders.>"}),
        ([{"event_type": "a", "broker": "fast"}, to("work", ">")], {}),
    ],
)
def test_a_subscription_that_stores_its_dead_letters_or_may_is_accepted(
    routes: list[dict[str, Any]], keys: dict[str, Any]
) -> None:
    """What the configuration cannot decide, a route for a part of the topic, is left to run time."""
    found = config.check({**BOTH, "routes": routes, **subscribed(**keys)})

    assert len(found.subscriptions) == 1


def test_core_nats_alone_is_told_to_add_a_broker_for_dead_letters() -> None:
    assert problem({"brokers": {"fast": NATS}, **subscribed()}) == (
        "subscriptions[0].dead_letter.broker: dead letters need a broker that stores, and 'fast' is "
        "core NATS; add one, of type jetstream or kafka"
    )


def test_a_subscription_never_gets_its_own_dead_letters() -> None:
    own = subscribed(topic="orders.>", dead_letter={"topic": "{topic}.dlq"})

    assert problem(own) == (
        "subscriptions[0].dead_letter.topic: '{topic}.dlq' is part of 'orders.>', so that the "
        'subscription gets its own dead letters; use a topic outside of it, as "dlq.{topic}", or '
        "another dead_letter.broker"
    )


@pytest.mark.parametrize("template", ["{topic}.dlq", "dlq.{topic}", "lost"])
def test_a_dead_letter_topic_may_name_the_topic(template: str) -> None:
    (found,) = config.check(subscribed(dead_letter={"topic": template})).subscriptions

    assert found.dead_letter.topic == template


def test_a_described_subscription_is_checked_like_a_declared_one() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        config.check_subscription({"name": "a", "topics": "x", "retry": {"attempts": 3}})

    assert [line.split(";")[0] for line in caught.value.problems] == [
        "topic: is missing",
        "retry.attempts: unknown key",
        "topics: unknown key",
    ]


# -- start


@pytest.mark.parametrize(
    ("start", "ns"),
    [
        ("earliest", None),
        ("latest", None),
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T01:00:00.000001+01:00", 1000),
        ("2026-01-31T12:00:00Z", 1_769_860_800_000_000_000),
    ],
)
def test_a_start_is_a_word_or_a_time(start: str, ns: int | None) -> None:
    (found,) = config.check(subscribed(start=start)).subscriptions

    assert config.start_time_ns(found.start) == ns


def test_a_start_may_be_a_time_of_toml(written: Callable[[str], Path]) -> None:
    text = '[[subscriptions]]\nname = "a"\ntopic = "x"\nstart = 1970-01-01T00:00:01Z'
    (found,) = config.load(written(text), {}).subscriptions

    assert config.start_time_ns(found.start) == 1_000_000_000


@pytest.mark.parametrize(
    "start",
    [
        "",
        "first",
        "2026-01-31",
        "2026-01-31T12:00:00",
        "1969-12-31T23:59:59Z",
        dt.date(2026, 1, 31),
        "0001-01-01T00:00:00+14:00",
        dt.datetime(2026, 1, 31, 12),  # noqa: DTZ001 - no zone: that is the point
    ],
)
def test_a_start_without_its_zone_or_before_1970_is_refused(start: object) -> None:
    assert problem(subscribed(start=start)) == (
        'subscriptions[0].start: is not a start; use "earliest", "latest" or a time since 1970 with '
        'its zone, as "2026-01-31T12:00:00Z"'
    )


# -- the environment


def test_the_environment_wins_over_the_file(written: Callable[[str], Path]) -> None:
    path = written('[grpc]\naddress = "127.0.0.1:1"\n[drain]\ntimeout_seconds = 3')
    found = config.load(path, {"SIDECAR_GRPC__ADDRESS": "127.0.0.1:2", "PATH": "/bin"})

    assert found.grpc.address == "127.0.0.1:2"
    assert found.drain.timeout_seconds == 3


def test_any_value_can_come_from_the_environment() -> None:
    """Deep keys, numbers, booleans; arrays and tables as TOML; an empty one is an empty string."""
    found = config.load(
        None,
        {
            "SIDECAR_ADMIN__ADDRESS": "",
            "SIDECAR_APP__NAME": "shop",
            "SIDECAR_LOG": '{level = "debug"}',
            "SIDECAR_PUBLISHING__FULL_WAIT_SECONDS": "0.5",
            "SIDECAR_BROKERS__WORK__TYPE": "jetstream",
            "SIDECAR_BROKERS__WORK__SERVERS": '["nats://one:4222", "nats://two:4222"]',
            "SIDECAR_BROKERS__WORK__AUTO_CREATE_STREAMS": "true",
            "SIDECAR_SUBSCRIPTIONS": '[{name = "a", topic = "x"}]',
        },
    )

    assert found.admin.address == ""
    assert (found.app.name, found.log.level) == ("shop", "debug")
    assert found.publishing.full_wait_seconds == 0.5
    work = found.brokers["work"]
    assert isinstance(work, config.JetStream)
    assert work.servers == ["nats://one:4222", "nats://two:4222"]
    assert work.auto_create_streams
    assert [s.name for s in found.subscriptions] == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "12345",
        "007",
        "1e5",
        "nan",
        "true",
        "2026-01-31",
        "[1]",
        "{a = 1}",
        "12 # 34",
        "1\nx = 2",
        "a b",
        "'",
        '"open',
        5000 * "9",
        "[[" * 3000,
        "ä€",
        " ",
    ],
)
def test_text_that_looks_like_something_else_is_taken_as_text(text: str) -> None:
    """A token is whatever somebody generated: where a string belongs, it is one."""
    environment = {
        "SIDECAR_BROKERS__WORK__TYPE": "nats",
        "SIDECAR_BROKERS__WORK__SERVERS": '["nats://one:4222"]',
        "SIDECAR_BROKERS__WORK__TOKEN": text,
        "SIDECAR_BROKERS__WORK__USER": text,
    }
    found = config.load(None, environment).brokers["work"]

    assert isinstance(found, config.Nats)
    assert found.secret("token") == text
    assert found.user == text


def test_a_quoted_text_loses_its_quotes() -> None:
    found = config.load(None, {"SIDECAR_APP__NAME": '"5"'})

    assert found.app.name == "5"


def test_a_wrong_variable_is_told_by_its_name(written: Callable[[str], Path]) -> None:
    path = written('[http]\nadres = ""\n[log]\nlevel = "info"')
    environment = {
        "SIDECAR_GRPC__ADRESS": "127.0.0.1:1",
        "SIDECAR_DRAIN__TIMEOUT_SECONDS": "soon",
        "SIDECAR_LIMITS": "{max_streams = 0}",
        "SIDECAR_NOTHING": "1",
        "SIDECAR_GPRC__ADDRESS": "127.0.0.1:1",
    }

    assert problems_from(environment, path) == [
        (
            "gprc: unknown key; did you mean 'grpc'? accepted here: app, grpc, http, admin, log, metrics, "
            "limits, publishing, drain, embedded, topics, brokers, routes, subscriptions "
            "(see SIDECAR_GPRC__ADDRESS)"
        ),
        (
            "nothing: unknown key; accepted here: app, grpc, http, admin, log, metrics, limits, "
            "publishing, drain, embedded, topics, brokers, routes, subscriptions (see SIDECAR_NOTHING)"
        ),
        (
            "grpc.adress: unknown key; did you mean 'address'? accepted here: address, unix_socket "
            "(see SIDECAR_GRPC__ADRESS)"
        ),
        "http.adres: unknown key; did you mean 'address'? accepted here: address, unix_socket",
        "limits.max_streams: must be greater than or equal to 1 (see SIDECAR_LIMITS)",
        "drain.timeout_seconds: must be a number (see SIDECAR_DRAIN__TIMEOUT_SECONDS)",
    ]


@pytest.mark.parametrize("name", ["SIDECAR_", "SIDECAR___", "SIDECAR__APP", "SIDECAR_APP__"])
def test_a_variable_without_a_key_is_told_by_its_name(name: str) -> None:
    (only,) = problems_from({name: "1"})

    assert "unknown key" in only
    assert only.endswith(f"(see {name})")


def test_a_variable_that_makes_a_table_is_told_by_what_the_table_misses() -> None:
    assert problems_from({"SIDECAR_BROKERS__WROK__TOKEN": "x"}) == [
        (
            "brokers.wrok.type: must be one of 'memory', 'nats', 'jetstream', 'kafka' "
            "(see SIDECAR_BROKERS__WROK__TOKEN)"
        )
    ]


def test_a_variable_never_reaches_into_an_array(written: Callable[[str], Path]) -> None:
    path = written('[[subscriptions]]\nname = "a"\ntopic = "x"')

    assert problems_from({"SIDECAR_SUBSCRIPTIONS__0__NAME": "b"}, path) == [
        (
            "subscriptions.0.name: is not in a table; set the array or value as a whole "
            "(see SIDECAR_SUBSCRIPTIONS__0__NAME)"
        )
    ]


def test_a_variable_finds_a_broker_however_the_file_spells_it(
    written: Callable[[str], Path],
) -> None:
    """Variables are written in capitals and, by most shells, without "-"."""
    path = written('[brokers.My-Log]\ntype = "nats"\nservers = ["nats://one"]')
    found = config.load(path, {"SIDECAR_BROKERS__MY_LOG__TOKEN": "5"}).brokers

    assert list(found) == ["My-Log"]
    (log,) = found.values()
    assert isinstance(log, config.Nats)
    assert log.secret("token") == "5"


def test_the_variables_of_the_command_line_are_no_keys() -> None:
    environment = {"SIDECAR_CONFIG": "/etc/sidecar.toml", "SIDECAR_SOCKET": "/run/x.sock"}

    assert config.load(None, environment) == config.load(None, {})


def test_what_kubernetes_says_of_a_service_named_sidecar_is_no_key() -> None:
    """Every pod beside it gets these; a sidecar that took them for keys would not start."""
    environment = {
        "SIDECAR_SERVICE_HOST": "10.0.0.1",
        "SIDECAR_SERVICE_PORT": "7400",
        "SIDECAR_SERVICE_PORT_GRPC": "7400",
        "SIDECAR_PORT": "tcp://10.0.0.1:7400",
        "SIDECAR_PORT_7400_TCP": "tcp://10.0.0.1:7400",
        "SIDECAR_PORT_7400_TCP_PROTO": "tcp",
        "SIDECAR_METRICS_PORT_7402_TCP_ADDR": "10.0.0.1",
    }
    (only,) = problems_from({**environment, "SIDECAR_GRPC_PORT": "7400"})

    assert config.load(None, environment) == config.load(None, {})
    assert only.startswith("grpc_port: unknown key")


# -- Kafka

KAFKA = {"type": "kafka", "bootstrap_servers": ["one:9092"]}


def kafka(**keys: Any) -> dict[str, Any]:
    return {"brokers": {"log": {**KAFKA, **keys}}}


def test_a_kafka_broker_needs_only_its_servers() -> None:
    """Nothing is created unless asked for, and what is sent is compressed."""
    found = config.check(kafka()).brokers["log"]
    assert isinstance(found, config.Kafka)

    assert (found.auto_create_topics, found.compression, found.group_protocol) == (
        False,
        "lz4",
        "auto",
    )


def test_kafka_keeps_dead_letters() -> None:
    data = kafka()
    data["brokers"]["fast"] = {"type": "nats", "servers": ["nats://one:4222"]}
    data["routes"] = [{"topic": "live.>", "broker": "fast"}, {"topic": ">", "broker": "log"}]
    data["subscriptions"] = [
        {"name": "a", "topic": "live.x", "dead_letter": {"broker": "log"}},
        {"name": "b", "topic": "orders.>"},
    ]

    assert len(config.check(data).subscriptions) == 2


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"bootstrap_servers": []}, "bootstrap_servers: must have at least 1 item, not 0"),
        (
            {"bootstrap_servers": ["kafka"]},
            'bootstrap_servers[0]: is not a server of Kafka; one looks like "kafka:9092"',
        ),
        (
            {"compression": "lzma"},
            "compression: must be 'none', 'gzip', 'snappy', 'lz4' or 'zstd'",
        ),
        (
            {"topic_partitions": 0},
            "topic_partitions: must not be 0; use -1 for what the broker is set to",
        ),
        (
            {"tls_ca_file": "/ca.pem"},
            "tls_ca_file: tls is false, so it would not be used; set tls = true",
        ),
        (
            {"tls": True, "tls_ca_file": "/none.pem"},
            "tls_ca_file: there is no file '/none.pem'; name one",
        ),
        (
            {"tls": True, "tls_certificate_file": __file__},
            "tls_key_file: a certificate and its key belong together; set both, or none",
        ),
        (
            {"sasl_mechanism": "PLAIN"},
            "user: PLAIN needs one; set it, or leave out sasl_mechanism",
        ),
        (
            {"user": "ann"},
            "user: sasl_mechanism is not set, so it would not be used; set both",
        ),
        (
            {"sasl_mechanism": "OAUTHBEARER", "user": "ann"},
            'oauth_token_url: goes with sasl_mechanism = "OAUTHBEARER"; set both, or none',
        ),
        (
            {"options": {"socket.nagle.disable": [1]}},
            "options: 'socket.nagle.disable' must be a string, a number, true or false",
        ),
    ],
)
def test_a_wrong_setting_of_kafka_is_told_what_is_accepted(
    keys: dict[str, Any], expected: str
) -> None:
    assert problem(kafka(**keys)) == f"brokers.log.{expected}"


def test_settings_of_librdkafka_are_passed_through() -> None:
    found = config.check(kafka(options={"socket.nagle.disable": True, "fetch.min.bytes": 1}))
    broker = found.brokers["log"]
    assert isinstance(broker, config.Kafka)

    assert broker.options == {"socket.nagle.disable": True, "fetch.min.bytes": 1}


def test_nothing_lingers_for_longer_than_a_publish_may_take() -> None:
    data = kafka(linger_seconds=2) | {"publishing": {"timeout_seconds": 2}}

    assert problem(data) == (
        "brokers.log.linger_seconds: 2 is not less than publishing.timeout_seconds, 2"
    )


def test_a_partitioner_goes_by_the_key() -> None:
    """Else the events of a key would lie in any partition, and their order be gone."""
    config.check(kafka(options={"partitioner": "consistent_random"}))

    assert problem(kafka(options={"partitioner": "random"})) == (
        "brokers.log.options: 'partitioner' must be one of consistent, consistent_random, fnv1a, "
        "fnv1a_random, murmur2, murmur2_random: an event's key decides its partition"
    )


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("acks", "a receipt says that the event is stored on all replicas that are in sync"),
        ("enable.idempotence", "events are stored once and in order"),
        ("enable.auto.commit", "an event is done when the app acked it, not before"),
        ("partition.assignment.strategy", "cooperative rebalancing"),
        ("error_cb", "callbacks are the sidecar's own"),
        ("on_delivery", "callbacks are the sidecar's own"),
        ("logger", "the sidecar's log"),
        ("default.topic.config", "name each setting by itself"),
        ("group.id", "'group.id' is set by the subscription's name; use that"),
        ("bootstrap.servers", "'bootstrap.servers' is set by bootstrap_servers; use that"),
        ("sasl.password", "'sasl.password' is set by password; use that"),
        ("message.max.bytes", "'message.max.bytes' is set by limits.max_event_bytes; use that"),
    ],
)
def test_a_setting_that_would_break_a_promise_is_refused_by_name(
    option: str, expected: str
) -> None:
    """And one that has a key of ours is sent there."""
    found = problem(kafka(options={option: "1"}))

    assert found.startswith(f"brokers.log.options: {option!r} is ")
    assert expected in found


# -- secrets


def test_a_secret_is_never_shown() -> None:
    found = config.check(broker(password="hunter2", token="hunter3"))  # noqa: S106

    for text in (repr(found), str(found), repr(found.model_dump()), found.model_dump_json()):
        assert "hunter" not in text
    assert "***" in repr(found.brokers["work"])


@pytest.mark.parametrize(
    "keys",
    [
        {"password": "hunter2", "servers": 5},
        {"password": "hunter2", "password_file": "/none"},
        {"password": ["hunter2"]},
        {"password": {"hunter": "hunter2"}},
        {"pasword": "hunter2"},
        {"type": "kafka", "password": "hunter2"},
        {"servers": ["nats://ann:hunter2@one:4222"]},
        {"servers": ["nats://hunter2@one:4222"]},
    ],
)
def test_a_secret_is_never_part_of_an_error(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        config.check(broker(**keys))

    chain: BaseException | None = caught.value
    while chain is not None:
        assert "hunter2" not in f"{chain} {chain!r}"
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)


def test_credentials_in_a_url_are_sent_to_their_own_keys() -> None:
    """URLs are shown in logs and in the status."""
    assert problem(broker(servers=["nats://ann:hunter2@one:4222"])) == (
        "brokers.work.servers[0]: holds credentials; they belong into user and password, "
        "or into token"
    )


def test_a_secret_file_is_read_again_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n", encoding="utf-8")
    found = config.check(broker(token_file=str(file))).brokers["work"]
    assert isinstance(found, config.JetStream)
    before = found.secret("token")
    file.write_text("  second\n", encoding="utf-8")
    after = found.secret("token")

    assert (before, after) == ("first", "second")
    assert found.secret("password") == ""


def test_a_secret_file_that_is_gone_later_is_told_by_its_key(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first", encoding="utf-8")
    found = config.check(broker(token_file=str(file))).brokers["work"]
    assert isinstance(found, config.JetStream)
    file.unlink()

    with pytest.raises(ConfigInvalid, match=r"^token_file: cannot read .*No such file"):
        found.secret("token")


@pytest.mark.parametrize("field", ["password", "token"])
def test_a_secret_and_its_file_are_refused_together(field: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("x", encoding="utf-8")

    assert problem(broker(**{field: "y", f"{field}_file": str(file)})) == (
        f"brokers.work.{field}_file: {field} is set as well; keep one of them"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read {path!r} (No such file or directory); name another"),
        (b" \n", "{path!r} is empty; it is to hold the secret"),
        (b"\xffhunter2", "{path!r} is not text; the secret is to be UTF-8"),
    ],
)
def test_a_secret_file_without_a_secret_is_refused(
    content: bytes | None, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    text = expected.format(path=str(file))

    assert problem(broker(token_file=str(file))) == f"brokers.work.token_file: {text}"


# -- anything at all


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The machine may be busy with other tests."""


def _known_names() -> list[str]:
    names = {name for _, model in models(Config) for name in model.model_fields}
    return sorted(
        names | set(Config.model_fields) | {"work", "memory", "nats", "jetstream", "kafka", "[key]"}
    )


_NAMES = st.sampled_from(_known_names()) | st.text(max_size=8)
_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63])
    | st.floats()
    | st.datetimes(timezones=st.none() | st.just(dt.UTC))
    | st.dates()
    | st.times()
    | st.text(max_size=8)
    | st.sampled_from(
        ["orders.>", ">", "work", "memory", "nats", "jetstream", "kafka", "earliest", "{topic}"]
    )
)
_ANYTHING = st.recursive(
    _VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=4),
    max_leaves=12,
)


def _tables(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Tables that look right: the keys *names*, with anything for values."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, _ANYTHING))


_PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "grpc": _tables("address", "unix_socket"),
        "limits": _tables("max_event_bytes", "max_batch_bytes"),
        "brokers": st.dictionaries(
            st.sampled_from(["work", "fast", "a b"]),
            _tables(
                "type", "servers", "embedded", "streams", "token", "bootstrap_servers", "options"
            )
            | _ANYTHING,
        ),
        "routes": st.lists(_tables("topic", "event_type", "broker") | _ANYTHING, max_size=3),
        "subscriptions": st.lists(
            _tables("name", "topic", "broker", "start", "retry", "dead_letter") | _ANYTHING,
            max_size=3,
        ),
    },
)


@unhurried
@given(st.dictionaries(_NAMES, _ANYTHING, max_size=5) | _PLAUSIBLE)
def test_whatever_is_configured_the_answer_is_a_config_or_its_problems(
    data: dict[str, Any],
) -> None:
    """No input ends in another exception, and each problem is one that can be read."""
    found = answer(lambda: config.check(data))

    if isinstance(found, Config):
        assert found.brokers
        assert found.routes
    else:
        assert found
        assert all(found)


@unhurried
@given(
    st.dictionaries(
        st.lists(_NAMES, min_size=1, max_size=4).map(lambda p: "SIDECAR_" + "__".join(p).upper()),
        st.text(max_size=12) | st.sampled_from(["5", "true", "[1]", '{type = "nats"}', "nats"]),
        max_size=4,
    )
)
def test_whatever_the_environment_says_the_answer_is_a_config_or_its_problems(
    environment: dict[str, str],
) -> None:
    """Whatever is wrong in an environment comes from one of its variables."""
    found = answer(lambda: config.load(None, environment))

    assert isinstance(found, Config) or any("(see SIDECAR_" in line for line in found)
