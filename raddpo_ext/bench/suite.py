"""The comparisons that the command makes, and the same with sizes at which they only show that they work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from raddpo_ext.bench import beam_search, retriever, session_loss, token_logps, trie
from raddpo_ext.bench.compare import Comparison

MILLION = 1_000_000
QWEN_VOCAB = 151_936  # the SID tokens are appended to a language model's vocabulary
LARGE = QWEN_VOCAB + 3 * 256

Prepare = Callable[[torch.device], Comparison]
step, retrieval = beam_search.comparison, retriever.comparison
CORE: dict[str, Prepare] = {
    "beam step 2k": partial(step, items=MILLION, codes=2048, levels=8, vocab_size=2048, batch_size=2, beam_width=70),
    "beam step 8k": partial(step, items=MILLION, codes=8192, levels=3, vocab_size=8192, batch_size=8, beam_width=128),
    "beam step 152k": partial(step, items=100_000, codes=256, levels=3, vocab_size=LARGE, batch_size=1, beam_width=50),
    "token_logps": partial(token_logps.from_logits, rows=256, vocab_size=32768),
    "linear_token_logps": partial(token_logps.from_hidden, rows=256, vocab_size=32768, hidden_size=512),
    "session loss": partial(session_loss.comparison, sessions=256, positives=(1, 4), negatives=(3, 64), levels=4),
    "index": partial(trie.comparison, items=MILLION, codes=8192, levels=3),
    "retrieval": partial(
        retrieval, items=100_000, vocab_size=LARGE, hidden_size=256, layers=2, prompt=128, beam_width=50
    ),
}
TINY: dict[str, Prepare] = {
    "beam step": partial(step, items=300, codes=16, levels=3, vocab_size=99, batch_size=2, beam_width=5),
    "token_logps": partial(token_logps.from_logits, rows=3, vocab_size=50),
    "linear_token_logps": partial(token_logps.from_hidden, rows=3, vocab_size=50, hidden_size=8),
    "session loss": partial(session_loss.comparison, sessions=5, positives=(1, 3), negatives=(2, 4), levels=3),
    "index": partial(trie.comparison, items=300, codes=16, levels=3),
    "retrieval": partial(retrieval, items=300, vocab_size=900, hidden_size=64, layers=1, prompt=4, beam_width=5),
}
