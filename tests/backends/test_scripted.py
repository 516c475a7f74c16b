"""The scripted backend beyond the contract: pinned answers, delays, failures, its file format."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer.errors import (
    LoadFailed,
    OutOfCells,
    SnapshotRejected,
    StepAborted,
    StepFailed,
    UnsupportedModel,
)
from edgeinfer.registry import get_backend
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.scripted import (
    SCRIPTED_FILES,
    ByteTokenizer,
    Script,
    ScriptedBackend,
    ScriptedRuntime,
)
from edgeinfer_models.model_files import ModelFiles

SMALL = RuntimeSettings(context=256, sequences=2)


def load(script: Script | None = None, settings: RuntimeSettings = SMALL) -> ScriptedRuntime:
    return ScriptedBackend(script).load(SCRIPTED_FILES, settings, lambda done: True)


def chat(*turns: tuple[str, str]) -> str:
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def answer(runtime: ScriptedRuntime, prompt: str, most: int = 60) -> str:
    """What greedy decoding says, up to the end of turn."""
    tokenizer = runtime.tokenizer
    tokens = tokenizer.encode(prompt, add_special=True, parse_special=True)
    sequence = runtime.open()
    said: list[int] = []
    while len(said) < most:
        row = runtime.forward(Step([SequenceStep(sequence, tokens)])).starts[0]
        token = int(runtime.logits(row).argmax())
        if tokenizer.is_end(token):
            break
        said.append(token)
        tokens = [token]
    runtime.free(sequence)
    return tokenizer.decode(said)


# -- answers ---------------------------------------------------------------------------------------


def test_a_prompt_gets_its_pinned_answer() -> None:
    runtime = load(Script(answers={"Hello": "Hi there 😀, the world.", "Bye": "See you."}))
    assert answer(runtime, "Hello") == "Hi there 😀, the world."
    assert answer(runtime, chat(("user", "Hello"))) == "Hi there 😀, the world."
    assert answer(runtime, chat(("system", "Be kind."), ("user", "Bye"))) == "See you."


def test_a_chat_is_answered_by_its_last_message() -> None:
    runtime = load(Script(answers={"one": "1", "two": "2", "*": "?"}))
    assert answer(runtime, chat(("user", "one"), ("assistant", "1"), ("user", "two"))) == "2"
    assert answer(runtime, chat(("user", "one"), ("assistant", "1"), ("user", "three"))) == "?"


def test_a_function_can_answer() -> None:
    runtime = load(Script(respond=lambda prompt: str(prompt.count("<|im_start|>user"))))
    assert answer(runtime, chat(("user", "a"))) == "1"
    assert answer(runtime, chat(("user", "a"), ("assistant", "1"), ("user", "b"))) == "2"


def test_a_function_of_the_tokens_can_answer() -> None:
    alphabet = Script(next_token=lambda history: history[-1] + 1 if history[-1] < ord("z") else None)
    assert answer(load(alphabet), "w", most=3) == "xyz"


def test_a_pinned_answer_survives_sampling() -> None:
    runtime = load(Script(answers={"Hello": "Hi."}))
    sequence = runtime.open()
    tokens = runtime.tokenizer.encode("Hello", add_special=False, parse_special=False)
    row = runtime.forward(Step([SequenceStep(sequence, tokens)])).starts[0]
    for seed in range(50):
        assert runtime.sample(row, runtime.create_sampler(SamplingParams(), seed)) == ord("H")


def test_what_is_not_pinned_is_printable_and_follows_from_the_prompt() -> None:
    texts = {answer(load(), f"prompt {n}") for n in range(5)}
    assert len(texts) == 5
    assert all(text.isascii() and text.isprintable() for text in texts)
    assert answer(load(), "prompt 0") in texts
    assert answer(load(Script(seed=1)), "prompt 0") not in texts


def test_an_answer_goes_wrong_when_its_history_does() -> None:
    """What an engine bug would do: a token twice, a token missing, one from another text."""
    runtime = load(Script(answers={"Hello": "Hi, you."}))
    tokens = runtime.tokenizer.encode("HelloHi", add_special=False, parse_special=False)

    def follows(history: list[int]) -> int:
        row = runtime.forward(Step([SequenceStep(runtime.open(), history)])).starts[0]
        return int(runtime.logits(row).argmax())

    assert follows(tokens) == ord(",")
    for wrong in ([*tokens, tokens[-1]], tokens[:-2] + tokens[-1:], [1, *tokens]):
        assert follows(wrong) != ord(",")


# -- time and failures -----------------------------------------------------------------------------


def test_a_step_takes_its_time_and_can_be_aborted() -> None:
    runtime = load(Script(step_s=30.0))
    sequence = runtime.open()
    timer = threading.Timer(0.05, runtime.abort)
    timer.start()
    began = time.monotonic()
    with pytest.raises(StepAborted):
        runtime.forward(Step([SequenceStep(sequence, [1, 2, 3])]))
    timer.join()
    assert time.monotonic() - began < 20
    assert runtime.length(sequence) == 0
    runtime.check_integrity()


def test_an_abort_with_no_step_running_has_no_effect() -> None:
    runtime = load(Script(step_s=0.001))
    sequence = runtime.open()
    runtime.abort()
    runtime.forward(Step([SequenceStep(sequence, [1])]))
    assert runtime.length(sequence) == 1


def test_the_scripted_step_fails_once_and_keeps_nothing() -> None:
    runtime = load(Script(fail_at_step=2))
    sequence = runtime.open()
    runtime.forward(Step([SequenceStep(sequence, [1])]))
    with pytest.raises(StepFailed, match="step 2"):
        runtime.forward(Step([SequenceStep(sequence, [2])]))
    assert runtime.length(sequence) == 1
    runtime.forward(Step([SequenceStep(sequence, [2])]))


def _step_to_death(path: Path) -> None:
    files = ModelFiles("doomed", (path,), "scripted")
    runtime = ScriptedBackend().load(files, SMALL, lambda done: True)
    sequence = runtime.open()
    for _ in range(10):
        runtime.forward(Step([SequenceStep(sequence, [1])]))


def test_a_scripted_death_ends_the_process(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text(json.dumps({"die_at_step": 3}))
    process = multiprocessing.get_context("spawn").Process(target=_step_to_death, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9


def test_loading_reports_progress_fails_and_is_cancelled() -> None:
    seen: list[float] = []
    backend = ScriptedBackend(Script(load_steps=5))

    def progress(done: float) -> bool:
        seen.append(done)
        return True

    backend.load(SCRIPTED_FILES, SMALL, progress)
    assert seen == [0.2, 0.4, 0.6, 0.8, 1.0]
    with pytest.raises(LoadFailed, match="cancelled"):
        backend.load(SCRIPTED_FILES, SMALL, lambda done: done < 0.5)
    with pytest.raises(LoadFailed, match="no luck today"):
        load(Script(load_error="no luck today"))
    with pytest.raises(UnsupportedModel):
        backend.load(ModelFiles("x", (), "gguf"), SMALL, lambda done: True)


@pytest.mark.parametrize("name", ["context", "sequences", "step_tokens", "logit_rows"])
def test_impossible_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        load(settings=replace(SMALL, **dict[str, Any]({name: 0})))


# -- the cache -------------------------------------------------------------------------------------


def test_a_sequence_cannot_outgrow_its_context() -> None:
    runtime = load()
    sequence = runtime.open()
    runtime.forward(Step([SequenceStep(sequence, [1] * 256)]))
    with pytest.raises(OutOfCells, match="context of 256"):
        runtime.forward(Step([SequenceStep(sequence, [1])]))
    assert runtime.free_cells() == 256


def test_every_flipped_byte_of_a_snapshot_is_noticed() -> None:
    runtime = load()
    sequence, target = runtime.open(), runtime.open()
    runtime.forward(Step([SequenceStep(sequence, list(range(20)))]))
    payload = runtime.snapshot(sequence, 0, 20)
    for at in range(len(payload)):
        with pytest.raises(SnapshotRejected):
            runtime.restore(target, payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :], 20)
    for end in range(len(payload)):
        with pytest.raises(SnapshotRejected):
            runtime.restore(target, payload[:end], 20)
    runtime.restore(target, payload, 20)


@pytest.mark.parametrize(
    ("script", "settings"),
    [(Script(seed=1), SMALL), (Script(), RuntimeSettings(context=256, sequences=2, kv_type_v="q8_0"))],
)
def test_a_snapshot_of_another_identity_is_refused(script: Script, settings: RuntimeSettings) -> None:
    ours, theirs = load(), load(script, settings)
    sequence = ours.open()
    ours.forward(Step([SequenceStep(sequence, [1, 2])]))
    with pytest.raises(SnapshotRejected, match="another script"):
        theirs.restore(theirs.open(), ours.snapshot(sequence, 0, 2), 2)


def test_cells_go_out_of_order_when_the_table_wraps() -> None:
    """An idle neighbour above, freed cells below: the next ones lie before those that are kept."""
    predictions = []
    for noise in (0.0, 0.5):
        runtime = load(Script(order_noise=noise), RuntimeSettings(context=256, sequences=1))
        low, high = runtime.open(), runtime.open()
        for sequence in (low, high):
            runtime.forward(Step([SequenceStep(sequence, [7] * 128)]))
        runtime.free(low)
        assert runtime.is_in_order(high)
        row = runtime.forward(Step([SequenceStep(high, [8])])).starts[0]
        assert not runtime.is_in_order(high)
        runtime.check_integrity()
        predictions.append(runtime.logits(row))
    gap = np.abs(predictions[0] - predictions[1])
    assert 0 < gap.max() <= 0.5 + 1e-5


def test_integrity_notices_a_cell_that_changed_hands() -> None:
    runtime = load()
    one, other = runtime.open(), runtime.open()
    for sequence in (one, other):
        runtime.forward(Step([SequenceStep(sequence, [1, 2])]))
    runtime._cells._sequences[one][0] = runtime._cells._sequences[other][0]
    with pytest.raises(AssertionError):
        runtime.check_integrity()


@pytest.mark.parametrize(
    "name", ["evict", "snapshot", "fork", "rewind", "embeddings", "abort", "token_masks"]
)
def test_a_script_can_do_without_a_capability(name: str) -> None:
    runtime = load(Script(without=(name,)))
    sequence = runtime.open()
    row = runtime.forward(Step([SequenceStep(sequence, [1, 2, 3])])).starts[0]
    assert not getattr(runtime.facts.can, name)
    calls: dict[str, Any] = {
        "evict": lambda: runtime.evict(sequence, 0, 1),
        "snapshot": lambda: runtime.snapshot(sequence, 0, 1),
        "fork": lambda: runtime.fork(sequence, 1),
        "rewind": lambda: runtime.rewind(sequence, 1),
        "embeddings": lambda: runtime.embed(sequence, [1]),
        "abort": runtime.abort,
        "token_masks": lambda: runtime.sample(
            row, runtime.create_sampler(SamplingParams(), 1), b"\xff" * 50
        ),
    }
    with pytest.raises(NotImplementedError, match=name):
        calls[name]()
    assert runtime.length(sequence) == 3


# -- the file --------------------------------------------------------------------------------------


def from_file(path: Path, content: object) -> ScriptedRuntime:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    files = ModelFiles(name="test", paths=(path,), format="scripted")
    runtime = get_backend("scripted").load(files, SMALL, lambda done: True)
    assert isinstance(runtime, ScriptedRuntime)
    return runtime


def test_a_script_is_read_from_a_file(tmp_path: Path) -> None:
    everything = {
        "answers": {"Hello": "Hi.", "*": "What?"},
        "prompt_end": "<|im_start|>assistant\n",
        "seed": 3,
        "step_s": 0,
        "fail_at_step": 1000,
        "die_at_step": 1001,
        "load_steps": 1,
        "load_s": 0.001,
        "load_error": "",
        "kv_layout": "private",
        "without": ["abort"],
        "order_noise": 0.5,
    }
    runtime = from_file(tmp_path / "script.json", everything)
    assert answer(runtime, chat(("user", "Hello"))) == "Hi."
    assert answer(runtime, chat(("user", "Goodbye"))) == "What?"
    assert runtime.facts.kv_layout == "private"
    assert not runtime.facts.can.abort
    assert runtime.identity()["weights"] == "3"
    assert from_file(tmp_path / "empty.json", {}).identity()["weights"] == "0"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ("[1]", "JSON object"),
        ({"answer": {}}, "no key 'answer'"),
        ({"respond": "x"}, "no key 'respond'"),
        ({"seed": "1"}, "'seed'"),
        ({"seed": True}, "'seed'"),
        ({"answers": {"a": 1}}, "'answers'"),
        ({"without": ["flight"]}, "flight"),
        ({"without": [1]}, "'without'"),
        ({"step_s": -1}, "step_s"),
        ({"fail_at_step": 0}, "fail_at_step"),
        ({"kv_layout": "round"}, "round"),
        ({"prompt_end": ""}, "prompt_end"),
        ({"load_error": "broken"}, "broken"),
    ],
)
def test_a_wrong_script_is_one_clear_line(tmp_path: Path, content: object, says: str) -> None:
    with pytest.raises(LoadFailed, match=says):
        from_file(tmp_path / "script.json", content)


# -- the tokenizer ---------------------------------------------------------------------------------


def test_a_smiley_is_two_tokens_that_are_no_characters() -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode("😀", add_special=False, parse_special=False)
    assert len(tokens) == 2
    assert [tokenizer.text(token) for token in tokens] == ["\ufffd", "\ufffd"]
    assert tokenizer.decode(tokens) == "😀"


def test_the_longest_piece_is_taken() -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode("hello world", add_special=True, parse_special=False)
    assert [tokenizer.text(token) for token in tokens] == ["<|bos|>", "hello", " world"]


def test_lone_surrogates_do_not_crash_the_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode("a\ud800b", add_special=False, parse_special=True)
    assert tokenizer.decode(tokens) == "a?b"
