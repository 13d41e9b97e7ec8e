"""Counts and times for Prometheus, under the names that other servers gave them, with our prefix."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from zerodraft.decoding.kept import KeptTexts
from zerodraft.decoding.stats import RowStep
from zerodraft.fast.depth_batching import DepthWork

if TYPE_CHECKING:
    from zerodraft.serve.scheduler import End

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class OfDepths(Collector):
    """What a batch over depth counts by itself. The quotient is the share of its places that held a request."""

    def __init__(self, work: DepthWork) -> None:
        self.work = work

    def collect(self) -> Iterator[CounterMetricFamily]:
        """See `Collector`."""
        yield CounterMetricFamily("zerodraft_depth_batch_rows", "Rows in the calls of cycled layers", self.work.rows)
        yield CounterMetricFamily("zerodraft_depth_batch_places", "Places in these calls", self.work.places)


class Metrics:
    """What `/metrics` shows of one server.

    Args:
        kept: Of conversations.
        work: Of a batch over depth, if there is one.
    """

    def __init__(self, kept: KeptTexts, work: DepthWork | None = None) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"zerodraft_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"zerodraft_{name}", text, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"zerodraft_{name}_seconds", text, registry=registry, buckets=SECONDS)

        self.running = gauge("num_requests_running", "Answers that are being written")
        self.together = gauge("num_requests_over_depth", "Those of them in the batch over depth")
        self.waiting = gauge("num_requests_waiting", "Answers that wait for their turn")
        self.refused = counter("requests_refused", "Requests that found no room (429)")
        self.ended = counter("request_success", "Answers that are over", "finished_reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("prompt_tokens_cached", "Those of them that were known from earlier texts")
        self.new_tokens = counter("generation_tokens", "Tokens written")
        self.drafts = counter("spec_decode_num_drafts", "Passes of the target over a draft")
        self.drafted = counter("spec_decode_num_draft_tokens", "Drafted tokens")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Those of them that became text")
        self.accepted_length = Histogram(
            "zerodraft_accepted_length",
            "Tokens that a pass of the target brought, its own one included",
            registry=registry,
            buckets=(1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32),
        )
        self.first_token = seconds("time_to_first_token", "From the request to its first token")
        self.whole = seconds("e2e_request_latency", "From the request to its end")
        gauge("kept_texts", "Texts whose keys and values are kept").set_function(lambda: len(kept))
        gauge("kept_bytes", "Bytes of these").set_function(lambda: kept.nbytes)
        if work is not None:
            registry.register(OfDepths(work))

    def step(self, row: RowStep) -> None:
        """A pass of the target behind the prompt's brought something."""
        self.accepted_length.observe(len(row.tokens))
        if row.drafted:
            self.drafts.inc()
            self.drafted.inc(len(row.drafted))
            self.accepted.inc(len(row.accepted))

    def end(self, end: "End", seconds: float) -> None:
        """An answer is over."""
        self.ended.labels(end.reason).inc()
        self.whole.observe(seconds)
        self.new_tokens.inc(end.new_tokens)
        if end.stats is not None:
            self.prompt_tokens.inc(end.stats.prompt_tokens)
            self.cached_tokens.inc(end.stats.reused_tokens)

    def text(self) -> bytes:
        """In Prometheus' form."""
        return generate_latest(self._registry)
