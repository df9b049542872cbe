"""Which events a subscription wants: the dialects of the CloudEvents Subscriptions API."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sidecar import config
from sidecar.config import Filter
from sidecar.delivery.filters import wanted
from sidecar.errors import ConfigInvalid
from sidecar.event import Event

EVENT = Event(
    id="1",
    source="/shop/1",
    type="orders.created",
    time_ns=1_000_000_000,
    key="customer 7",
    subject="order 9",
    content_type="application/json",
    extensions={"region": "eu", "empty": ""},
)


def passes(*filters: dict[str, Any], types: tuple[str, ...] = ()) -> bool:
    wants = wanted(types, [Filter.model_validate(one) for one in filters])
    return wants is None or wants(EVENT)


@pytest.mark.parametrize(
    ("condition", "passed"),
    [
        ({"exact": {"type": "orders.created"}}, True),
        ({"exact": {"type": "Orders.created"}}, False),
        ({"exact": {"type": "orders.created", "region": "eu"}}, True),
        ({"exact": {"type": "orders.created", "region": "us"}}, False),
        ({"exact": {"missing": ""}}, False),
        ({"prefix": {"empty": ""}}, False),
        ({"prefix": {"source": "/shop/"}}, True),
        ({"prefix": {"subject": "9"}}, False),
        ({"suffix": {"subject": "9"}}, True),
        ({"suffix": {"subject": "order"}}, False),
        ({"exact": {"id": "1"}}, True),
        ({"exact": {"partitionkey": "customer 7"}}, True),
        ({"exact": {"time": "1970-01-01T00:00:01Z"}}, True),
        ({"exact": {"specversion": "1.0"}}, True),
        ({"exact": {"datacontenttype": "application/json"}}, True),
        ({"exact": {"dataschema": "x"}}, False),
        ({"not": {"exact": {"region": "us"}}}, True),
        ({"not": {"exact": {"missing": "x"}}}, True),
        ({"all": [{"exact": {"region": "eu"}}, {"prefix": {"type": "orders"}}]}, True),
        ({"all": [{"exact": {"region": "eu"}}, {"prefix": {"type": "users"}}]}, False),
        ({"any": [{"exact": {"region": "us"}}, {"prefix": {"type": "orders"}}]}, True),
        ({"any": [{"exact": {"region": "us"}}, {"prefix": {"type": "users"}}]}, False),
        ({"not": {"any": [{"not": {"exact": {"region": "eu"}}}]}}, True),
    ],
)
def test_each_dialect_means_what_its_specification_says(
    condition: dict[str, Any],
    passed: bool,  # noqa: FBT001
) -> None:
    assert passes(condition) is passed


def test_all_filters_and_one_of_the_types_must_match() -> None:
    eu, us = {"exact": {"region": "eu"}}, {"exact": {"region": "us"}}

    assert passes()
    assert passes(eu, types=("users.>", "orders.*"))
    assert not passes(eu, types=("users.>",))
    assert not passes(eu, us)


CONDITIONS = st.recursive(
    st.sampled_from([{"exact": {"region": "eu"}}, {"exact": {"region": "us"}}]),
    lambda inner: (
        st.builds(lambda one: {"not": one}, inner)
        | st.builds(
            lambda dialect, some: {dialect: some},
            st.sampled_from(["all", "any"]),
            st.lists(inner, min_size=1, max_size=3),
        )
    ),
)


@given(CONDITIONS)
def test_not_turns_every_condition_around(condition: dict[str, Any]) -> None:
    assert passes({"not": condition}) is not passes(condition)


@given(st.lists(CONDITIONS, min_size=1, max_size=3))
def test_de_morgan_holds(conditions: list[dict[str, Any]]) -> None:
    negated = [{"not": one} for one in conditions]

    assert passes({"not": {"all": conditions}}) is passes({"any": negated})


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ({}, "filters[0]: a filter is one of exact, prefix, suffix, all, any and not"),
        (
            {"exact": {"type": "a"}, "prefix": {"type": "a"}},
            "filters[0]: a filter is one of exact, prefix, suffix, all, any and not",
        ),
        ({"exakt": {"type": "a"}}, "filters[0].exakt: unknown key; did you mean 'exact'?"),
        ({"not": {"exact": {}}}, "filters[0].not.exact"),
        ({"all": []}, "filters[0].all"),
        ({"exact": {"Type": "a"}}, "filters[0].exact.Type"),
    ],
)
def test_what_is_no_filter_is_told_with_its_place(condition: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        config.check_subscription({"name": "a", "topic": "b", "filters": [condition]})

    assert any(problem.startswith(told) for problem in caught.value.problems), caught.value.problems
