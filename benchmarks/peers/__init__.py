"""The ways that the operators are compared with, and the comparisons."""
