"""The command-line options of ``python -m raddpo_ext serve``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from raddpo_ext._choices import NORMALIZE
from raddpo_ext.serve.config import DTYPES, ServeConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option, with the default of :class:`ServeConfig`."""

    def add(name: str, metavar: str, text: str, kind: type = int) -> None:
        default = getattr(ServeConfig, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar=metavar, help=f"{text} (default {default})"
        )

    # Model and catalogue.
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a transformers model")
    text = "index to publish before serving, unless the store's newest version is the same"
    parser.add_argument("--index", type=Path, metavar="FILE", help=text)
    add("store", "DIR", "folder of the catalogue's versions; the newest one is served", Path)
    # Address and processes.
    add("host", "HOST", "address to listen on; set a token unless it is a loopback address", str)
    add("port", "PORT", "port to listen on, 0 for any free one")
    add("workers", "N", "worker processes, each with the model")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads per worker (default: cores / workers)")
    add("device", "DEVICE", "device of the model", str)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the model (default auto: as it was saved)"
    )
    # The search.
    add("beam-width", "W", "beams per query, and the maximum top_k")
    parser.add_argument(
        "--normalize", choices=NORMALIZE, default="vocab", help="tokens of the scores' softmax (default vocab)"
    )
    add("length-penalty", "P", "scores are divided by length ** P", float)
    # Batches, limits and timeouts.
    add("max-batch", "N", "maximum queries per batch; 1 turns batching off")
    add("max-wait-ms", "MS", "maximum time that a query waits for others to fill its batch")
    add("max-queue", "N", "maximum queue length; further requests get HTTP 429")
    add("max-body", "BYTES", "maximum size of a request's body")
    add("max-prompt", "TOKENS", "maximum length of a prompt; the model's context window is a limit too")
    add("timeout-ms", "MS", "time limit per request, then HTTP 504; a request may set a shorter one")
    add("worker-timeout-s", "S", "time limit per batch; a worker that exceeds it is replaced")
    add("shutdown-timeout-s", "S", "time for the accepted requests after the service is told to stop")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the bearer token that requests must carry (default: $RADDPO_TOKEN)",
    )


def config_of(options: argparse.Namespace) -> ServeConfig:
    """The checked configuration that the parsed options give."""
    chosen = {name: value for name, value in vars(options).items() if name in ServeConfig.__dataclass_fields__}
    if options.token_file is not None:
        chosen["token"] = options.token_file.read_text().strip()
    else:
        chosen["token"] = os.environ.get("RADDPO_TOKEN")
    return ServeConfig(**chosen)
