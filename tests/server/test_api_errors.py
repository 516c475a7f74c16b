"""Which status and words an error becomes."""

from __future__ import annotations

from typing import get_args

import pytest

from edgeinfer.errors import (
    BackendUnavailable,
    ConstraintInvalid,
    DownloadFailed,
    EdgeInferError,
    HubUnreachable,
    LoadFailed,
    ModelNotFound,
    ModelTooLarge,
    PromptTooLong,
    RequestFailed,
    TemplateError,
    UsageError,
    WorkerDied,
)
from edgeinfer.server.errors import STATUS_OF, ApiError, ErrorType, as_api_error, error_body


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (PromptTooLong(5000, 4096), 400, "exceed_context_size_error", "context_length_exceeded"),
        (UsageError("x"), 400, "invalid_request_error", None),
        (ConstraintInvalid("x"), 400, "invalid_request_error", "unsupported_schema"),
        (BackendUnavailable("x"), 400, "invalid_request_error", "unsupported_by_backend"),
        (TemplateError("x"), 400, "invalid_request_error", "template_error"),
        (ModelNotFound("x"), 404, "not_found_error", "model_not_found"),
        (ModelTooLarge("x"), 507, "server_error", "model_too_large"),
        (HubUnreachable("x"), 503, "server_error", "hub_unreachable"),
        (WorkerDied("x"), 503, "server_error", "worker_died"),
        (DownloadFailed("x"), 500, "server_error", None),
        (LoadFailed("x"), 500, "server_error", None),
        (RequestFailed("x"), 500, "server_error", None),
        (EdgeInferError("x"), 500, "server_error", None),
    ],
)
def test_an_error_is_answered_by_its_class(
    error: EdgeInferError, status: int, kind: str, code: str | None
) -> None:
    answer = as_api_error(error)
    assert answer.status == status
    expected = {"message": str(error), "type": kind, "param": None, "code": code}
    assert answer.body == {"error": expected}


def test_a_subclass_of_a_known_error_is_answered_like_it() -> None:
    class BadSchema(UsageError):
        pass

    assert as_api_error(BadSchema("x")).status == 400


def test_a_dead_worker_is_worth_another_try_and_a_model_too_large_is_not() -> None:
    assert as_api_error(WorkerDied("x")).headers == {"retry-after": "1"}
    assert as_api_error(ModelTooLarge("x")).headers == {"x-should-retry": "false"}


def test_an_api_error_is_itself() -> None:
    error = ApiError(429, "wait", "rate_limit_error", headers={"retry-after": "3"})
    assert as_api_error(error) is error


def test_every_type_is_of_the_vocabulary() -> None:
    assert {mapped.type for mapped in STATUS_OF.values()} <= set(get_args(ErrorType))


def test_a_message_is_one_bounded_line() -> None:
    body = error_body("a\r\nb\x1b[31m" + "c" * 5000, "server_error")
    error = body["error"]
    assert isinstance(error, dict)
    assert error["message"].startswith("a b [31mc")
    assert len(error["message"]) <= 600
