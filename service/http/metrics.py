"""What Prometheus sees. Names and labels are part of the interface (service/README.md)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as MetricFamily
from prometheus_client.registry import Collector

from adapters.quality import QualityProfile
from service.core import EngineStats, StepReport
from service.rank.rank_policy import RankDecision

BASE_LABEL = "base"
"""The `adapter` label of requests without adapter; their rank is 0."""
OTHER_LABEL = "other"
"""What adapters, and ranks, share past the bound on labels."""
NO_MODE = "none"
"""The `mode` label of a request that ended before its first step."""
RANKS_PER_ADAPTER = 16
"""Pairs of adapter and rank with labels of their own, per adapter allowed."""

_SHADOW_MEMORY = 100
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_FAST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All series, in a registry of their own; also the engine's observer.

    Args:
        max_adapters: adapters with labels of their own. The place of a deleted adapter is given away, with its series,
            when another needs it.
    """

    def __init__(self, max_adapters: int = 100) -> None:
        self.registry = CollectorRegistry()
        self._labels = _BoundedLabels(max_adapters, self._drop_series)
        by_rank = ("adapter", "rank")
        self._requests = self._counter("requests", "Requests ended.", (*by_rank, "mode", "outcome"))
        self._request_s = self._histogram("request_seconds", "From arrival to the last token.", by_rank, _SECONDS)
        self._first_s = self._histogram("time_to_first_token_seconds", "From arrival to the first.", by_rank, _SECONDS)
        self._gap_s = self._histogram("inter_token_seconds", "Between tokens of a request.", by_rank, _FAST_SECONDS)
        self._queue_s = self._histogram("queue_seconds", "From arrival to the running batch.", (), _SECONDS)
        self._tokens = self._counter("tokens", "Tokens read (prompt) and made (generated).", ("kind",))
        self._errors = self._counter("refused", "Requests answered with an error, by its type.", ("reason",))
        self._decisions = self._counter("rank_decisions", "Ranks chosen.", ("policy", "reason", "rank"))
        self._changes = self._counter("rank_changes", "Ranks changed while a request ran.", ("direction",))
        self._slo = self._counter("slo", "Requests with latency objectives, by whether these were met.", ("policy", "met"))
        self._quality = Gauge("dylora_adapter_quality", "Measured quality.", (*by_rank, "metric"), registry=self.registry)
        self._shadow = Gauge("dylora_shadow_divergence", "Nats per token from the full rank.", by_rank, registry=self.registry)
        self._shadow_means: dict[tuple[str, str], tuple[int, float]] = {}
        self._merge_s = self._histogram("merge_seconds", "Computing merged weights.", (), _FAST_SECONDS)
        self._step_s = self._histogram("step_seconds", "One step of the engine.", ("phase",), _FAST_SECONDS)
        self._rows = self._histogram("batch_rows", "Decode rows in a step.", (), _ROWS)
        self._load_s = self._histogram("adapter_load_seconds", "Loading an adapter.", (), _SECONDS)
        self._by_adapter = (self._requests, self._request_s, self._first_s, self._gap_s, self._quality, self._shadow)

    def watch(self, stats: Callable[[], EngineStats], adapters: Callable[[], Mapping[str, int]]) -> None:
        """Read the engine's counts, and the number of adapters by state, at every scrape. Call once."""
        self.registry.register(_AtScrape(stats, adapters))

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    # The engine's observer

    def on_step(self, report: StepReport) -> None:
        """A step ended; `prefill` is the phase of any step that read prompt tokens."""
        self._step_s.labels("prefill" if report.prefill_tokens else "decode").observe(report.seconds)
        self._rows.observe(report.decode_rows)

    def on_merge(self, seconds: float) -> None:
        """Merged weights were computed."""
        self._merge_s.observe(seconds)

    # Requests

    def decided(self, decision: RankDecision) -> None:
        """A rank was chosen."""
        self._decisions.labels(decision.policy, decision.reason.value, str(decision.rank)).inc()

    def rank_changed(self, before: int, after: int) -> None:
        """A request's next token was made at another rank than the one before it."""
        self._changes.labels("up" if after > before else "down").inc()

    def slo(self, policy: str, met: str) -> None:
        """A request with objectives ended; `met` is true, false, or refused where they could not be met."""
        self._slo.labels(policy, met).inc()

    def refused(self) -> None:
        """A request was answered with an error before the engine took it. Its names may be made up: no label."""
        self._requests.labels("", "", NO_MODE, "refused").inc()

    def error_answered(self, reason: str) -> None:
        """A request of any route was answered with an error; `reason` is one of the error types, which are few."""
        self._errors.labels(reason).inc()

    def token_gap(self, adapter: str | None, rank: int, seconds: float) -> None:
        """Time between two tokens of one request."""
        self._gap_s.labels(*self._labels.pair(adapter, rank)).observe(seconds)

    def first_token(self, adapter: str | None, rank: int, seconds: float) -> None:
        """Time from arrival to a request's first token."""
        self._first_s.labels(*self._labels.pair(adapter, rank)).observe(seconds)

    def ended(self, adapter: str | None, rank: int, mode: str | None, outcome: str) -> None:
        """A request reached its terminal event; `outcome` is ok, aborted, timeout or failed."""
        self._requests.labels(*self._labels.pair(adapter, rank), mode or NO_MODE, outcome).inc()

    def completed(self, adapter: str | None, rank: int, *, total_s: float, queue_s: float) -> None:
        """Times of a request that ended well."""
        self._request_s.labels(*self._labels.pair(adapter, rank)).observe(total_s)
        self._queue_s.observe(queue_s)

    def prompts_taken(self, tokens: int) -> None:
        """A request was submitted; its prompts have so many tokens, however many answers each is to have."""
        self._tokens.labels("prompt").inc(tokens)

    def generated(self, tokens: int) -> None:
        """A sequence ended."""
        self._tokens.labels("generated").inc(tokens)

    def shadow_scored(self, adapter: str, rank: int, divergence: float) -> None:
        """An answer was scored again at the full rank; the series is the mean, over the last hundred or so."""
        labels = self._labels.pair(adapter, rank)
        count, mean = self._shadow_means.get(labels, (0, 0.0))
        count = min(count + 1, _SHADOW_MEMORY)
        self._shadow_means[labels] = count, mean + (divergence - mean) / count
        self._shadow.labels(*labels).set(self._shadow_means[labels][1])

    # Adapters

    def adapter_loaded(self, name: str, quality: QualityProfile | None, seconds: float) -> None:
        """An adapter is served under this name; its quality series replace those it had."""
        self._load_s.observe(seconds)
        label = self._labels.adapter(name)
        if label == OTHER_LABEL:
            return  # one series can't speak of several adapters
        self._quality.remove_by_labels({"adapter": label})
        for metric in quality.metrics if quality is not None else ():
            for rank, value in metric.values.items():
                self._quality.labels(label, str(rank), metric.name).set(value)

    def adapter_deleted(self, name: str) -> None:
        """An adapter is gone: its quality with it; its counters stay until another adapter needs the place."""
        self._quality.remove_by_labels({"adapter": name})
        self._labels.release(name)

    def _drop_series(self, adapter: str) -> None:
        for metric in self._by_adapter:
            metric.remove_by_labels({"adapter": adapter})
        self._shadow_means = {labels: mean for labels, mean in self._shadow_means.items() if labels[0] != adapter}

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"dylora_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], buckets: Iterable[float]) -> Histogram:
        return Histogram(f"dylora_{name}", text, labels, buckets=tuple(buckets), registry=self.registry)


class _BoundedLabels:
    """Hands out label values so that their number stays bounded whatever requests and uploads name. Thread-safe."""

    def __init__(self, max_adapters: int, drop: Callable[[str], None]) -> None:
        self._max_adapters = max_adapters
        self._drop = drop
        self._lock = Lock()
        self._ranks: dict[str, set[str]] = {}
        self._released: dict[str, None] = {}  # an ordered set: the longest gone is given away first

    def adapter(self, name: str) -> str:
        """The label of an adapter that exists."""
        with self._lock:
            self._released.pop(name, None)
            return self._place(name)

    def pair(self, name: str | None, rank: int) -> tuple[str, str]:
        """The labels of an adapter, None for the base, at a rank."""
        if name is None:
            return BASE_LABEL, "0"
        with self._lock:
            label = self._place(name)
            if label == OTHER_LABEL:
                return label, OTHER_LABEL
            ranks = self._ranks[label]
            text = str(rank)
            if text not in ranks and sum(map(len, self._ranks.values())) >= self._max_adapters * RANKS_PER_ADAPTER:
                return label, OTHER_LABEL
            ranks.add(text)
            return label, text

    def release(self, name: str) -> None:
        """The adapter is gone; its place may be given away."""
        with self._lock:
            if name in self._ranks:
                self._released[name] = None

    def _place(self, name: str) -> str:
        if name in self._ranks:
            return name
        if len(self._ranks) >= self._max_adapters:
            if not self._released:
                return OTHER_LABEL
            gone = next(iter(self._released))
            del self._released[gone], self._ranks[gone]
            self._drop(gone)
        self._ranks[name] = set()
        return name


class _AtScrape(Collector):
    """Series that are read where they live, when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats], adapters: Callable[[], Mapping[str, int]]) -> None:
        self._stats = stats
        self._adapters = adapters

    def describe(self) -> Iterator[MetricFamily]:
        """Nothing: registering must not ask an engine that has not started."""
        return iter(())

    def collect(self) -> Iterator[MetricFamily]:
        """The engine's counts now."""
        stats = self._stats()
        merged = stats.merged
        yield CounterMetricFamily("dylora_merged_cache_hits", "Steps served from the cache.", value=merged.hits)
        yield CounterMetricFamily("dylora_merged_cache_misses", "Lookups that found nothing.", value=merged.misses)
        yield CounterMetricFamily("dylora_merged_cache_evictions", "Entries pushed out.", value=merged.evictions)
        yield GaugeMetricFamily("dylora_merged_cache_bytes", "Bytes of merged weights held.", value=merged.nbytes)
        prefix = stats.prefix
        yield CounterMetricFamily("dylora_prefix_cache_hits", "Admissions with a known prefix.", value=prefix.hits)
        yield CounterMetricFamily("dylora_prefix_cache_misses", "Admissions without one.", value=prefix.misses)
        yield CounterMetricFamily("dylora_prefix_cache_evictions", "Blocks pushed out.", value=prefix.evictions)
        yield CounterMetricFamily("dylora_prefix_reused_tokens", "Tokens found, not computed.", value=prefix.reused_tokens)
        used, cached = stats.kv_blocks_used, stats.kv_blocks_cached
        blocks = {"used": used, "cached": cached, "free": stats.kv_blocks_total - used - cached}
        yield _by_state("dylora_kv_blocks", "Key/value blocks.", blocks)
        requests = {"running": stats.running, "waiting": stats.waiting}
        yield _by_state("dylora_requests_in_flight", "Requests in the engine.", requests)
        yield _by_state("dylora_adapters", "Adapters in the store.", self._adapters())


def _by_state(name: str, text: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=("state",))
    for state, value in values.items():
        family.add_metric((state,), value)
    return family
