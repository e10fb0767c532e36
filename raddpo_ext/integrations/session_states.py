"""The states that predict candidates' tokens, from one pass of a stock transformers model over packed sessions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.integrations.base_model import (
    base_model,
    decoder_start,
    head_logits,
    head_scale,
    logits_map,
    windows,
)
from raddpo_ext.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.session import SessionBatch


class SessionStates(NamedTuple):
    """What :func:`session_states` returns, by the names that :class:`raddpo_ext.RADDPOLoss` has for it:
    ``loss(sessions=packed.sessions, **states._asdict())``.

    Attributes:
        hidden: the states that predict the candidates' tokens; differentiable. ``[U, H]``, each once, of a decoder-only
            model, ``[C, L, H]`` of an encoder-decoder.
        rows: int64 ``[C, L]``: which of the ``U`` predicts each token; None for an encoder-decoder.
        embeddings: ``[C, H]`` states at the candidates' last tokens, or None where they were not packed.
        weight: ``[V, H]`` of the language modelling head.
        bias: ``[V]`` of the head, or None.
    """

    hidden: Tensor
    rows: Tensor | None
    embeddings: Tensor | None
    weight: Tensor
    bias: Tensor | None


def session_states(model: Any, packed: PackedSessions) -> SessionStates:
    """Runs a language model over packed sessions, up to the states that its head reads; no logits are made.

    A decoder-only model runs once over the packed rows. An encoder-decoder encodes each prompt once and decodes one row
    a candidate: the start token, then the candidate's tokens.

    Args:
        model: a ``transformers`` model with a language modelling head, behind PEFT adapters or ``torch.compile`` or
            not. Its attention must be ``"eager"``, ``"sdpa"`` or, on CUDA, ``"flex_attention"``; an encoder-decoder's
            may be any.
        packed: of :func:`raddpo_ext.pack_sessions`, on the model's device.

    Returns:
        :class:`SessionStates`. A model that caps or scales its logits does so after the head: see :func:`logits_map`.

    Raises:
        ValueError: a model without a head, of another attention, wrapped for data parallelism (which works through its
            ``forward``: see :func:`accept_sessions`), or whose window is shorter than a prompt with its candidate.
    """
    _check.instance(packed, "packed", PackedSessions)
    model = base_model(model)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have a language modelling head, {type(model).__name__} has none")
    decode = _encoder_decoder if model.config.is_encoder_decoder else _decoder_only
    hidden, rows, embeddings = decode(model, packed)
    # Read after the body has run: before, FSDP may hold the weight in shards.
    return SessionStates(hidden, rows, embeddings, head.weight, getattr(head, "bias", None))


def accept_sessions(model: Any) -> Any:
    """Gives a model's ``forward`` the keywords ``packed`` and ``compute``, in place, and returns the model.

    ``model(packed=packed)`` is :func:`session_states`; ``model(packed=packed, compute=f, **more)`` is
    ``f(states, packed, **more)``. Whatever wraps the model afterwards (DDP, FSDP, autocast) then sees an ordinary
    forward, as it must to average gradients. Without ``packed`` the model is as before.
    """
    inner = base_model(model)
    forward = inner.forward
    if getattr(forward, "accepts_sessions", False):
        return model

    @functools.wraps(forward)
    def with_sessions(
        self: Any, *args: Any, packed: PackedSessions | None = None, compute: Callable | None = None, **kwargs: Any
    ) -> Any:
        if packed is None:
            return forward(*args, **kwargs)
        states = session_states(self, packed)
        return states if compute is None else compute(states, packed, **_not_of_a_wrapper(kwargs, compute))

    with_sessions.accepts_sessions = True  # type: ignore[attr-defined]
    inner.forward = MethodType(with_sessions, inner)
    return model


def _not_of_a_wrapper(kwargs: dict[str, Any], compute: Callable) -> dict[str, Any]:
    """Without what PEFT's class for a task adds to every call: ``input_ids=None``, ``labels=None`` and more."""
    named = inspect.signature(getattr(compute, "forward", compute)).parameters
    return {name: value for name, value in kwargs.items() if value is not None or name in named}


@torch.no_grad()
def verify_packing(model: Any) -> None:
    """Checks that packing leaves a model's log-probs what they are: one small pass each way.

    Some models look past a mask (recurrent layers), or do more after the head than :func:`logits_map` knows. Such a
    model would learn from wrong log-probs without a sign of it.

    Raises:
        ValueError: they differ.
    """
    inner = base_model(model)
    vocab_size = inner.get_input_embeddings().weight.shape[0]
    device = inner.device
    prompt = [token % vocab_size for token in (3, 1, 4)]
    candidates = torch.tensor([[2, 7], [1, 8], [2, 8]]) % vocab_size
    offsets, positives = torch.tensor([0, 3]), torch.tensor([1])
    sessions = SessionBatch(candidates, torch.tensor([2, 2, 2]), offsets, positives)
    was_training = inner.training
    inner.eval()
    try:
        states = session_states(inner, pack_sessions([prompt], sessions).to(device))
        logits = head_logits(states.hidden, states.weight, states.bias, **logits_map(inner))
        logits = logits if states.rows is None else logits[states.rows]
        prompts, candidates = torch.tensor([prompt] * 3, device=device), candidates.to(device)
        if inner.config.is_encoder_decoder:
            expected = inner(input_ids=prompts, decoder_input_ids=_decoder_inputs(inner, candidates)[:, :-1]).logits
        else:
            expected = inner(input_ids=torch.cat((prompts, candidates[:, :-1]), 1)).logits[:, -2:]
    finally:
        inner.train(was_training)
    packed_logps, logps = logits.log_softmax(-1), expected.float().log_softmax(-1)
    difference = float((packed_logps - logps).abs().max())
    if difference > (1e-3 if states.weight.dtype == torch.float32 else 0.25):
        raise ValueError(
            f"model gives other log-probs for packed sessions than for one row a candidate (by {difference:.2g}): "
            f"{type(inner).__name__} looks past the attention mask, or changes its head's output in an unknown way"
        )


def _decoder_only(model: Any, packed: PackedSessions) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _check_window(model, packed)
    body = model.get_decoder()
    output = body(
        input_ids=packed.input_ids,
        attention_mask=_mask(body, packed),
        position_ids=packed.position_ids,
        use_cache=False,
        return_dict=True,
    )
    states = output.last_hidden_state
    embeddings = None if packed.last_tokens is None else packed.embeddings(states)
    return packed.distinct_hidden(states), packed.rows, embeddings


def _mask(body: Any, packed: PackedSessions) -> Any:
    attention = body.config._attn_implementation
    if attention == "sdpa":
        return packed.mask()
    if attention == "eager":
        return packed.mask(body.dtype)  # it adds its mask to the scores
    if attention == "flex_attention":
        if packed.input_ids.device.type != "cuda":
            raise ValueError(f"flex_attention needs CUDA to train, got {packed.input_ids.device}; use 'sdpa'")
        return packed.block_mask()
    raise ValueError(
        f"model has the attention {attention!r}, which takes no mask of its own; call "
        "model.set_attn_implementation('sdpa'), or 'eager', or 'flex_attention'"
    )


def _check_window(model: Any, packed: PackedSessions) -> None:
    for name, window in windows(model).items():
        if packed.input_ids.shape[1] <= window:
            continue
        longest = int(packed.position_ids.max()) + 1
        if longest > window:
            raise ValueError(
                f"packed holds a prompt and candidate of {longest} tokens, more than the model's config.{name} = "
                f"{window}; give max_length to the collator or to pack_sessions"
            )


def _encoder_decoder(model: Any, packed: PackedSessions) -> tuple[Tensor, Tensor | None, Tensor | None]:
    sessions = packed.sessions
    prompts, mask = packed.prompts()
    encoded = model.get_encoder()(input_ids=prompts, attention_mask=mask, return_dict=True).last_hidden_state
    session = sessions.owners()
    tokens = _decoder_inputs(model, sessions.tokens.masked_fill(~sessions.mask(), 0))
    if packed.last_tokens is None:
        tokens = tokens[:, :-1]
    if sessions.num_candidates == 0:  # attention does not take 0 rows; nothing of this one is kept
        session, tokens = session.new_zeros(1), tokens.new_zeros((1, tokens.shape[1]))
    output = model.get_decoder()(
        input_ids=tokens,
        encoder_hidden_states=encoded[session],
        encoder_attention_mask=mask[session],
        use_cache=False,
        return_dict=True,
    )
    states = output.last_hidden_state[: sessions.num_candidates] * head_scale(model)
    embeddings = None
    if packed.last_tokens is not None:
        embeddings = states[torch.arange(sessions.num_candidates, device=states.device), sessions.lengths]
    return states[:, : sessions.tokens.shape[1]], None, embeddings


def _decoder_inputs(model: Any, tokens: Tensor) -> Tensor:
    """The start token before every candidate."""
    return F.pad(tokens, (1, 0), value=decoder_start(model))
