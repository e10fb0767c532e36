"""Semantic IDs from embeddings: ``rx.sids``.

A residual quantiser (:func:`fit_residual_kmeans`, :func:`encode`) gives each item a code per level;
:func:`assign_balanced`, :func:`resolve_collisions`, :func:`split_clusters` and :func:`adaptive_lengths` mend what such
codes lack for retrieval. Everything here runs on the CPU and is deterministic.
"""

from raddpo_ext.sids.adaptive_lengths import adaptive_lengths
from raddpo_ext.sids.assign_balanced import assign_balanced
from raddpo_ext.sids.codebooks import Codebooks
from raddpo_ext.sids.residual_kmeans import encode, fit_residual_kmeans
from raddpo_ext.sids.resolve_collisions import resolve_collisions
from raddpo_ext.sids.split_clusters import split_clusters

__all__ = [
    "Codebooks",
    "adaptive_lengths",
    "assign_balanced",
    "encode",
    "fit_residual_kmeans",
    "resolve_collisions",
    "split_clusters",
]
