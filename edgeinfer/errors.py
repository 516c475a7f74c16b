"""Everything a user can be told went wrong.

    EdgeInferError
    ├── UsageError                an option or argument that cannot be right (exit code 2)
    ├── ConfigInvalid             the configuration file (edgeinfer/config.py)
    ├── OutputFailed              stdout cannot be written (edgeinfer/cli/output.py)
    ├── ModelError
    │   ├── ModelNotFound         no such name, file or folder
    │   ├── ModelFileInvalid      truncated, wrong magic, lying header, not a model at all
    │   ├── UnsupportedModel      an architecture, tensor type or feature this build cannot run
    │   ├── ModelTooLarge         does not fit into memory; carries the arithmetic
    │   ├── DownloadFailed        network, registry or disk refused
    │   │   └── HubUnreachable    no network, or offline mode: nothing could be asked
    │   ├── ChecksumMismatch      the bytes are not the published ones
    │   └── ConversionFailed      the disk refused what a backend needs of it, or it may not be made here
    ├── TemplateError             a chat template raised, looped or broke its sandbox
    ├── ToolsInvalid              a request's tools or tool_choice cannot be right
    ├── PromptTooLong             carries both numbers
    ├── ContextFull               an answer reached the end of the context, where that is an error
    ├── ConstraintInvalid         a schema or grammar that answers cannot be held to; carries the keyword
    ├── BackendError
    │   ├── BackendUnavailable    not installed or not usable here, with the reason
    │   ├── LoadFailed            the framework refused the model
    │   ├── StepFailed            a forward pass failed
    │   │   └── StepAborted       a forward pass was interrupted on request; nothing was kept
    │   ├── OutOfCells            the KV cache has no room for the step
    │   ├── SharedCells           the operation would change another sequence's cells
    │   └── SnapshotRejected      a KV snapshot is not for this runtime, or is damaged
    ├── MeasureFailed             a benchmark's figure would not be what it says
    ├── QualityTooLow             a file that lost more than was allowed, and was not kept
    ├── ExtraMissing              an optional package is not installed; says how to get it
    ├── EndpointFailed            an HTTP endpoint answered with what it should not
    │   └── EndpointUnreachable   nobody answers there, or no longer
    ├── WorkerDied                the process that held the model ended; carries how
    └── RequestFailed             a request ended `failed`; carries the reason

Every message is one line that says what happened, where, and what to do next.
"""

from __future__ import annotations

import re


class EdgeInferError(Exception):
    """Base of all errors meant for a user's eyes. `str(error)` is one line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        # One line by construction: a path or a foreign message may carry newlines or control codes.
        super().__init__(one_line(message))

    @property
    def type(self) -> str:
        """The class name in snake_case, as it appears in `{"error": {"type": …}}`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.__class__.__name__).lower()


def one_line(text: str, limit: int = 600) -> str:
    """Foreign text made safe for one terminal line: control characters gone, length bounded."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    flat = " ".join(flat.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


class UsageError(EdgeInferError):
    exit_code = 2


class ModelError(EdgeInferError):
    pass


class ModelNotFound(ModelError):
    pass


class ModelFileInvalid(ModelError):
    pass


class UnsupportedModel(ModelError):
    pass


class ModelTooLarge(ModelError):
    pass


class DownloadFailed(ModelError):
    pass


class HubUnreachable(DownloadFailed):
    pass


class ChecksumMismatch(ModelError):
    pass


class ConversionFailed(ModelError):
    pass


class TemplateError(EdgeInferError):
    pass


class ToolsInvalid(EdgeInferError):
    pass


class PromptTooLong(EdgeInferError):
    """The prompt does not fit. Nothing was cut. at_least: it was not worth counting all of it."""

    def __init__(
        self, prompt_tokens: int, context: int, *, at_least: bool = False, option: str = "--ctx"
    ) -> None:
        super().__init__(
            # (client libraries know "this model's maximum context length is" and raise their own error)
            f"the prompt has {'at least ' * at_least}{prompt_tokens} tokens"
            f" and this model's maximum context length is {context} here, one of them for the answer;"
            f" shorten the prompt or raise {option}"
        )
        self.prompt_tokens = prompt_tokens
        self.context = context


class ContextFull(EdgeInferError):
    """The answer is not over and no token more fits. What was answered was told."""

    def __init__(self, context: int, *, option: str = "--ctx") -> None:
        super().__init__(
            f"the answer filled the context of {context} tokens before it was over; raise {option},"
            " or let old tokens go: --overflow stream"
        )
        self.context = context


class ConstraintInvalid(EdgeInferError):
    """What an answer is to be cannot be enforced, or is not well-formed.

    keyword: of the schema, where one is to blame (None over the wire, and for other constraints).
    """

    keyword: str | None = None

    def __init__(self, message: str, keyword: str | None = None) -> None:
        super().__init__(message)
        self.keyword = keyword


class BackendError(EdgeInferError):
    pass


class BackendUnavailable(BackendError):
    pass


class LoadFailed(BackendError):
    pass


class StepFailed(BackendError):
    pass


class StepAborted(StepFailed):
    pass


class OutOfCells(BackendError):
    pass


class SharedCells(BackendError):
    pass


class SnapshotRejected(BackendError):
    pass


class MeasureFailed(EdgeInferError):
    pass


class QualityTooLow(EdgeInferError):
    """A quantized model lost more than was allowed; it was not kept."""


class ExtraMissing(EdgeInferError):
    pass


class EndpointFailed(EdgeInferError):
    pass


class EndpointUnreachable(EndpointFailed):
    pass


class WorkerDied(EdgeInferError):
    pass


class RequestFailed(EdgeInferError):
    pass


def error_from_wire(kind: str, message: str) -> EdgeInferError:
    """The error a worker reported, as its own class here (unknown kinds become EdgeInferError).

    PromptTooLong and others with structured constructors keep their message; `type` stays right.
    """
    pending: list[type[EdgeInferError]] = [EdgeInferError]
    while pending:
        cls = pending.pop()
        if cls.__name__ == kind:
            error = cls.__new__(cls)
            EdgeInferError.__init__(error, message)
            return error
        pending.extend(cls.__subclasses__())
    return EdgeInferError(message)
