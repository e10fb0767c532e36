"""Ctrl-C in the middle of a build."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, signal, threading, time
import torch
import raddpo_ext as rx

torch.set_num_threads(2)
sids = torch.randint(0, 256, (2_000_000, 4), dtype=torch.int16)
ids = torch.randperm(len(sids))
begun = time.monotonic()
rx.TrieIndex.build(sids, item_ids=ids)
whole = time.monotonic() - begun
threads = len(os.listdir("/proc/self/task"))
for share in (0.1, 0.4):
    sent = []

    def kill():
        time.sleep(share * whole)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=kill)
    try:
        killer.start()
        rx.TrieIndex.build(sids, item_ids=ids)
        killer.join()
    except KeyboardInterrupt:
        answered = time.monotonic() - sent[0]
    killer.join()
    assert answered < whole / 2, (share, answered, whole)  # not only once the build has ended
assert len(os.listdir("/proc/self/task")) == threads
assert rx.TrieIndex.build(sids[:1000]).num_items == 1000
"""


def test_ctrl_c_ends_a_build() -> None:
    """Long before the build would have ended by itself; no thread is left, and the next build works."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
