"""SIDRetriever: retrieves items with a Hugging Face model, by beam search over the catalogue with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._choices import NORMALIZE
from raddpo_ext.decoding.beam_search import BeamResult, check_skip_forced, check_top_k, head_beam_search
from raddpo_ext.decoding.beam_step import BeamState
from raddpo_ext.decoding.sample_search import SampleResult, head_sample_search, sample_width
from raddpo_ext.decoding.sample_step import Noise, SampleState, checked_noise
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.integrations.base_model import (
    base_model,
    changing_rope,
    model_head,
    slot_windows,
    windows,
)
from raddpo_ext.integrations.decoders import Decoder, SharedPrefixDecoder, pad_left, pad_right
from raddpo_ext.integrations.lengths import ProvenLengths, holds_at
from raddpo_ext.integrations.merger_checks import verify_merger
from raddpo_ext.integrations.probes import PROBE_BEAMS, Ways, verify
from raddpo_ext.integrations.prompt_checks import checked_prompts
from raddpo_ext.logps.head import Head

MOST_MASK_BYTES = 1 << 30  # of the mask of beams that share a prompt, at four bytes per entry


class SIDRetriever:
    """Retrieves items with a causal or encoder-decoder language model of ``transformers``.

    Each prompt runs through the model once, and its keys and values are stored once. Every step then feeds one token
    per beam. All beams of a query are one row, in which each beam sees the prompt and its own ancestors. The head
    computes logits only for the tokens that the step needs (:func:`raddpo_ext.linear_beam_step`). The search is that of
    ``model.generate`` with a trie constraint and ``do_sample=False``, but finished SIDs keep their place in the beam,
    and the model's ``generation_config`` is ignored (only ``decoder_start_token_id`` is read).

    The first call tests what the model allows: it runs a few tokens in each way, compares them with plain forwards
    without a cache, and changes tokens that must not matter. Prompts longer than before are tested at their length too,
    which costs about six prompts. A model that cannot share a prefix (an encoder-decoder, flash attention, a window
    shorter than the prompt, positions computed from the mask) uses one KV-cache row per beam, reordered at every step.
    If padding changes a model's logits, prompts are searched in groups of equal length. If the head cannot run
    separately (behind ``torch.compile``, with adapters), the model computes its own logits.

    Args:
        model: a model with a language modelling head, compiled or not, of any size and float type up to 32
            bits. It must be in evaluation mode when it retrieves; its mode is never changed.
        index: the catalogue, on the model's device. Its token ids are the model's.
        beam_width: beams per query: one width, or one for each of the ``index.levels`` steps. A list may be as long
            as the vocabulary has levels (one more with an end token), beyond the longest SID of this index.
        normalize, length_penalty: see :func:`raddpo_ext.beam_step`.
        shared_prefix: whether beams share their prompt's keys and values. Default: if the model allows it, and the
            mask that this needs takes at most 1 GiB: it grows with the square of the beam width.
        cuda_graph: capture the whole search, prompt and all, in a CUDA graph and replay it. The first call with a batch
            size, prompt length (rounded up to a multiple of 64) and ``top_k`` captures, which takes the time of a few
            searches; the last 16 graphs are kept. All filters of one catalogue (``restrict``, ``discard``) share one
            more graph per shape. Another catalogue given to :meth:`retrieve` has graphs of its own, which keep it in
            memory. A graph reads the model's weights at the addresses they had: change weights in place. After any
            other change to the model assign ``index`` again, which drops the graphs. Calls with ``on_step`` are not
            captured. :meth:`sample` has graphs of its own, one per ``samples`` and temperature.

    Attributes:
        index: the catalogue; may be replaced between calls. To search another one in a single call, such as a
            request's filter, give it to :meth:`retrieve`.

    Raises:
        ValueError, TypeError: naming the argument and the value; also if ``index`` holds a token id that the model
            does not have.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     num_key_value_heads=1, head_dim=8
        ... )
        >>> index = rx.TrieIndex.build([[4, 8], [4, 9], [5, 10]], item_ids=[70, 71, 72])
        >>> retriever = rx.SIDRetriever(Qwen3ForCausalLM(config).eval(), index, beam_width=3)
        >>> found = retriever.retrieve(torch.tensor([[1, 2, 3]]), top_k=3)
        >>> sorted(found.items[0].tolist())  # by ascending id; found.items has the best first
        [70, 71, 72]
    """

    def __init__(
        self,
        model: Any,
        index: TrieIndex,
        *,
        beam_width: int | Sequence[int],
        normalize: str = "vocab",
        length_penalty: float = 0.0,
        shared_prefix: bool | None = None,
        cuda_graph: bool = False,
    ) -> None:
        if not hasattr(model, "config"):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        _check.choice(normalize, "normalize", NORMALIZE)
        if cuda_graph and shared_prefix is False:
            raise ValueError("cuda_graph = True needs beams that share their prompt, got shared_prefix = False")
        self.model = model
        self.beam_width = beam_width
        self.normalize = normalize
        self.length_penalty = length_penalty
        self.shared_prefix = shared_prefix
        self._ways: Ways | None = None
        self._lengths = ProvenLengths()
        self._graphs: Any = None
        if cuda_graph:
            from raddpo_ext.integrations.graphed import SearchGraphs

            self._graphs = SearchGraphs()
        self.index = index

    @property
    def index(self) -> TrieIndex:
        return self._index

    @index.setter
    def index(self, index: TrieIndex) -> None:
        self._check_index(index)
        self._index = index
        if self._graphs is not None:
            self._graphs.clear()

    def _check_index(self, index: TrieIndex) -> None:
        _check.instance(index, "index", TrieIndex)
        self._widths(index)
        largest, vocab_size = max(index.max_tokens), self.model.config.get_text_config().vocab_size
        if largest >= vocab_size:
            raise ValueError(f"index must hold token ids below the model's vocab_size {vocab_size}, got {largest}")

    def _widths(self, index: TrieIndex) -> list[int]:
        return _check.widths(self.beam_width, index.levels, index.most_levels)

    @torch.no_grad()
    def retrieve(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        top_k: int | None = None,
        *,
        index: TrieIndex | None = None,
        skip_forced: bool = False,
        return_token_logps: bool = False,
        on_step: Callable[[int, BeamState], None] | None = None,
    ) -> BeamResult:
        """Return the best items of each prompt.

        Args:
            input_ids: int64 ``[B, T]`` token ids, padded on either side; ids of padding are ignored. A model with a
                :class:`raddpo_ext.TokenMerger` also takes merged ids.
            attention_mask: bool or integer ``[B, T]``, 0 on padding. Default: no padding.
            top_k: return this many items per query; a SID of several items is repeated for each of them. Default: one
                row per SID of the last width, with its first item.
            index: search this index in this call, and leave :attr:`index` as it is. It may be a filtered one
                (``retriever.index.restrict(item_mask)``) or any other whose token ids are the model's. Calls from
                several threads may each use another one.
            skip_forced: do not feed beams that begin one SID only to the model; needs ``normalize="trie"`` and no
                ``cuda_graph``. The result is the same, to the rounding of a model that reads fewer rows at once; see
                :func:`raddpo_ext.beam_search`.
            return_token_logps: also return the log-prob of each token.
            on_step: see :func:`raddpo_ext.beam_search`.

        Returns:
            :class:`raddpo_ext.BeamResult`: ``items`` int64 ``[B, R]``, ``scores`` float32 ``[B, R]``, ``sids`` int64
            ``[B, R, L]``, best first, and ``token_logps``; ``R`` is ``top_k``, or the last width.

        Raises:
            ValueError: a prompt has no token or a token id that the model lacks; a prompt with its SID exceeds
                ``config.max_position_embeddings``, or the SID crosses the length beyond which the model's rope changes;
                a tensor is on another device than the index; the model is in training mode, where dropout would make
                the result random; ``skip_forced=True`` without its needs; or the model or the prompts do not allow
                ``shared_prefix=True`` or ``cuda_graph=True``.
            TypeError: a tensor does not hold integers, or a search cannot use the model: it has no KV cache, or one
                that cannot be reordered by beam.
        """
        # Arguments.
        prompts, mask, index = self._checked(input_ids, attention_mask, index)
        widths = self._widths(index)
        check_top_k(top_k, widths[-1], index)
        check_skip_forced(skip_forced, self.normalize)
        if skip_forced and self._graphs is not None:
            raise ValueError("skip_forced = True needs cuda_graph = False: a graph runs the model at every level")
        options: dict[str, Any] = {
            "normalize": self.normalize,
            "length_penalty": self.length_penalty,
            "top_k": top_k,
            "skip_forced": skip_forced,
            "return_token_logps": return_token_logps,
        }
        # The search, from a graph or step by step.
        search: Callable[..., BeamResult] = partial(
            head_beam_search, batch_size=len(prompts), beam_width=widths, **options
        )
        if self._graphs is not None and on_step is None:
            return self._replay(prompts, mask, index, widths, search, options.values())
        decoder = self._decoder(prompts, mask, index, widths)
        decoder.skip_empty = skip_forced
        return search(decoder, index, decoder.head, on_step=on_step)

    @torch.no_grad()
    def sample(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        samples: int,
        seed: int,
        replacement: bool = False,
        temperature: float = 1.0,
        *,
        keys: Tensor | None = None,
        index: TrieIndex | None = None,
        skip_forced: bool = False,
        on_step: Callable[[int, SampleState], None] | None = None,
    ) -> SampleResult:
        """Draw SIDs for each prompt from the model's distribution over the catalogue, for policy training.

        The model is run as in :meth:`retrieve`, each prompt once. The retriever's ``beam_width``, ``normalize`` and
        ``length_penalty`` play no part: draws are from the softmax over the trie, at ``temperature``. With
        ``cuda_graph`` draws without replacement are captured too, but not under ``skip_forced`` or with ``on_step``;
        seed and keys are inputs of the graph.

        Args:
            input_ids, attention_mask, index: see :meth:`retrieve`.
            samples, seed, replacement, keys, skip_forced, on_step: see :func:`raddpo_ext.sample_search`.
            temperature: divides the model's logits.

        Returns:
            :class:`raddpo_ext.SampleResult` with ``samples`` rows per prompt.

        Raises:
            ValueError, TypeError: as :meth:`retrieve` and :func:`raddpo_ext.sample_search`.
        """
        # Arguments.
        prompts, mask, index = self._checked(input_ids, attention_mask, index)
        width = sample_width(samples, replacement, index)
        noise = checked_noise(seed, keys, len(prompts), index)
        _check.positive(temperature, "temperature")
        widths = [width] * index.levels
        options: dict[str, Any] = {"samples": samples, "replacement": replacement, "temperature": temperature}

        # The search, from a graph or step by step. The model's head has a temperature of its own.
        def search(decoder: Decoder, index: TrieIndex, head: Head | None, *noise: Tensor, **more: Any) -> SampleResult:
            if head is not None:
                head = head._replace(temperature=head.temperature * temperature)
            return head_sample_search(decoder, index, head, Noise(*noise), **options, **more)

        if self._graphs is not None and on_step is None and not (replacement or skip_forced):
            return self._replay(prompts, mask, index, widths, search, options.values(), *noise)
        decoder = self._decoder(prompts, mask, index, widths)
        decoder.skip_empty = skip_forced
        return search(decoder, index, decoder.head, *noise, skip_forced=skip_forced, on_step=on_step)

    def _checked(
        self, input_ids: Tensor, attention_mask: Tensor | None, index: TrieIndex | None
    ) -> tuple[Tensor, Tensor, TrieIndex]:
        """Check the model's mode, the prompts and the index of a call; returns prompts, mask and index."""
        if self.model.training:
            raise ValueError("model is in training mode, call model.eval() before retrieving")
        if index is None:
            index = self.index
        else:
            self._check_index(index)
        return *checked_prompts(self.model, input_ids, attention_mask, index), index

    def _decoder(self, prompts: Tensor, mask: Tensor, index: TrieIndex, widths: list[int]) -> Decoder:
        """The model with these prompts, in the fastest way that gives its own logits. ``widths``: of each step."""
        ways = self._find_ways(mask, index, widths)
        kind = SharedPrefixDecoder if ways.shared else ways.kind(self.model)
        pad = pad_right if self.model.config.is_encoder_decoder else pad_left
        prompts, mask = pad(prompts, mask)
        device = self.model.device
        return kind(self.model, self._head(ways), prompts.to(device), mask.to(device))

    def _head(self, ways: Ways) -> Head | None:
        return model_head(self.model) if ways.head else None

    def _replay(
        self,
        prompts: Tensor,
        mask: Tensor,
        index: TrieIndex,
        widths: list[int],
        search: Callable[..., Any],
        options: Iterable[Hashable],
        *inputs: Tensor,
    ) -> Any:
        """``search(decoder, index, head, *inputs)`` as a CUDA graph.

        It is captured at the first call with these shapes, this function and these ``options`` of it.
        """
        from raddpo_ext.integrations.graphed import CapturedDecoder, check_capturable

        check_capturable(self.model)
        model, head = self.model, self._head(self._find_ways(mask, index, widths))
        prompts, mask = pad_left(prompts, mask, self._multiple())

        def captured(prompts: Tensor, mask: Tensor, *buffers: Tensor) -> Any:
            decoder = CapturedDecoder(model, head, prompts, mask, sum(widths[:-1]))
            given, live = buffers[: len(inputs)], buffers[len(inputs) :]
            return search(decoder, index.with_live(*live) if live else index, head, *given)

        # The live nodes of a filtered index are an input, as the prompts are, so one graph serves every filter.
        live = () if index.live is None else (index.live,)
        key = (prompts.shape, id(index.data), len(live), len(inputs), *widths, *options)
        return self._graphs.run(key, captured, model, prompts, mask, *inputs, *live)

    def _find_ways(self, mask: Tensor, index: TrieIndex, widths: list[int]) -> Ways:
        """The ways to run the model with these prompts; raises if a requested way is not possible."""
        # What a short probe allows, once per model.
        if self._ways is None:
            verify_merger(self.model)
            self._ways = verify(self.model, model_head(self.model), self._shared_decoder(PROBE_BEAMS))
        ways, base = self._ways, base_model(self.model)
        lengths = mask.sum(1)
        self._check_rope(changing_rope(base), lengths, index)
        tokens, steps = int(lengths.max()), index.levels - 1
        fed = widths[:-1]
        # What the settings' windows allow. Beams that share a prompt attend to all of it, even beyond a sliding window,
        # and their slots in the cache add up.
        unit = self._multiple()
        slots = {name: (window - sum(fed)) // unit * unit for name, window in slot_windows(base).items()}
        positions = {name: window - steps for name, window in windows(base).items()}
        if base.config.is_encoder_decoder:
            slots, positions = {}, {}
        outgrown = {name for name, window in positions.items() if tokens > window}
        if outgrown - {"sliding_window"}:
            ways = ways._replace(padded=False)  # chunks and ropes count the padding too
        limit = min((n for n in (*slots.values(), *positions.values()) if n >= tokens), default=1 << 62)

        # What a probe at the prompts' length allows: a shared prompt, else padding, else groups of equal length.
        def holds(ways: Ways) -> bool:
            shared, head = self._shared_decoder(sum(fed)), self._head(ways)
            return self._lengths.cover(
                (ways, *fed), tokens, limit, lambda n: holds_at(self.model, ways, shared, head, n, fed, -n % unit)
            )

        # The mask of the last step, whose beams all have a column for each beam so far.
        mask_bytes = 4 * len(mask) * fed[-1] * (tokens + sum(fed)) if fed else 0
        shares = ways.shared and self.shared_prefix is not False and not outgrown and mask_bytes <= MOST_MASK_BYTES
        shares = shares and all(tokens <= window for window in slots.values()) and holds(ways)
        if not shares and (self.shared_prefix or self._graphs is not None):
            name = "shared_prefix" if self.shared_prefix else "cuda_graph"
            if mask_bytes > MOST_MASK_BYTES:
                raise ValueError(
                    f"{name} = True, but {len(mask)} prompts of {tokens} tokens with beam_width = {widths} need an "
                    f"attention mask of {mask_bytes:,} bytes, more than {MOST_MASK_BYTES:,}"
                )
            raise ValueError(
                f"{name} = True, but {type(self.model).__name__} cannot share a prompt of {tokens} tokens: it "
                "ignores the attention mask, or attends to a window of the last tokens"
            )
        ways = ways._replace(shared=shares)
        if not shares and ways.padded and not holds(ways):
            ways = ways._replace(padded=False)
        if not shares and not ways.padded and not holds(ways):
            raise TypeError(
                "model must give the same logits with a KV cache, reordered from step to step, as without: "
                f"{type(base).__name__} does not after {tokens} tokens"
            )
        return ways

    def _check_rope(self, window: int | None, lengths: Tensor, index: TrieIndex) -> None:
        """Raise ValueError if the rope changes within a SID: cached keys would differ from those of a plain forward."""
        if window is None or self.model.config.is_encoder_decoder:
            return
        _check.none(
            (lengths <= window) & (lengths + index.levels - 1 > window),
            lambda row: (
                f"input_ids[{row}] has {int(lengths[row])} tokens, so that its SID would cross position {window} "
                f"(original_max_position_embeddings), where the rope of {type(self.model).__name__} changes"
            ),
        )

    def _multiple(self) -> int:
        """Prompts are padded to a multiple of this number of columns."""
        if self._graphs is None:
            return 1
        from raddpo_ext.integrations.graphed import COLUMNS

        return COLUMNS

    def _shared_decoder(self, fed: int) -> Callable[..., Decoder]:
        """The decoder whose beams share their prompt. ``fed``: number of beams fed per query, over all steps."""
        if self._graphs is None:
            return SharedPrefixDecoder
        from raddpo_ext.integrations.graphed import CapturedDecoder

        return partial(CapturedDecoder, fed=fed)
