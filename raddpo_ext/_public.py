"""What ``import raddpo_ext`` shows."""

import torch  # noqa: F401  loaded first: the extension's libraries are torch's

from raddpo_ext import _C, reference, sids  # noqa: F401  _C registers torch.ops.raddpo
from raddpo_ext.data import metrics, negatives
from raddpo_ext.data.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.data.session_log import read_sessions, write_sessions
from raddpo_ext.decoding import row_lse as _row_lse  # noqa: F401  its fake kernel
from raddpo_ext.decoding.beam_search import BeamResult, beam_search
from raddpo_ext.decoding.beam_step import BeamState, beam_step
from raddpo_ext.decoding.linear_beam_step import linear_beam_step
from raddpo_ext.decoding.merge_beams import merge_beams
from raddpo_ext.decoding.sample_search import SampleResult, sample_search
from raddpo_ext.decoding.sample_step import SampleState, sample_step
from raddpo_ext.index.catalogue_store import CatalogueStore, CatalogueVersion
from raddpo_ext.index.id_map import IdMap
from raddpo_ext.index.item_tokens import history_prompts, item_tokens
from raddpo_ext.index.readers import read_sids
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.index.writers import write_sids
from raddpo_ext.integrations.logits_processor import TrieLogitsProcessor
from raddpo_ext.integrations.onednn import use_onednn
from raddpo_ext.integrations.retriever import SIDRetriever
from raddpo_ext.integrations.token_merger import TokenMerger
from raddpo_ext.logps.legal_mass import legal_mass
from raddpo_ext.logps.linear_token_logps import linear_token_logps
from raddpo_ext.logps.token_logps import token_logps
from raddpo_ext.losses.multilabel_contrastive_loss import multilabel_contrastive_loss
from raddpo_ext.losses.rad_dpo_loss import PRESETS, SessionLossOutput, rad_dpo_loss
from raddpo_ext.losses.rad_dpo_module import RADDPOLoss, RADDPOOutput
from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.losses.similarity_weighting import SimilarityWeighting
from raddpo_ext.policy import rewards
from raddpo_ext.policy.group_advantages import Advantages, group_advantages
from raddpo_ext.policy.policy_counts import policy_counts
from raddpo_ext.policy.policy_loss import POLICY_PRESETS, PolicyLossOutput, policy_loss

__all__ = [
    "POLICY_PRESETS",
    "PRESETS",
    "Advantages",
    "BeamResult",
    "BeamState",
    "CatalogueStore",
    "CatalogueVersion",
    "IdMap",
    "PackedSessions",
    "PolicyLossOutput",
    "RADDPOLoss",
    "RADDPOOutput",
    "SIDRetriever",
    "SIDVocab",
    "SampleResult",
    "SampleState",
    "SessionBatch",
    "SessionLossOutput",
    "SimilarityWeighting",
    "TokenMerger",
    "TrieIndex",
    "TrieLogitsProcessor",
    "beam_search",
    "beam_step",
    "group_advantages",
    "history_prompts",
    "item_tokens",
    "legal_mass",
    "linear_beam_step",
    "linear_token_logps",
    "merge_beams",
    "metrics",
    "multilabel_contrastive_loss",
    "negatives",
    "pack_sessions",
    "policy_counts",
    "policy_loss",
    "rad_dpo_loss",
    "read_sessions",
    "read_sids",
    "reference",
    "rewards",
    "sample_search",
    "sample_step",
    "sids",
    "token_logps",
    "use_onednn",
    "write_sessions",
    "write_sids",
]
