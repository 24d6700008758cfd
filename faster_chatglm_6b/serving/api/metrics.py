"""What dashboards for vLLM read, under vLLM's names."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine import Engine
from ..generation import Answer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Numbers of one server, in a registry of their own."""

    def __init__(self, engine: Engine, name: str):
        self.registry = CollectorRegistry()
        labels: dict[str, Any] = {"labelnames": ("model_name",), "registry": self.registry}
        self._name = name

        def gauge(metric: str, text: str, read: Any) -> None:
            Gauge(f"vllm:{metric}", text, **labels).labels(name).set_function(read)

        def histogram(metric: str, text: str) -> Any:
            return Histogram(f"vllm:{metric}_seconds", text, buckets=_SECONDS, **labels).labels(name)

        gauge("num_requests_running", "Answers that are being made.", lambda: engine.running)
        gauge("num_requests_waiting", "Answers that wait for a row.", lambda: engine.waiting)
        gauge(
            "kv_cache_usage_perc", "Share of the pages of keys and values in use, 1 for all.", lambda: engine.pages_used
        )
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens read.", **labels).labels(name)
        self._generated = Counter("vllm:generation_tokens", "Tokens made.", **labels).labels(name)
        self._finished = Counter(
            "vllm:request_success", "Answers by the reason of their end.", ("model_name", "finished_reason"),
            registry=self.registry,
        )  # fmt: skip
        self._first = histogram("time_to_first_token", "From the arrival of a request to its first token.")
        self._between = histogram("inter_token_latency", "Between two tokens of an answer.")
        self._whole = histogram("e2e_request_latency", "From the arrival of a request to its last token.")
        self._queue = histogram("request_queue_time", "In the queue.")
        self._prefill = histogram("request_prefill_time", "From the end of the queue to the first token.")
        self._decode = histogram("request_decode_time", "From the first token to the last.")

    def on_tokens(self, gap: float | None, answer: Answer, count: int) -> None:
        """Count tokens of one step."""
        self._generated.inc(count)
        if gap is not None:
            self._between.observe(gap)
            return
        now = time.monotonic()
        job = answer.job
        self._prompt.inc(len(answer.asked.row.ids))
        self._first.observe(now - answer.generation.arrived)
        self._queue.observe(job.started - job.submitted)
        self._prefill.observe(now - job.started)

    def on_end(self, answer: Answer) -> None:
        """Count an answer that has ended."""
        self._finished.labels(self._name, answer.end).inc()
        if answer.first_at and answer.end in ("stop", "length"):
            self._whole.observe(answer.last_at - answer.generation.arrived)
            self._decode.observe(answer.last_at - answer.first_at)

    def text(self) -> bytes:
        """Return the page."""
        return generate_latest(self.registry)
