"""The instruction sets that a kernel is compiled for."""

ISAS = ("scalar", "avx2", "avx512")  # ascending
