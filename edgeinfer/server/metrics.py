"""What `/metrics` tells Prometheus. Counted in the client's thread, a few microseconds an event."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgeinfer.client import Ended, EngineStatus, Event, Queued, RunStats, Started, Text

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_TOLD = 64  # tokens of one burst that count into the inter-token histogram

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5, 1, 2.5)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "edgeinfer_requests",
            "Requests by what became of them.",
            ["route", "outcome"],
            registry=registry,
        )
        self.taken = Counter(
            "edgeinfer_taken_requests",
            "Requests that were taken; each ends with one outcome.",
            ["route"],
            registry=registry,
        )
        self.refused = Counter(
            "edgeinfer_refused_requests",
            "Requests that were not taken, by the reason.",
            ["route", "reason"],
            registry=registry,
        )
        self.ttft = Histogram(
            "edgeinfer_time_to_first_token_seconds",
            "From a request's arrival to its first token, loading excluded.",
            buckets=_TTFT_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "edgeinfer_inter_token_seconds",
            "Between two tokens of an answer; tokens told together share their time evenly.",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self.prompt_tokens = Counter("edgeinfer_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.completion_tokens = Counter(
            "edgeinfer_completion_tokens", "Tokens answered.", registry=registry
        )
        self.cached_tokens = Counter(
            "edgeinfer_cached_tokens",
            "Prompt tokens that needed no prefill, by where they were.",
            ["tier"],
            registry=registry,
        )
        self.cache_lookups = Counter(
            "edgeinfer_cache_lookups",
            "Requests by where the longest known beginning of their prompt was.",
            ["tier"],
            registry=registry,
        )
        self.evicted_tokens = Counter(
            "edgeinfer_evicted_tokens", "Tokens that left a full context.", registry=registry
        )
        self.drafted_tokens = Counter(
            "edgeinfer_drafted_tokens", "Tokens guessed by speculation.", registry=registry
        )
        self.accepted_tokens = Counter(
            "edgeinfer_accepted_tokens", "Guessed tokens that were right.", registry=registry
        )
        self.drafted_answers = Counter(
            "edgeinfer_drafted_answers",
            "Answers by who drafted for them (none: nobody).",
            ["mode"],
            registry=registry,
        )
        self.saved_seconds = Counter(
            "edgeinfer_draft_saved_seconds",
            "Time that answers would have taken more without drafts, as measured costs have it.",
            registry=registry,
        )
        self._gauges = {
            "running": Gauge("edgeinfer_running_requests", "Being answered.", registry=registry),
            "waiting": Gauge("edgeinfer_waiting_requests", "Waiting for a slot.", registry=registry),
            "cells": Gauge("edgeinfer_kv_cells", "Cells of the KV cache.", registry=registry),
            "used_cells": Gauge(
                "edgeinfer_kv_used_cells", "Of those, with a live conversation.", registry=registry
            ),
            "cache_bytes": Gauge(
                "edgeinfer_prompt_cache_bytes", "Prompt cache in host memory.", registry=registry
            ),
            "cache_capacity_bytes": Gauge(
                "edgeinfer_prompt_cache_capacity_bytes", "What it may grow to.", registry=registry
            ),
        }
        self._loaded = Gauge(
            "edgeinfer_model_loaded", "1 while a model is in memory.", registry=registry
        )

    def page(self, status: EngineStatus | None) -> bytes:
        self._loaded.set(status is not None)
        for name, gauge in self._gauges.items():
            gauge.set(0 if status is None else getattr(status, name))
        return generate_latest(self.registry)

    def count_end(self, route: str, ended: Ended, *, is_started: bool) -> None:
        """is_started: whether its prompt came to be read; one that was refused has only been counted."""
        stats = ended.stats
        self.requests.labels(route, ended.outcome).inc()
        if is_started:
            self.prompt_tokens.inc(stats.usage.prompt_tokens)
            self._count_cache(stats)
        self.completion_tokens.inc(stats.usage.completion_tokens)
        if stats.timings.ttft_s:
            self.ttft.observe(stats.timings.ttft_s)
        self.evicted_tokens.inc(stats.kv.newly_evicted)
        self.drafted_tokens.inc(stats.speculation.drafted)
        self.accepted_tokens.inc(stats.speculation.accepted)
        if stats.usage.completion_tokens:
            self.drafted_answers.labels(stats.speculation.mode).inc()
        rate, speedup = stats.timings.decode_tok_s, stats.speculation.speedup
        if rate and speedup > 1.0:
            self.saved_seconds.inc((stats.usage.completion_tokens - 1) / rate * (speedup - 1.0))

    def _count_cache(self, stats: RunStats) -> None:
        self.cache_lookups.labels(stats.cache.tier).inc()
        if stats.usage.cached_tokens:
            self.cached_tokens.labels(stats.cache.tier).inc(stats.usage.cached_tokens)


class RequestWatch:
    """Counts one request's events."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics = metrics
        self._route = route
        self._last = 0.0
        self._tokens = 0
        self.is_queued = False
        self._is_started = False

    def see(self, event: Event) -> None:
        if isinstance(event, Text):
            now = time.perf_counter()
            more = event.num_tokens - self._tokens
            if self._tokens and more > 0:
                each = (now - self._last) / more
                for _ in range(min(more, MOST_TOLD)):
                    self._metrics.inter_token.observe(each)
            if more > 0:
                self._last, self._tokens = now, event.num_tokens
        elif isinstance(event, Queued):
            self.is_queued = True
        elif isinstance(event, Started):
            self._is_started = True
        elif isinstance(event, Ended):
            self._metrics.count_end(self._route, event, is_started=self._is_started)
