"""A worker process: the model, the newest catalogue, and one batch after another from the front's socket."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from io import BufferedReader
from typing import Any

import torch

from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.protocol import LENGTH, Answers, Hello, Query, pack, unpack
from raddpo_ext.serve.search import Search

_LOG = logging.getLogger(__name__)


def main() -> None:
    """Serves the socket whose number is the first argument until the front closes it.

    SIGINT and SIGTERM are ignored: the front handles them, and may still have requests to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    front = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(EOFError, ConnectionError):  # the front has ended, or has closed this worker's socket
        _serve(front, front.makefile("rb"))
    sys.stdout.flush()
    os._exit(0)  # a thread of torch's can outlive the interpreter, whose end then aborts the process


def _serve(front: socket.socket, incoming: BufferedReader) -> None:
    """Load the model, say hello, and answer one batch after another."""
    config: ServeConfig = _receive(incoming)
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // config.workers))
    try:
        search = Search(config)
    except Exception as error:  # a damaged folder can make transformers raise any type
        _LOG.exception("the worker cannot start")
        front.sendall(pack(Hello(0, None, f"{type(error).__name__}: {error}")))
        return
    front.sendall(pack(Hello(search.version, search.limits, refused=search.refused)))
    while True:
        # A newer catalogue is taken between batches, so all answers of a batch are of one version.
        queries: list[Query] = _receive(incoming)
        search.update()
        front.sendall(pack(Answers(search.version, search.answer(queries), search.refused)))


def _receive(incoming: BufferedReader) -> Any:
    """The front's next message."""
    (length,) = LENGTH.unpack(_read(incoming, LENGTH.size))
    return unpack(_read(incoming, length))


def _read(incoming: BufferedReader, size: int) -> bytes:
    """Exactly ``size`` bytes; raises EOFError if the front has closed the socket."""
    data = incoming.read(size)
    if len(data) < size:
        raise EOFError
    return data


if __name__ == "__main__":
    main()
