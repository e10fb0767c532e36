"""The configuration of ``python -m raddpo_ext serve``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from raddpo_ext._choices import NORMALIZE

DTYPES = ("auto", "float32", "bfloat16", "float16")
_MINIMUM = {"port": 0, "max_wait_ms": 0}  # of all other integers: 1


@dataclass(frozen=True)
class ServeConfig:
    """The options of the service, checked. Times are in the unit at the end of their name.

    Args:
        model: folder of a transformers model, as ``save_pretrained`` writes it.
        store: folder of a :class:`raddpo_ext.CatalogueStore`; the newest version is served.
        host: address to listen on.
        port: port to listen on; 0 for any free one.
        workers: processes that hold the model and search.
        threads: torch threads per worker; None for ``cores / workers``.
        device: device of the model.
        dtype: dtype of the model; ``"auto"`` as it was saved.
        beam_width: beams per query, and the maximum ``top_k``.
        normalize, length_penalty: see :class:`raddpo_ext.SIDRetriever`.
        max_batch: maximum queries per batch.
        max_wait_ms: maximum time that a query waits for others to fill its batch.
        max_queue: maximum queue length; further requests get HTTP 429.
        max_body: maximum bytes of a request's body.
        max_prompt: maximum tokens of a prompt; the model's context window is a limit too.
        timeout_ms: time limit per request, then HTTP 504.
        worker_timeout_s: time limit per batch; a worker that exceeds it is replaced.
        shutdown_timeout_s: time for the accepted requests after the service is told to stop.
        token: bearer token that requests must carry, or None.

    Raises:
        ValueError, TypeError: naming the option and the value.
    """

    model: Path
    store: Path = Path("catalogue")
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    beam_width: int = 50
    normalize: str = "vocab"
    length_penalty: float = 0.0
    max_batch: int = 16
    max_wait_ms: int = 5
    max_queue: int = 256
    max_body: int = 1 << 20
    max_prompt: int = 4096
    timeout_ms: int = 10_000
    worker_timeout_s: int = 60
    shutdown_timeout_s: int = 30
    token: str | None = None

    def __post_init__(self) -> None:
        from raddpo_ext import _check  # imports torch, which --help does not need

        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                _check.integer(value, field.name, _MINIMUM.get(field.name, 1))
        if self.threads is not None:
            _check.integer(self.threads, "threads", 1)
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")
        if not (self.model / "config.json").is_file():
            raise ValueError(
                f"model must be the folder of a transformers model, got {self.model}, which has no config.json"
            )
        _check.choice(self.dtype, "dtype", DTYPES)
        _check.choice(self.normalize, "normalize", NORMALIZE)
        _check.number(self.length_penalty, "length_penalty")
        if self.token is not None and (not self.token or not self.token.isascii() or not self.token.isprintable()):
            raise ValueError("token must be one or more printable ASCII characters")  # a secret: not shown
