"""Constrained beam search and its steps."""
