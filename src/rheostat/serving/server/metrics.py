"""What ``/metrics`` shows, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "rheostat_requests", "requests answered, by path and status", ["path", "status"], registry=self._registry
        )
        self.tokens = Counter("rheostat_tokens", "tokens written", registry=self._registry)
        self.prompt_tokens = Counter("rheostat_prompt_tokens", "tokens of accepted prompts", registry=self._registry)
        self.cancelled = Counter("rheostat_cancelled", "completions whose client went away", registry=self._registry)
        self.first_token = Histogram(
            "rheostat_first_token_seconds",
            "from a request's acceptance to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.step = Histogram(
            "rheostat_step_seconds", "one pass of the running batch", buckets=_SECONDS, registry=self._registry
        )

    def watch(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Gauges that are read when somebody looks."""
        for name, text, read in (
            ("rheostat_running", "completions under way", running),
            ("rheostat_waiting", "completions that wait for their turn", waiting),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self._registry)
