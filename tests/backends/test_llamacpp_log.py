"""What of llama.cpp's log is kept as a reason."""

from __future__ import annotations

import pytest

from edgeinfer_backends.llamacpp.library import NativeLog

ERROR = 4  # enum ggml_log_level


@pytest.mark.parametrize(
    "line",
    [
        b"graph_compute: ggml_backend_sched_graph_compute_async failed with error 1\n",
        b"process_ubatch: failed to compute graph, compute status: 1\n",
    ],
)
def test_a_step_that_was_interrupted_is_no_error(line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    kept = NativeLog()
    with caplog.at_level("INFO"):
        kept.receive(ERROR, line, None)
    assert kept.reason() == ""
    assert caplog.records == []


def test_a_step_that_failed_is_an_error() -> None:
    kept = NativeLog()
    kept.receive(ERROR, b"process_ubatch: failed to compute graph, compute status: -1\n", None)
    assert kept.reason().endswith("compute status: -1")
