"""The options of ``python -m raddpo_ext serve``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from raddpo_ext._check import NORMALIZE
from raddpo_ext.serve.config import DTYPES, ServeConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds every option, its default taken from :class:`ServeConfig`."""

    def add(name: str, metavar: str, text: str, kind: type = int) -> None:
        default = getattr(ServeConfig, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar=metavar, help=f"{text} (default {default})"
        )

    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a folder with a transformers model")
    text = "an index to publish before serving, unless the store's newest is the same"
    parser.add_argument("--index", type=Path, metavar="FILE", help=text)
    add("store", "DIR", "the catalogue's versions, of which the newest is served", Path)
    add("host", "HOST", "address to listen on; others than loopback want a token", str)
    add("port", "PORT", "port to listen on, 0 for any free one")
    add("workers", "N", "processes that search")
    parser.add_argument("--threads", type=int, metavar="N", help="of each worker (default: cores / workers)")
    add("device", "DEVICE", "where the model runs", str)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model (default auto: as it was saved)")
    add("beam-width", "W", "beams a query, and the largest top_k")
    parser.add_argument("--normalize", choices=NORMALIZE, default="vocab", help="the scores' softmax (default vocab)")
    add("length-penalty", "P", "scores are divided by length ** P", float)
    add("max-batch", "N", "queries a batch; 1 turns batching off")
    add("max-wait-ms", "MS", "longest wait of a query for others to fill its batch")
    add("max-queue", "N", "queries that may wait; the next is told 429")
    add("max-body", "BYTES", "longest body of a request")
    add("max-prompt", "TOKENS", "longest prompt; the model's window is a limit too")
    add("timeout-ms", "MS", "time for an answer, then 504; a request may ask for less")
    add("worker-timeout-s", "S", "time for one batch, after which its worker is replaced")
    add("shutdown-timeout-s", "S", "time for the accepted requests once the service is told to stop")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the bearer token that requests must carry; or $RADDPO_TOKEN",
    )


def config_of(options: argparse.Namespace) -> ServeConfig:
    """The checked configuration."""
    chosen = {name: value for name, value in vars(options).items() if name in ServeConfig.__dataclass_fields__}
    if options.token_file is not None:
        chosen["token"] = options.token_file.read_text().strip()
    else:
        chosen["token"] = os.environ.get("RADDPO_TOKEN")
    return ServeConfig(**chosen)
