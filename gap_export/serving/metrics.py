"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The figures of one application; several in a process do not mix.

    Attributes:
        requests: Answered, by route and status.
        seconds: From a request's head to its answer's end, by route.
        running: Requests that have no answer yet.
        waiting: Questions in line, by model.
        ran_together: Expressions that one run of a model answered.
        stage_seconds: What answers took by stage, by model.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "gap_export_requests",
            "Requests answered; 499: the client had left.",
            ["route", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "gap_export_request_seconds",
            "Time from a request's head to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.running = Gauge(
            "gap_export_requests_running",
            "Requests without an answer yet.",
            registry=self._registry,
        )
        self.waiting = Gauge(
            "gap_export_waiting", "Questions in line.", ["model"], registry=self._registry
        )
        self.ran_together = Histogram(
            "gap_export_ran_together",
            "Expressions that one run of the model answered.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self._registry,
        )
        self.stage_seconds = Histogram(
            "gap_export_stage_seconds",
            "What an answer took by stage.",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
