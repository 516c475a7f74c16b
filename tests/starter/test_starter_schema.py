"""The real starter model held to schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from benchmarks.schemas import CASES, Case
from edgeinfer.client import Client, LocalClient, Message, OpenOptions, Request
from edgeinfer.constraint import Constraint, check_constraint
from edgeinfer.sampling import SamplingParams

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def client(starter: Path) -> Iterator[Client]:
    with LocalClient(OpenOptions(model=str(starter), context=1024, sequences=2)) as client:
        client.load()
        yield client


def asked(case: Case, seed: int, max_tokens: int = 120) -> Request:
    constraint = Constraint("json_schema", json.dumps(case.schema))
    check_constraint(constraint)
    return Request(
        messages=(Message("user", case.question),),
        sampling=SamplingParams(seed=seed),
        max_tokens=max_tokens,
        constraint=constraint,
    )


def test_each_schema_is_answered_whole_and_valid(client: Client) -> None:
    running = [(case, client.start(asked(case, seed))) for seed, case in enumerate(CASES)]
    for case, generation in running:
        stats = generation.result().stats
        assert stats.finish_reason == "stop", (case.name, stats.text)
        assert stats.usage.completion_tokens <= 120
        jsonschema.validate(json.loads(stats.text), case.schema)


def test_the_same_seed_gives_the_same_answer(client: Client) -> None:
    first, second = (client.start(asked(CASES[0], 7)).result().stats.text for _ in range(2))
    assert first == second


def test_any_json_object_and_a_pattern(client: Client) -> None:
    request = Request(prompt="{", constraint=Constraint("json_object"), max_tokens=60)
    assert isinstance(json.loads(client.start(request).result().stats.text), dict)
    request = Request(
        prompt="The year is ", constraint=Constraint("regex", "(19|20)[0-9]{2}"), max_tokens=20
    )
    assert 1900 <= int(client.start(request).result().stats.text) < 2100


def test_a_schema_that_cannot_be_held_fails_the_request_and_nothing_else(client: Client) -> None:
    wrong = Request(prompt="x", constraint=Constraint("json_schema", '{"not": {}}'))
    events = list(client.start(wrong).events())
    assert (events[-1].outcome, events[-1].error_type) == ("failed", "ConstraintInvalid")  # type: ignore[union-attr]
    right = Request(prompt="x", constraint=Constraint("json_schema", '{"const": 5}'))
    assert client.start(right).result().stats.text == "5"
