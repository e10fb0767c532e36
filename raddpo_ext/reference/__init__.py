"""The package's functions in plain PyTorch and Python, for any device and float type, written to be read.

They define what the fused operators compute; the tests compare the operators with them. Arguments must be valid.
"""

from raddpo_ext.reference.beam_search import beam_search, beam_step, row_lse
from raddpo_ext.reference.group_advantages import group_advantages
from raddpo_ext.reference.linear_beam_step import linear_beam_step
from raddpo_ext.reference.policy_loss import policy_loss
from raddpo_ext.reference.sample_step import sample_search, sample_step
from raddpo_ext.reference.session_loss import multilabel_contrastive_loss, rad_dpo_loss
from raddpo_ext.reference.similarity_weighting import SimilarityWeighting
from raddpo_ext.reference.token_logps import legal_mass, linear_token_logps, token_logps
from raddpo_ext.reference.trie import TrieIndex

__all__ = [
    "SimilarityWeighting",
    "TrieIndex",
    "beam_search",
    "beam_step",
    "group_advantages",
    "legal_mass",
    "linear_beam_step",
    "linear_token_logps",
    "multilabel_contrastive_loss",
    "policy_loss",
    "rad_dpo_loss",
    "row_lse",
    "sample_search",
    "sample_step",
    "token_logps",
]
