"""Synthetic catalogues."""

import numpy as np

ZIPF_EXPONENT = 1.05


def uniform(items: int, codes: int, levels: int, seed: int = 0) -> np.ndarray:
    """int32 ``[items, levels]``, every code equally likely."""
    return np.random.default_rng(seed).integers(codes, size=(items, levels), dtype=np.int32)


def clustered(items: int, codes: int, levels: int, seed: int = 0) -> np.ndarray:
    """Codes of a Zipf distribution, int32 ``[items, levels]``.

    A hash of the prefix rotates the codes of each level, so that every node has other frequent children. Several items
    share a popular SID.
    """
    rng = np.random.default_rng(seed)
    shares = np.arange(1, codes + 1) ** -ZIPF_EXPONENT
    cumulative = np.cumsum(shares / shares.sum())
    sids = np.empty((items, levels), np.int32)
    prefix = np.full(items, 0x9E3779B97F4A7C15, np.uint64)
    for level in range(levels):
        rank = np.searchsorted(cumulative, rng.random(items)).clip(max=codes - 1).astype(np.uint64)
        sids[:, level] = (rank + (prefix >> np.uint64(20)) % np.uint64(codes)) % np.uint64(codes)
        prefix = _mixed(prefix ^ sids[:, level].astype(np.uint64))
    return sids


def _mixed(x: np.ndarray) -> np.ndarray:
    """An invertible mix of 64-bit words (wrapping products and xor-shifts)."""
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ (x >> np.uint64(31))) * np.uint64(multiplier)
    return x ^ (x >> np.uint64(29))
