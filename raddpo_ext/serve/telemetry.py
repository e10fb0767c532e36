"""The metrics of ``/metrics``, in a registry of their own."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Telemetry:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        add: Any = {"registry": self.registry, "namespace": "raddpo"}
        self.requests = Counter("requests", "Answered requests to /retrieve, by HTTP status", ["code"], **add)
        self.latency = Histogram("latency_seconds", "From a request's last byte to its answer", buckets=_SECONDS, **add)
        self.batch_size = Histogram("batch_size", "Queries per batch", buckets=_SIZES, **add)
        self.queued = Gauge("queued", "Queries that wait for a worker", **add)
        self.in_flight = Gauge("in_flight", "Queries that workers are answering", **add)
        self.workers = Gauge("workers", "Workers that are ready", **add)
        self.restarts = Counter("worker_restarts", "Workers started in place of a dead one", **add)
        self.resent = Counter("resent", "Queries of a dead worker that were sent to another", **add)
        self.abandoned = Counter("abandoned", "Requests whose client hung up before the answer", **add)
        self.version = Gauge("catalogue_version", "Newest version that every ready worker has reached", **add)
        self.swaps = Counter("catalogue_swaps", "Newer catalogue versions that a worker took", **add)
        self._newest = 0

    def saw_version(self, version: int) -> None:
        """Record that a worker serves this version."""
        if 0 < self._newest < version:
            self.swaps.inc()
        self._newest = max(self._newest, version)

    def page(self) -> bytes:
        return generate_latest(self.registry)
