"""Fused PyTorch operators for generative retrieval with semantic IDs (SIDs)."""

from importlib.util import find_spec as _find_spec

import torch  # noqa: F401  loaded first: the extension's libraries are torch's

try:
    from raddpo_ext import _C  # noqa: F401  registers torch.ops.raddpo
except ImportError as error:
    if _find_spec("raddpo_ext._C") is not None:
        raise
    raise ImportError(
        f"{__path__[0]} holds sources without the compiled extension: run `make build` in this checkout, or start "
        "Python in another folder if the package is installed"
    ) from error
from raddpo_ext import metrics as metrics
from raddpo_ext import negatives as negatives
from raddpo_ext import row_lse as _row_lse  # noqa: F401  its fake kernel
from raddpo_ext.beam_search import BeamResult, beam_search
from raddpo_ext.beam_step import BeamState, beam_step
from raddpo_ext.catalogue_store import CatalogueStore, CatalogueVersion
from raddpo_ext.integrations.logits_processor import TrieLogitsProcessor
from raddpo_ext.integrations.retriever import SIDRetriever
from raddpo_ext.item_tokens import history_prompts, item_tokens
from raddpo_ext.linear_beam_step import linear_beam_step
from raddpo_ext.linear_token_logps import linear_token_logps
from raddpo_ext.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.raddpo_loss import RADDPOLoss, RADDPOOutput
from raddpo_ext.readers import read_sids
from raddpo_ext.session import SessionBatch
from raddpo_ext.session_log import read_sessions, write_sessions
from raddpo_ext.session_loss import PRESETS, SessionLoss, multilabel_contrastive_loss, rad_dpo_loss
from raddpo_ext.similarity_weighting import SimilarityWeighting
from raddpo_ext.token_logps import token_logps
from raddpo_ext.trie import TrieIndex
from raddpo_ext.vocab import SIDVocab

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "BeamResult",
    "BeamState",
    "CatalogueStore",
    "CatalogueVersion",
    "PackedSessions",
    "RADDPOLoss",
    "RADDPOOutput",
    "SIDRetriever",
    "SIDVocab",
    "SessionBatch",
    "SessionLoss",
    "SimilarityWeighting",
    "TrieIndex",
    "TrieLogitsProcessor",
    "beam_search",
    "beam_step",
    "history_prompts",
    "item_tokens",
    "linear_beam_step",
    "linear_token_logps",
    "multilabel_contrastive_loss",
    "pack_sessions",
    "rad_dpo_loss",
    "read_sessions",
    "read_sids",
    "token_logps",
    "write_sessions",
]
