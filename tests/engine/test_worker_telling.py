"""What the worker tells together: each write wakes the owner, on a core that a step may need."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeinfer.backend import RuntimeSettings
from edgeinfer.engine.process import EngineProcess, LoadCommand
from edgeinfer.engine.request import Ended, Event, Request, Started, Text
from edgeinfer_models.model_files import ModelFiles

Batches = list[list[Event]]


class Recorder:
    """A worker with a scripted model, and what it told in one piece each time."""

    def __init__(self, script: Path) -> None:
        self.batches: Batches = []
        self._ended = threading.Event()
        self.process = EngineProcess(self._keep, lambda key, error: None, lambda error: None)
        files = ModelFiles("script", (script,), "scripted")
        self.process.load(LoadCommand("scripted", files, RuntimeSettings(context=2048)))

    def _keep(self, told: list[tuple[int, Event]]) -> None:
        self.batches.append([event for _, event in told])
        if any(isinstance(event, Ended) for _, event in told):
            self._ended.set()

    def ask(self, key: int, prompt_tokens: int) -> Batches:
        """What was told of one request."""
        self.batches, self._ended = [], threading.Event()
        self.process.submit(key, Request(tokens=(96 + key,) * prompt_tokens, max_tokens=3))
        assert self._ended.wait(60)
        return self.batches


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    script = tmp_path / "slow.script.json"
    script.write_text('{"step_s": 0.1}')
    recorder = Recorder(script)
    yield recorder
    recorder.process.close()


def batch_with(batches: Batches, kind: type[Event]) -> int:
    return next(i for i, batch in enumerate(batches) if any(isinstance(e, kind) for e in batch))


def test_the_turn_of_a_prompt_that_is_soon_read_is_told_with_its_first_token(
    recorder: Recorder,
) -> None:
    unknown = recorder.ask(1, 300)  # nothing tells how long it takes
    assert batch_with(unknown, Started) < batch_with(unknown, Text)
    short = recorder.ask(2, 100)
    assert batch_with(short, Started) == batch_with(short, Text)
    long = recorder.ask(3, 1800)  # at 0.1 s for 300: 0.6 s
    assert batch_with(long, Started) < batch_with(long, Text)
