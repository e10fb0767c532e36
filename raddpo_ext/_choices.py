"""Names that arguments and command-line options choose among. Does not import torch."""

NORMALIZE = ("vocab", "level", "trie")
