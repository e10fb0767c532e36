"""Hostile input: each module has ``run(data)``, which fails unless the promise holds.

The promise: whatever bytes a file or a request holds, the reader gives a usable result or a ValueError that names the
file and what is wrong; never a crash, another exception, NaN or a wrong result. ``python -m fuzz`` searches for bytes
that break it; ``fuzz/corpus`` keeps those that did, which ``python_tests/project/test_fuzz_corpus.py`` replays.
"""
