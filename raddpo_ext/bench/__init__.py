"""``python -m raddpo_ext bench``: the core of the benchmarks on the user's own machine."""
