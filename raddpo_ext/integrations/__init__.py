"""Catalogue-constrained decoding inside other libraries: Hugging Face transformers."""
