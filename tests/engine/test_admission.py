"""Who has a slot next, what is read once for several, and embeddings beside answers."""

from __future__ import annotations

import math

import pytest

from edgeinfer.engine.request import Embedded, Prefilled, Started, Text
from edgeinfer_backends.scripted import Script
from tests.engine.test_engine import Driver, alone, asked, make_engine, tokens_of


def started(driver: Driver) -> list[int]:
    return [key for key, events in driver.events.items() if any(isinstance(e, Started) for e in events)]


# -- fairness --------------------------------------------------------------------------------------


def test_who_asks_little_does_not_wait_behind_who_asks_much() -> None:
    driver = Driver(make_engine(sequences=1))
    for key in range(1, 5):
        driver.submit(key, asked(tokens_of(key, 20), 30, asked_by="many"))
    driver.step()
    for key in (7, 8):
        driver.submit(key, asked(tokens_of(key, 20), 30, asked_by="few"))
    order: list[int] = []
    while driver.engine.has_work:
        driver.step()
        order += [key for key in started(driver) if key not in order]
    assert order == [1, 7, 2, 8, 3, 4]


def test_slots_are_shared_evenly_between_those_who_ask() -> None:
    driver = Driver(make_engine(sequences=4))
    for key in range(1, 7):
        driver.submit(key, asked(tokens_of(key, 20), 30, asked_by="many"))
    driver.submit(7, asked(tokens_of(7, 20), 30, asked_by="one"))
    driver.step()
    assert started(driver) == [1, 2, 3, 7]


def test_requests_of_one_asker_keep_their_order() -> None:
    driver = Driver(make_engine(sequences=1))
    for key in (5, 3, 9):
        driver.submit(key, asked(tokens_of(key, 20), 3))
    order: list[int] = []
    while driver.engine.has_work:
        driver.step()
        order += [key for key in started(driver) if key not in order]
    assert order == [5, 3, 9]


# -- one prompt for several ------------------------------------------------------------------------


def test_several_answers_to_one_prompt_read_it_once() -> None:
    prompt = tokens_of(1, 600)
    driver = Driver(make_engine(sequences=4))
    for key in range(4):
        driver.submit(key, asked(prompt, 6))
    driver.run()
    prefilled = [
        driver.stats(k).usage.prompt_tokens - driver.stats(k).usage.cached_tokens for k in range(4)
    ]
    assert prefilled[0] == 600
    assert max(prefilled[1:]) < 100
    assert {driver.answer(k) for k in range(4)} == {alone(prompt, 6)}


def test_a_common_beginning_is_read_once() -> None:
    system = tokens_of(1, 400)
    driver = Driver(make_engine(sequences=3))
    for key in range(3):
        driver.submit(key, asked([*system, *tokens_of(10 + key, 40)], 6))
    driver.run()
    assert all(driver.stats(key).usage.cached_tokens >= 320 for key in (1, 2))
    for key in range(3):
        assert driver.answer(key) == alone([*system, *tokens_of(10 + key, 40)], 6)


def test_waiting_for_a_reader_ends_when_it_is_cancelled() -> None:
    prompt = tokens_of(1, 900)
    driver = Driver(make_engine(sequences=2))
    driver.submit(1, asked(prompt, 6))
    driver.step()
    driver.submit(2, asked(prompt, 6))
    driver.step()
    assert started(driver) == [1]
    driver.cancel(1)
    driver.run()
    assert driver.answer(2) == alone(prompt, 6)


def test_somebody_else_takes_the_slot_meanwhile() -> None:
    prompt = tokens_of(1, 900)
    driver = Driver(make_engine(sequences=2))
    driver.submit(1, asked(prompt, 6))
    driver.step()
    driver.submit(2, asked(prompt, 6))
    driver.submit(3, asked(tokens_of(3, 30), 40))
    driver.step()
    assert started(driver) == [1, 3]
    driver.run()
    assert driver.answer(3) == alone(tokens_of(3, 30), 40)


# -- embeddings ------------------------------------------------------------------------------------


def vector_of(driver: Driver, key: int) -> tuple[float, ...]:
    (found,) = [event.vector for event in driver.events[key] if isinstance(event, Embedded)]
    return found


def test_an_embedding_has_length_one_and_depends_on_the_text_only() -> None:
    text = tokens_of(1, 300)
    driver = Driver(make_engine())
    driver.submit(1, asked(text, embedding=True))
    driver.run()
    assert driver.stats(1).usage.prompt_tokens == 300
    assert driver.stats(1).usage.completion_tokens == 0
    vector = vector_of(driver, 1)
    assert math.sqrt(sum(x * x for x in vector)) == pytest.approx(1.0)

    beside = Driver(make_engine(sequences=3))
    beside.submit(1, asked(tokens_of(2, 100), 20))
    beside.submit(2, asked(text, embedding=True))
    beside.submit(3, asked(tokens_of(3, 100), embedding=True))
    beside.run()
    assert vector_of(beside, 2) == pytest.approx(vector)
    assert vector_of(beside, 3) != pytest.approx(vector)
    assert beside.answer(1) == alone(tokens_of(2, 100), 20)


def test_pieces_of_a_long_text_and_tokens_of_an_answer_take_turns() -> None:
    driver = Driver(make_engine(sequences=2))
    driver.submit(1, asked(tokens_of(1, 10), 200))
    while not any(isinstance(event, Text) for event in driver.events[1]):
        driver.step()
    driver.submit(2, asked(tokens_of(2, 1000), embedding=True))
    waits, wait = [], 0
    while not any(isinstance(event, Embedded) for event in driver.events[2]):
        before = sum(isinstance(event, Text) for event in driver.events[1])
        driver.step()
        if sum(isinstance(event, Text) for event in driver.events[1]) > before:
            waits.append(wait)
            wait = 0
        else:
            wait += 1
    assert sum(isinstance(event, Prefilled) for event in driver.events[2]) >= 3
    assert max(waits) <= 2


def test_a_cancelled_embedding_frees_its_slot() -> None:
    driver = Driver(make_engine(sequences=1))
    driver.submit(1, asked(tokens_of(1, 1000), embedding=True))
    driver.step()
    driver.step()
    driver.cancel(1)
    driver.submit(2, asked(tokens_of(2, 50), 5))
    driver.run()
    assert driver.end(1).outcome == "cancelled"
    assert driver.answer(2) == alone(tokens_of(2, 50), 5)


def test_a_backend_without_embeddings_says_so() -> None:
    driver = Driver(make_engine(Script(without=("embeddings",))))
    driver.submit(1, asked(tokens_of(1, 10), embedding=True))
    assert driver.end(1).outcome == "failed"
    assert "embeddings" in driver.end(1).error
