"""Figures for Prometheus, by the names that vLLM gave them, so that its dashboards work; ours beside them.

vLLM's: requests running and waiting, use of the pool, tokens, preemptions, prefix reuse, and three latencies.
`satchel:` is what vLLM has no name for: bytes by account, the budget, draft tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from satchel.core.request import Event, Usage

FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
GAUGES = {  # by figure of the engine
    "running": ("vllm:num_requests_running", "Answers that the engine works on"),
    "waiting": ("vllm:num_requests_waiting", "Answers that wait for room"),
}
COUNTERS = {
    "preemptions": ("vllm:num_preemptions", "Times that an answer made room for another"),
    "reused": ("vllm:prefix_cache_hits", "Tokens of prompts that were found in the pool"),
    "steps": ("satchel:steps", "Steps of the engine"),
    "drafts": ("vllm:spec_decode_num_drafts", "Times that tokens were guessed ahead for an answer"),
    "guessed": ("vllm:spec_decode_num_draft_tokens", "Tokens guessed ahead"),
    "right": ("vllm:spec_decode_num_accepted_tokens", "Tokens guessed ahead and kept"),
}
RECENT = 32  # requests whose time tells how long a place takes to come free
Figures = Callable[[], Mapping[str, float]]


class Metrics:
    """Counts for one server; no global registry."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        label = {"labelnames": ["model_name"], "registry": self.registry}
        self.prompt = Counter("vllm:prompt_tokens", "Tokens of prompts", **label).labels(model)
        self.said = Counter("vllm:generation_tokens", "Tokens of answers", **label).labels(model)
        self.first = Histogram("vllm:time_to_first_token_seconds", "", buckets=SLOW, **label).labels(model)
        self.between = Histogram("vllm:inter_token_latency_seconds", "", buckets=FAST, **label).labels(model)
        self.kept = Histogram(
            "satchel:request_spec_decode_acceptance_ratio", "Guesses kept, by request", buckets=SHARES, **label
        ).labels(model)
        self.whole = Histogram("vllm:e2e_request_latency_seconds", "", buckets=SLOW, **label).labels(model)
        self.ended = Counter(
            "vllm:request_success", "Answers by their end", ["model_name", "finished_reason"], registry=self.registry
        )
        self.recent: deque[tuple[float, int]] = deque(maxlen=RECENT)  # (when, tokens) of requests that ended

    def watch(self, figures: Figures, memory: Figures) -> None:
        """Read the engine's figures, and bytes by account, whenever somebody asks."""
        self.registry.register(_Engine(self.model, figures, memory))

    def begin(self) -> Timer:
        """Times the requests of one body."""
        return Timer(self)

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        return generate_latest(self.registry)

    def seconds_per_request(self) -> float:
        """Between two requests that ended, of late."""
        if len(self.recent) < 2:
            return 1.0
        return max(self.recent[-1][0] - self.recent[0][0], 1e-3) / (len(self.recent) - 1)


class Timer:
    """The time from the submission of one body's requests to their tokens."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.begun_s = self.last_s = time.monotonic()
        self.first_s: float | None = None
        self.tokens = 0

    def hear(self, event: Event) -> None:
        """A piece of an answer came."""
        if event.tokens:
            now = time.monotonic()
            if self.first_s is None:
                self.first_s = now - self.begun_s
                self.metrics.first.observe(self.first_s)
            else:
                self.metrics.between.observe((now - self.last_s) / len(event.tokens))
            self.last_s = now
            self.tokens += len(event.tokens)
            self.metrics.said.inc(len(event.tokens))
        if event.finish:
            self.metrics.ended.labels(self.metrics.model, event.finish).inc()

    def end(self, usages: Sequence[Usage]) -> None:
        """Nothing more comes."""
        now = time.monotonic()
        self.metrics.whole.observe(now - self.begun_s)
        self.metrics.prompt.inc(sum(usage.prompt_tokens for usage in usages))
        for usage in usages:
            if usage.guessed_tokens:
                self.metrics.kept.observe(usage.accepted_tokens / usage.guessed_tokens)
        self.metrics.recent.append((now, self.tokens))


class _Engine(Collector):
    """Figures that somebody else keeps."""

    def __init__(self, model: str, figures: Figures, memory: Figures) -> None:
        self.model, self.figures, self.memory = model, figures, memory

    def collect(self) -> Iterator[Metric]:
        found = self.figures()
        for key, (name, text) in GAUGES.items():
            yield self._add(GaugeMetricFamily(name, text, labels=["model_name"]), found[key])
        use = found["blocks_held"] / max(found["blocks"], 1)
        yield self._add(GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the pool", labels=["model_name"]), use)
        for key, (name, text) in COUNTERS.items():
            yield self._add(CounterMetricFamily(name, text, labels=["model_name"]), found[key])
        memory = GaugeMetricFamily("satchel:memory_bytes", "Bytes by account", labels=["model_name", "account"])
        for account, count in self.memory().items():
            memory.add_metric([self.model, account], count)
        yield memory

    def _add(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self.model], value)
        return family
