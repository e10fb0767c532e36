"""Deliberate faults in the kernels and their Python, and whether the tests of their op find them."""
