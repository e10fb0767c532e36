"""What ``python -m raddpo_ext serve`` can be told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from raddpo_ext import _check

DTYPES = ("auto", "float32", "bfloat16", "float16")
_ANY_NUMBER = {"port": 0, "max_wait_ms": 0}  # the least value of the integers that may be 0


@dataclass(frozen=True)
class ServeConfig:
    """Options of the service, checked; times in the unit that the name ends in.

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
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                _check.integer(value, field.name, _ANY_NUMBER.get(field.name, 1))
        if self.threads is not None:
            _check.integer(self.threads, "threads", 1)
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")
        if not (self.model / "config.json").is_file():
            raise ValueError(f"model must be a folder with a transformers model, got {self.model}")
        _check.choice(self.dtype, "dtype", DTYPES)
        _check.choice(self.normalize, "normalize", _check.NORMALIZE)
        _check.number(self.length_penalty, "length_penalty")
        if self.token is not None and (not self.token or not self.token.isascii() or not self.token.isprintable()):
            raise ValueError("token must hold printable ASCII characters")
