"""Counters of a server, under vLLM's names with our prefix, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from softprompt.serving.engine import Answer, Finished

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and times of one server."""

    def __init__(self, health: Callable[[], Mapping[str, int]]) -> None:
        self.registry = CollectorRegistry()
        self.health = health
        named: Any = {"registry": self.registry, "namespace": "softprompt"}
        self.running = Gauge("num_requests_running", "Rows running.", **named)
        self.waiting = Gauge("num_requests_waiting", "Requests waiting.", **named)
        self.kv_bytes = Gauge("kv_cache_bytes", "Bytes of keys and values of the running rows.", **named)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "Until the first text.", ["model_name"], buckets=SECONDS, **named
        )
        self.whole = Histogram(
            "e2e_request_latency_seconds", "Until the last text.", ["model_name"], buckets=SECONDS, **named
        )
        self.read = Counter("prompt_tokens", "Text tokens read.", ["model_name"], **named)
        self.virtual = Counter(
            "virtual_tokens", "Virtual tokens in front of requests.", ["model_name"], **named
        )
        self.generated = Counter("generation_tokens", "Tokens generated.", ["model_name"], **named)
        self.refusals = Counter("request_rejected", "Requests refused.", ["reason"], **named)

    def request(self, model: str) -> Callable[[Answer], None]:
        """Begins to time a request; call the result with each of its answers."""
        began, first = time.perf_counter(), True

        def answered(answer: Answer) -> None:
            nonlocal first
            if first:
                self.first_token.labels(model).observe(time.perf_counter() - began)
                first = False
            if isinstance(answer, Finished):
                self.whole.labels(model).observe(time.perf_counter() - began)
                if answer.sample == 0:  # samples of one text share its reading
                    self.read.labels(model).inc(answer.input_tokens)
                    self.virtual.labels(model).inc(answer.virtual_tokens)
                self.generated.labels(model).inc(len(answer.token_ids))

        return answered

    def rejected(self, reason: str) -> None:
        """Counts a request that was refused."""
        self.refusals.labels(reason).inc()

    def text(self) -> str:
        """Everything, for a scraper."""
        now = self.health()
        self.running.set(now["running"])
        self.waiting.set(now["waiting"])
        self.kv_bytes.set(now["kv_bytes"])
        return generate_latest(self.registry).decode()
