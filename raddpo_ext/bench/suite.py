"""The comparisons that the command makes, and the same with sizes at which they only show that they work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from raddpo_ext.bench import (
    beam_search,
    group_advantages,
    legal_mass,
    policy_loss,
    retriever,
    session_loss,
    token_logps,
    trie,
)
from raddpo_ext.bench.compare import Comparison
from raddpo_ext.bench.group_advantages_cases import Case as AdvantagesCase
from raddpo_ext.bench.policy_loss_cases import Case as PolicyCase
from raddpo_ext.bench.searches import MILLION, QWEN_VOCAB, SYNTHETIC
from raddpo_ext.bench.searches import Case as SearchCase
from raddpo_ext.bench.session_loss_cases import Case as SessionCase
from raddpo_ext.bench.token_logps_cases import Case as LogpsCase

LARGE = QWEN_VOCAB + 3 * 256

Prepare = Callable[[torch.device], Comparison]
step, retrieval = beam_search.comparison, retriever.comparison
CORE: dict[str, Prepare] = {
    "beam step 2k": partial(step, case=SYNTHETIC[0]),
    "beam step 8k": partial(step, case=SYNTHETIC[1]),
    "beam step 152k": partial(step, case=SearchCase("uniform", LARGE, 3, 1, 50, 100_000, 256)),
    "token_logps": partial(token_logps.comparison, case=LogpsCase("logits", 256, 32768)),
    "linear_token_logps": partial(token_logps.comparison, case=LogpsCase("sweep", 256, 32768, 512)),
    "session loss": partial(session_loss.comparison, case=SessionCase("winner")),
    "group_advantages": partial(group_advantages.comparison, case=AdvantagesCase("siblings", 512)),
    "policy_loss": partial(policy_loss.comparison, case=PolicyCase("grpo", 16_384)),
    "legal_mass": partial(legal_mass.comparison, rows=64, vocab_size=32_768, codes=256),
    "index": partial(trie.comparison, items=MILLION, codes=8192, levels=3),
    "retrieval": partial(
        retrieval, items=100_000, vocab_size=LARGE, hidden_size=256, layers=2, prompt=128, beam_width=50
    ),
}
TINY: dict[str, Prepare] = {
    "beam step": partial(step, case=SearchCase("uniform", 99, 3, 2, 5, 300, 16)),
    "token_logps": partial(token_logps.comparison, case=LogpsCase("logits", 3, 50)),
    "linear_token_logps": partial(token_logps.comparison, case=LogpsCase("sweep", 3, 50, 8)),
    "session loss": partial(session_loss.comparison, case=SessionCase("winner", 5, (1, 3), (2, 4), 3)),
    "group_advantages": partial(group_advantages.comparison, case=AdvantagesCase("sequence", 64)),
    "policy_loss": partial(policy_loss.comparison, case=PolicyCase("grpo", 64)),
    "legal_mass": partial(legal_mass.comparison, rows=8, vocab_size=99, codes=16, items=300),
    "index": partial(trie.comparison, items=300, codes=16, levels=3),
    "retrieval": partial(retrieval, items=300, vocab_size=900, hidden_size=64, layers=1, prompt=4, beam_width=5),
}
