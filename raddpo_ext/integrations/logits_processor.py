"""TrieLogitsProcessor: the catalogue's constraint inside ``generate`` of Hugging Face transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.index.trie import TrieIndex


class TrieLogitsProcessor:
    """Lets ``generate`` (greedy, sampling, beams, any batch) produce whole SIDs of the catalogue and nothing else.

    Replaces ``prefix_allowed_tokens_fn``, without a Python call per beam::

        processor = TrieLogitsProcessor(index, prompt_length=input_ids.shape[1])
        model.generate(input_ids, logits_processor=[processor], max_new_tokens=index.levels, num_beams=20,
                       do_sample=False, length_penalty=0.0)

    Tokens that no SID has after the prefix get ``-inf``. After a complete SID only the end token is allowed, at score
    0, so that ending adds nothing to the SID's score. A prefix that is in no SID may only end too: ``generate`` makes
    such beams if it has more beams than the catalogue has SIDs, and marks them by scores below ``-1e8``.

    If another processor (``suppress_tokens``, ``bad_words_ids``) or an overflow leaves no allowed token with a score
    above ``-inf``, ``generate`` would take a token outside the catalogue. The call then raises instead.

    With ``do_sample=True``, which many checkpoints' ``generation_config`` sets together with ``top_k`` and ``top_p``,
    ``generate`` filters again after every processor and so drops SIDs. For beams set ``do_sample=False``; for samples
    of the whole catalogue set ``top_k=0, top_p=1.0``.

    Args:
        index: the catalogue, on the device of the scores. Its token ids are the model's.
        prompt_length: tokens before the first token of the SID: the padded width of the prompts, or 1 for an
            encoder-decoder (the decoder's start token).
        eos_token_id: the end token, normally the ``eos_token_id`` of ``generate``. Default: that of ``index.vocab``.
            Without either, ``generate`` must stop by ``max_new_tokens``, and all SIDs must have one length.
        num_beams: that of ``generate``. A beam without an allowed token is then dropped as long as its query has
            another beam. Default: every row needs an allowed token.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> index = rx.TrieIndex.build([[4, 8], [4, 9], [5, 10]])
        >>> processor = rx.TrieLogitsProcessor(index, prompt_length=1)
        >>> scores = processor(torch.tensor([[1, 4]]), torch.zeros(1, 12))  # prompt 1, then code 4 was generated
        >>> scores.isfinite().nonzero()[:, 1]
        tensor([8, 9])
    """

    def __init__(
        self, index: TrieIndex, prompt_length: int, *, eos_token_id: int | None = None, num_beams: int = 1
    ) -> None:
        self.index = index
        self.prompt_length = _check.integer(prompt_length, "prompt_length", 0)
        self.num_beams = _check.integer(num_beams, "num_beams", 1)
        vocab = index.vocab
        if eos_token_id is not None:
            eos_token_id = _check.integer(eos_token_id, "eos_token_id", 0)
        elif vocab is not None:
            eos_token_id = vocab.eos
        self.eos_token_id = eos_token_id
        if eos_token_id is None and not index.fixed_length:
            raise ValueError("eos_token_id must be given for an index whose SIDs differ in length, got None")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask the scores of one step.

        Args:
            input_ids: int64 ``[N, T]``: prompts of ``prompt_length`` tokens and the tokens generated after them.
            scores: float ``[N, V]``.

        Returns:
            ``[N, V]`` of the same dtype; the input is not changed.

        Raises:
            ValueError: the arguments do not fit each other or the index, or a query has no token left: the scores of
                all tokens that the catalogue allows are ``-inf``, or one of them is NaN.
        """
        level = self._check_call(input_ids, scores)
        # Add a column, as nodes() returns the node before each token.
        prefix = torch.nn.functional.pad(input_ids[:, self.prompt_length :], (0, 1), value=-1)
        # Rows at the same node share their tokens. Read and write the columns of these tokens only.
        nodes, node_of = torch.unique(self.index.nodes(prefix)[:, -1], return_inverse=True)
        tokens, count = self._allowed(nodes, level)
        row, place = _ranges((count.cumsum(0) - count)[node_of], count[node_of])
        token = tokens[place]
        values = scores[row, token]
        masked = torch.full_like(scores, -math.inf)
        masked[row, token] = values
        # Rows without any finite score, or with a NaN, that are not at the end of a SID.
        ends = (count == 0)[node_of]
        some, wrong = (_count(row, which, len(scores)) for which in (values > -math.inf, values.isnan()))
        stuck = ((some == 0) | (wrong > 0)) & ~ends
        if bool(stuck.any()):
            self._check_queries(input_ids, stuck, stuck | (nodes[node_of] < 0))
            masked.masked_fill_(stuck[:, None], -math.inf)  # generate would take a NaN as the best score
        if self.eos_token_id is not None:
            masked[:, self.eos_token_id].masked_fill_(ends, 0.0)
        return masked

    def _check_queries(self, input_ids: Tensor, stuck: Tensor, dead: Tensor) -> None:
        """Raise ValueError for a query with a stuck beam and no live one. Beams outside the catalogue are not live."""
        query, row = (stuck.view(-1, self.num_beams) & dead.view(-1, self.num_beams).all(1, keepdim=True)).nonzero().T
        if len(query):
            row = int(query[0]) * self.num_beams + int(row[0])
            raise ValueError(
                f"scores[{row}] (query {int(query[0])}) excludes every token that the catalogue allows after "
                f"{input_ids[row, self.prompt_length :].tolist()}: all of them are -inf, or one is NaN. Check "
                "suppress_tokens, bad_words_ids and similar options, and whether logits overflow"
                + (", or set num_beams so that single beams may end" if self.num_beams == 1 else "")
            )

    def _allowed(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """The tokens that may follow the nodes, one node after the other, and their number per node."""
        first, count = torch.ops.raddpo.trie_children(nodes, *self.index.block)
        children = self.index.nodes_at(_ranges(first, count)[1])
        return self._tokens(children, level), count

    def _tokens(self, children: Tensor, level: int) -> Tensor:
        """Token ids on the edges into nodes of depth ``level + 1``."""
        vocab = self.index.vocab
        eos = -1 if vocab is None or vocab.eos is None else vocab.eos
        if level >= self.index.sid_levels:  # nothing but the end-of-sequence token
            return torch.full_like(children, eos)
        codes = self.index.paths(children)[0][:, level]
        if vocab is None:
            return codes
        return torch.where(codes < 0, eos, vocab.token_ids[level].to(codes.device)[codes.clamp(min=0)])

    def _check_call(self, input_ids: Tensor, scores: Tensor) -> int:
        """Check the arguments of a call; returns the number of tokens generated so far."""
        level = input_ids.shape[1] - self.prompt_length
        if level < 0:
            raise ValueError(
                f"prompt_length must be at most the columns of input_ids, of shape {tuple(input_ids.shape)}, got "
                f"{self.prompt_length}"
            )
        if level >= self.index.levels and self.eos_token_id is None:
            raise ValueError(
                f"max_new_tokens must be {self.index.levels}, the length of a SID, for an index without eos and "
                f"eos_token_id None, but generate asks for token {level + 1}"
            )
        # The scores have a column for every token that may be allowed, and all rows of a query.
        largest = max(self.index.max_tokens[level] if level < self.index.levels else 0, self.eos_token_id or 0)
        if scores.dim() != 2 or len(scores) != len(input_ids) or scores.shape[1] <= largest:
            raise ValueError(
                f"scores must have {len(input_ids)} rows and more than {largest} columns, the largest token id, got "
                f"shape {tuple(scores.shape)}"
            )
        if len(scores) % self.num_beams:
            raise ValueError(f"num_beams must divide the {len(scores)} rows of scores, got {self.num_beams}")
        if not input_ids.device == scores.device == self.index.device:
            raise ValueError(
                f"input_ids, scores and index must be on one device, got {input_ids.device}, {scores.device}, "
                f"{self.index.device}"
            )
        return level


def _ranges(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, and the numbers ``first`` to ``first + count - 1``, of all ranges one after the other."""
    row = torch.repeat_interleave(count)
    before = first - (count.cumsum(0) - count)
    return row, torch.arange(len(row), device=row.device) + before[row]


def _count(row: Tensor, which: Tensor, rows: int) -> Tensor:
    """How many entries of ``which`` are true, per row."""
    return torch.zeros(rows, dtype=torch.int64, device=row.device).index_add_(0, row, which.long())
