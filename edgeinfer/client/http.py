"""A model behind an endpoint: `edgeinfer serve`, or any server that speaks OpenAI's API."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from edgeinfer.client.client import (
    PROGRESS_HEADER,
    Client,
    Generation,
    LoadProgress,
    ModelInfo,
    Token,
)
from edgeinfer.constraint import Constraint
from edgeinfer.engine.request import (
    Ended,
    Event,
    Prefilled,
    Request,
    RunStats,
    Started,
    Text,
    Usage,
)
from edgeinfer.engine.wire import stats_from_wire
from edgeinfer.errors import (
    EdgeInferError,
    EndpointFailed,
    EndpointUnreachable,
    ModelNotFound,
    RequestFailed,
    UsageError,
    one_line,
)
from edgeinfer.sampling import SamplingParams

log = logging.getLogger("edgeinfer.client")

CONNECT_S = 5.0
SILENCE_S = 120.0  # an endpoint of ours pings every 10 s; others may read a long prompt in silence
MOST_LINE = 16 * 2**20


class HttpClient(Client):
    """url: with or without /v1. model: None takes the first that the endpoint lists.

    A request's events are those of a LocalClient, as far as the endpoint tells: any server gives the
    text and its end, ours also the prompt's progress and the whole of the stats. A thought that is told
    apart from the answer comes as text in <think> tags, as a model writes it.

    What OpenAI's API has no word for is sent to ours, and to others where it is not the default. A
    request that cannot be asked of an endpoint ends with UsageError.
    """

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        """Raises UsageError for what is no http(s) URL."""
        self._base = _base_of(url)
        self._wanted = model
        self._info: ModelInfo | None = None
        self._is_ours = False
        self._closed = False
        self._lock = threading.Lock()
        self._running: set[_Running] = set()
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self._base,
            headers={**headers, "user-agent": "edgeinfer", PROGRESS_HEADER: "1"},
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            trust_env=False,  # a proxy of the environment has no business with a local endpoint
            # One connection a request: which one to break off is known as soon as there is one.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    # -- loading ---------------------------------------------------------------------------------

    def load(self, progress: LoadProgress | None = None) -> ModelInfo:
        """Nothing is loaded: asks what the endpoint serves. Raises EndpointUnreachable, EndpointFailed,
        ModelNotFound."""
        return self._load(progress, None)

    def _load(self, progress: LoadProgress | None, running: _Running | None) -> ModelInfo:
        if self._info is not None:
            return self._info
        if progress is not None:
            progress(f"asking {self._base}", 0.0)
        found = self._get("/models", running).get("data")
        models = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        names = [str(one.get("id", "")) for one in models]
        if not names:
            raise EndpointFailed(f"{self._base} lists no model; load one there first")
        chosen = next((m for m, name in zip(models, names, strict=True) if name == self._wanted), None)
        if self._wanted is not None and chosen is None:
            raise ModelNotFound(
                f"{self._base} has no model {self._wanted!r}; it has {', '.join(names[:8])}"
            )
        model = chosen or models[0]
        self._is_ours = model.get("owned_by") == "edgeinfer"
        context = model.get("context_length")
        self._info = ModelInfo(
            name=str(model["id"]),
            backend="http",
            device=urlsplit(self._base).netloc,
            context=context if isinstance(context, int) else 0,
            vocab_size=0,
            kv_type_k="none",
            kv_type_v="none",
            kv_bytes_per_token=0,
            load_s=0.0,
            threads=0,
            threads_batch=0,
        )
        return self._info

    @property
    def info(self) -> ModelInfo | None:
        return self._info

    def cancel_load(self) -> None:
        """Asking takes at most its timeout; there is nothing to stop."""

    # -- requests --------------------------------------------------------------------------------

    def start(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Generation:
        running = _Running()
        generation = Generation(running.cancel)
        tell = on_event or generation.put
        with self._lock:
            is_open = not self._closed
            if is_open:
                self._running.add(running)
        if not is_open:
            stats = RunStats(finish_reason="stop")
            tell(Ended("failed", stats, "RequestFailed", "the client is closed"))
            return generation
        thread = threading.Thread(
            target=self._run, args=(request, running, tell), name="endpoint", daemon=True
        )
        thread.start()
        return generation

    def _run(self, request: Request, running: _Running, tell: Callable[[Event], None]) -> None:
        begin = time.perf_counter()
        answer = _Answer(tell, begin)
        ended: Ended | None = None
        try:
            model = self._load(None, running).name
            route, body = _body_of(request, model, is_ours=self._is_ours)
            with self._http.stream("POST", route, json=body, extensions=running.extensions) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(self._base, response)
                ended = answer.read(_lines(response.iter_bytes()))
        except EdgeInferError as error:
            ended = answer.failed(error)
        except (httpx.HTTPError, httpx.StreamError, OSError, ValueError) as error:
            ended = answer.failed(_unreachable(self._base, error))
        except Exception as error:  # a bug of ours must still end the request
            log.exception("reading an answer failed")
            ended = answer.failed(RequestFailed(f"the answer could not be read: {error!r}"))
        finally:
            with self._lock:
                self._running.discard(running)
            if running.is_cancelled:
                ended = answer.cancelled()
            tell(ended or answer.failed(RequestFailed("the answer broke off without an end")))

    # -- questions -------------------------------------------------------------------------------

    def count_tokens(self, request: Request) -> int:
        if request.tokens is not None:
            return len(request.tokens)
        if request.messages is not None:
            body: dict[str, Any] = {"messages": [m.as_template_value() for m in request.messages]}
        else:
            body = {"text": request.prompt, "add_special": True, "parse_special": True}
        found = self._post("/tokenize", body).get("count")
        if not isinstance(found, int):
            raise EndpointFailed(f"{self._base} does not count tokens")
        return found

    def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = False
    ) -> tuple[Token, ...]:
        body = {"text": text, "add_special": add_special, "parse_special": parse_special}
        found = self._post("/tokenize", body)
        try:
            pairs = zip(found["tokens"], found["texts"], strict=True)
            return tuple(Token(int(number), str(piece)) for number, piece in pairs)
        except (KeyError, TypeError, ValueError):
            raise EndpointFailed(f"{self._base} does not tell tokens") from None

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._post("/detokenize", {"tokens": list(tokens)}).get("text", ""))

    def _get(self, route: str, running: _Running | None = None) -> dict[str, Any]:
        extensions = running.extensions if running is not None else None
        return self._ask(lambda: self._http.get(route, extensions=extensions))

    def _post(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask(lambda: self._http.post(route, json=body))

    def _ask(self, ask: Callable[[], httpx.Response]) -> dict[str, Any]:
        try:
            response = ask()
            if response.status_code != 200:
                raise _refusal(self._base, response)
            found = response.json()
        except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
            raise _unreachable(self._base, error) from None
        if not isinstance(found, dict):
            raise EndpointFailed(f"{self._base} answers with something that is no OpenAI API")
        return found

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        for one in running:
            one.cancel()
        self._http.close()


class _Running:
    """A request that may be ended from any thread, before or while its answer comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.is_cancelled = False

    @property
    def extensions(self) -> dict[str, Any]:
        """Of an HTTP request that is to end with this one."""
        return {"trace": self._trace}

    def _trace(self, event: str, about: Mapping[str, Any]) -> None:
        # An endpoint that reads a long prompt may not answer for minutes: the response comes too late.
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            found = about["return_value"].get_extra_info("socket")
            with self._lock:
                self._socket = found
                if self.is_cancelled:
                    self._hang_up()

    def cancel(self) -> None:
        with self._lock:
            self.is_cancelled = True
            self._hang_up()

    def _hang_up(self) -> None:
        # Closing would not wake the thread that reads; shutting down does.
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class _Answer:
    """Reads one answer's events out of its lines."""

    def __init__(self, tell: Callable[[Event], None], begin: float) -> None:
        self._tell = tell
        self._begin = begin
        self._first = 0.0
        self._text: list[str] = []
        self._num_tokens = 0
        self._is_counted = False  # our own endpoint tells how many tokens there are
        self._is_thinking = False
        self._reason = ""
        self._usage: Mapping[str, Any] = {}
        self._stats: RunStats | None = None

    def read(self, lines: Iterator[str]) -> Ended:
        for line in lines:
            if line.startswith(":"):
                self._comment(line[1:].strip())
            elif line.startswith("data:"):
                data = line[5:].strip()
                if data == "[DONE]":
                    break
                self._chunk(json.loads(data))
        if not self._reason:
            raise RequestFailed("the endpoint's answer broke off without an end")
        return Ended("finished", self._result())

    def _comment(self, text: str) -> None:
        """`progress {…}`: what only our own endpoint tells, to those who ask."""
        word, _, rest = text.partition(" ")
        if word != "progress":
            return
        found = json.loads(rest)
        if "tokens" in found:
            self._num_tokens, self._is_counted = int(found["tokens"]), True
        elif "cached" in found:
            self._tell(Started(int(found["of"]), int(found["cached"])))
        else:
            self._tell(Prefilled(int(found["done"]), int(found["of"])))

    def _chunk(self, chunk: Any) -> None:
        if not isinstance(chunk, dict):
            raise EndpointFailed("the endpoint sent something that is no chunk of an answer")
        if isinstance(chunk.get("error"), dict):
            raise RequestFailed(str(chunk["error"].get("message", "the endpoint failed")))
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        if isinstance(chunk.get("edgeinfer"), dict):
            with contextlib.suppress(KeyError, TypeError):
                self._stats = stats_from_wire({**chunk["edgeinfer"], "text": ""})
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            thought = str(delta.get("reasoning_content") or delta.get("reasoning") or "")
            text = str(delta.get("content") or choice.get("text") or "")
            if thought and not self._is_thinking:
                thought = "<think>\n" + thought
            if text and (self._is_thinking or thought):
                text = "\n</think>\n\n" + text
            if thought or text:
                self._is_thinking = not text
                self._add(thought + text)
            self._reason = str(choice.get("finish_reason") or self._reason)

    def _add(self, text: str) -> None:
        if not self._first:
            self._first = time.perf_counter()
        self._text.append(text)
        if not self._is_counted:
            self._num_tokens += 1  # at least one: who tells no count sends each token alone
        self._tell(Text(text, self._num_tokens))

    def _result(self, reason: str = "") -> RunStats:
        stats = self._stats or self._measured()
        stats.text = "".join(self._text)
        if reason:
            stats.finish_reason = reason  # type: ignore[assignment]
        return stats

    def _measured(self) -> RunStats:
        """What can be said of an endpoint that tells no stats."""
        now = time.perf_counter()
        completion = int(self._usage.get("completion_tokens") or self._num_tokens)
        details = self._usage.get("prompt_tokens_details") or {}
        prompt = int(self._usage.get("prompt_tokens") or 0)
        stats = RunStats(backend="http")
        stats.usage = Usage(prompt, completion, int(details.get("cached_tokens") or 0))
        if self._reason in ("stop", "length", "tool_calls"):
            stats.finish_reason = self._reason  # type: ignore[assignment]
        if self._first:
            stats.timings.ttft_s = self._first - self._begin
            if completion > 1 and now > self._first:
                stats.timings.decode_tok_s = (completion - 1) / (now - self._first)
        return stats

    def failed(self, error: EdgeInferError) -> Ended:
        return Ended("failed", self._result(), type(error).__name__, str(error))

    def cancelled(self) -> Ended:
        return Ended("cancelled", self._result("cancelled"))


def _base_of(url: str) -> str:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    is_url = parts.scheme in ("http", "https") and parts.hostname
    if not is_url or any(c.isspace() or not c.isprintable() for c in url):
        raise UsageError(
            f"--attach {one_line(url, 80)!r} is no URL; write for example http://127.0.0.1:11435"
        )
    try:
        _ = parts.port
    except ValueError:
        raise UsageError(f"--attach {one_line(url, 80)!r} has no valid port") from None
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _lines(parts: Iterable[bytes]) -> Iterator[str]:
    """A stream's lines, which end with a line feed and nothing else: an answer may hold all the other
    characters that str.splitlines takes for a line's end. Raises EndpointFailed for one without an end.
    """
    held: list[bytes] = []
    size = 0
    for part in parts:
        *ends, rest = part.split(b"\n")
        for end in ends:
            yield _text_of(b"".join((*held, end)))
            held, size = [], 0
        held.append(rest)
        size += len(rest)
        if size > MOST_LINE:
            raise EndpointFailed("the endpoint sent a line that is too long")
    if size:
        yield _text_of(b"".join(held))


def _text_of(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", "replace")


# What OpenAI's API does not know, and refuses.
_OUR_SAMPLING = ("top_k", "min_p", "typical_p", "repeat_penalty", "dry_multiplier")
_NO_SAMPLING = ("penalty_last_n", "dry_base", "dry_allowed_length", "dry_last_n")


def _check_sendable(request: Request) -> None:
    """Raises UsageError for what no endpoint can be asked, or what is not read from its answers."""
    default = SamplingParams()
    wrong = {
        "embedding": request.embedding,
        "logprobs": request.logprobs is not None,
        "tools": request.tools,
        "visible_tokens": request.visible_tokens,
        **{name: getattr(request.sampling, name) != getattr(default, name) for name in _NO_SAMPLING},
    }
    for name, is_given in wrong.items():
        if is_given:
            raise UsageError(
                f"{name} cannot be asked of an endpoint; leave it out or load the model here"
            )


def _body_of(request: Request, model: str, *, is_ours: bool) -> tuple[str, dict[str, Any]]:
    """The route, and the request in OpenAI's words. is_ours: `edgeinfer serve`, which knows more of
    them. Raises UsageError."""
    _check_sendable(request)
    sampling, default = request.sampling, SamplingParams()
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": min(2.0, sampling.temperature),
        "top_p": sampling.top_p,
    }
    for name in _OUR_SAMPLING:
        if is_ours or getattr(sampling, name) != getattr(default, name):
            body[name] = getattr(sampling, name)
    for name in ("presence_penalty", "frequency_penalty"):
        if is_ours or getattr(sampling, name):
            body[name] = max(-2.0, min(2.0, getattr(sampling, name)))
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    elif is_ours and request.messages is None:  # where OpenAI's default is 16
        body["max_tokens"] = -1
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if request.stop:
        body["stop"] = list(request.stop)
    if request.ignore_eos:
        body["ignore_eos"] = True
    if request.constraint is not None:
        body["response_format"] = _format_of(request.constraint)
    if request.messages is not None:
        body["messages"] = [message.as_template_value() for message in request.messages]
        if request.template_options:
            body["chat_template_kwargs"] = dict(request.template_options)
        return "/chat/completions", body
    body["prompt"] = request.prompt if request.tokens is None else list(request.tokens)
    return "/completions", body


def _format_of(constraint: Constraint) -> dict[str, Any]:
    if constraint.kind == "json_object":
        return {"type": "json_object"}
    if constraint.kind == "json_schema":
        schema = json.loads(constraint.text)
        return {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        }
    raise UsageError(f"an endpoint takes a JSON schema, not a {constraint.kind} constraint")


def _refusal(base: str, response: httpx.Response) -> EdgeInferError:
    """What the endpoint said it would not do."""
    said = response.reason_phrase
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        said = response.json()["error"]["message"]
    status = response.status_code
    if status in (401, 403):
        return EndpointFailed(
            f"{base} refused: {said}; give its key with --api-key or EDGEINFER_API_KEY"
        )
    return RequestFailed(f"{base} answered {status}: {said}")


def _unreachable(base: str, error: Exception) -> EdgeInferError:
    if isinstance(error, EdgeInferError):
        return error
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return EndpointUnreachable(
            f"nobody answers at {base}; start it with `edgeinfer serve`, or check --attach"
        )
    if isinstance(error, httpx.TimeoutException):
        return EndpointUnreachable(f"{base} has been silent for {SILENCE_S:.0f} s")
    if isinstance(error, ValueError):
        return EndpointFailed(f"{base} answers with something that is no OpenAI API")
    return EndpointUnreachable(f"the connection to {base} broke: {error or type(error).__name__}")


__all__ = ["HttpClient"]
