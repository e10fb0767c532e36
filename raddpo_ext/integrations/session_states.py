"""Runs a transformers model once over packed sessions, up to the states that predict the candidates' tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.data.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.integrations.base_model import (
    base_model,
    context,
    decoder_start,
    expert_capacities,
    head_scale,
    logits_map,
    slot_windows,
)
from raddpo_ext.integrations.embedding_gradient import adding_rows
from raddpo_ext.integrations.packed_lengths import prove_lengths
from raddpo_ext.integrations.probes import (
    has_experts,
    leaked,
    probe_tokens,
    ratio,
    rows_compete,
    size,
    tolerance,
)
from raddpo_ext.logps.head import Head
from raddpo_ext.losses.session import SessionBatch


class SessionStates(NamedTuple):
    """The result of :func:`session_states`.

    The names are those of the arguments of :class:`raddpo_ext.RADDPOLoss`:
    ``loss(sessions=packed.sessions, **states._asdict())``.

    Attributes:
        hidden: the states that predict the candidates' tokens; differentiable. ``[U, H]``, each state once, for a
            decoder-only model; ``[C, L, H]`` for an encoder-decoder.
        rows: int64 ``[C, L]``: the row of ``hidden`` that predicts each token; None for an encoder-decoder.
        embeddings: ``[C, H]`` states at the candidates' last tokens, or None if they were not packed.
        weight: ``[V, H]`` of the language modelling head.
        bias: ``[V]`` of the head, or None.

    Example:
        >>> from raddpo_ext.integrations.transformers import SessionStates
        >>> states = SessionStates(torch.randn(4, 8), torch.tensor([[0, 1], [0, 2]]), None, torch.randn(16, 8), None)
        >>> states.hidden[states.rows].shape  # of candidates, tokens, hidden size
        torch.Size([2, 2, 8])
    """

    hidden: Tensor
    rows: Tensor | None
    embeddings: Tensor | None
    weight: Tensor
    bias: Tensor | None


def session_states(model: Any, packed: PackedSessions, *, accumulate_grad: bool = False) -> SessionStates:
    """Run a language model over packed sessions, up to the states that its head reads, without computing logits.

    A decoder-only model runs once over the packed rows. An encoder-decoder encodes each prompt once and decodes one row
    per candidate: the start token, then the candidate's tokens.

    Args:
        model: a ``transformers`` model with a language modelling head, with or without PEFT adapters and
            ``torch.compile``. Its attention must be ``"eager"``, ``"sdpa"`` or, on CUDA, ``"flex_attention"``; that of
            an encoder-decoder may be any.
        packed: the result of :func:`raddpo_ext.pack_sessions`, on the model's device.
        accumulate_grad: add the gradient of the input embeddings directly to their ``weight.grad``, row by row, without
            a dense gradient of the vocabulary. Hooks on the weight get None, so leave it off under
            ``DistributedDataParallel``. Embeddings that are not a plain ``torch.nn.Embedding``, and encoder-decoders,
            keep autograd's gradient. With a tied head set it in :class:`raddpo_ext.RADDPOLoss` too.

    Returns:
        :class:`SessionStates`. Some models cap or scale the head's output: see :func:`logits_map`.

    Raises:
        ValueError: the model has no head or another attention, or is wrapped for data parallelism (call its ``forward``
            instead, see :func:`accept_sessions`); its window is shorter than a prompt with its candidate, or its states
            in rows of this length differ from those of one row per candidate (see :func:`check_lengths`).

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     num_key_value_heads=1, head_dim=8
        ... )
        >>> from raddpo_ext.integrations.transformers import SessionCollator, session_states
        >>> rows = [{"prompt_ids": [1, 2], "positives": [[4, 8]], "negatives": [[4, 9], [5, 10]]}]
        >>> packed = SessionCollator(embeddings=False)(rows)["packed"]
        >>> states = session_states(Qwen3ForCausalLM(config), packed)
        >>> states.rows  # the three candidates' first tokens share the prompt's last state
        tensor([[0, 1],
                [0, 2],
                [0, 3]])
        >>> loss = rx.RADDPOLoss()(sessions=packed.sessions, **states._asdict()).loss
    """
    _check.instance(packed, "packed", PackedSessions)
    model = base_model(model)
    check_lengths(model, packed)
    if not accumulate_grad or model.config.is_encoder_decoder:
        return _states(model, packed)
    with adding_rows(model):
        return _states(model, packed)


def _states(model: Any, packed: PackedSessions) -> SessionStates:
    decode = _encoder_decoder if model.config.is_encoder_decoder else _decoder_only
    hidden, rows, embeddings = decode(model, packed)
    # Read after the model has run, because before that FSDP may hold the weight in shards.
    head = _head(model)
    return SessionStates(hidden, rows, embeddings, head.weight, getattr(head, "bias", None))


def _head(model: Any) -> Any:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have a language modelling head, {type(model).__name__} has none")
    return head


def _predictors(model: Any, packed: PackedSessions) -> Tensor:
    """The states that predict each candidate's tokens, ``[C, L, H]``."""
    states = _states(model, packed)
    return states.hidden if states.rows is None else states.hidden[states.rows]


def check_lengths(model: Any, packed: PackedSessions) -> None:
    """Check that a model can take rows of this length, before it is sharded or compiled.

    :func:`session_states` makes the same checks.

    Args:
        model, packed: see :func:`session_states`; only the longest row of ``packed`` counts.

    Raises:
        ValueError: rows of this length give other states than one row per candidate, or exceed a window of the model.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     num_key_value_heads=1, head_dim=8, max_position_embeddings=4
        ... )
        >>> from raddpo_ext.integrations.transformers import SessionCollator, check_lengths
        >>> rows = [{"prompt_ids": [1, 2, 3], "positives": [[4, 8]], "negatives": []}]
        >>> check_lengths(Qwen3ForCausalLM(config), SessionCollator()(rows)["packed"])
        Traceback (most recent call last):
        ValueError: packed holds a prompt and candidate of 5 tokens, more than the model's ...
    """
    model = base_model(model)
    _head(model)
    if not model.config.is_encoder_decoder:
        _check_attention(model.get_decoder(), packed)
    prove_lengths(model, packed, partial(_predictors, model))


def accept_sessions(model: Any) -> Any:
    """Give a model's ``forward`` the keywords ``packed``, ``compute`` and ``accumulate_grad``, and return the model.

    ``model(packed=packed)`` is :func:`session_states`; ``model(packed=packed, compute=f, **more)`` is
    ``f(states, packed, **more)``. Whatever wraps the model afterwards (DDP, FSDP, autocast) then sees an ordinary
    forward, which it needs to average gradients. Without ``packed`` the model works as before.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     num_key_value_heads=1, head_dim=8
        ... )
        >>> from raddpo_ext.integrations.transformers import SessionCollator, accept_sessions
        >>> model = accept_sessions(Qwen3ForCausalLM(config))
        >>> rows = [{"prompt_ids": [1, 2], "positives": [[4, 8]], "negatives": [[4, 9], [5, 10]]}]
        >>> packed = SessionCollator()(rows)["packed"]
        >>> model(packed=packed, compute=lambda states, packed: states.hidden.shape)
        torch.Size([4, 8])
    """
    inner = base_model(model)
    forward = inner.forward
    if getattr(forward, "accepts_sessions", False):
        return model
    # The class's own forward is called with the model at hand, so that a deep copy runs its own weights.
    own = forward.__func__ if getattr(forward, "__self__", None) is inner else None

    @functools.wraps(forward)
    def with_sessions(
        self: Any,
        *args: Any,
        packed: PackedSessions | None = None,
        compute: Callable | None = None,
        accumulate_grad: bool = False,
        **kwargs: Any,
    ) -> Any:
        if packed is None:
            return forward(*args, **kwargs) if own is None else own(self, *args, **kwargs)
        states = session_states(self, packed, accumulate_grad=accumulate_grad)
        return states if compute is None else compute(states, packed, **_not_of_a_wrapper(kwargs, compute))

    with_sessions.accepts_sessions = True  # type: ignore[attr-defined]
    inner.forward = MethodType(with_sessions, inner)
    return model


def _not_of_a_wrapper(kwargs: dict[str, Any], compute: Callable) -> dict[str, Any]:
    """``kwargs`` without the arguments that PEFT's task classes add to every call, such as ``labels=None``."""
    named = inspect.signature(getattr(compute, "forward", compute)).parameters
    return {name: value for name, value in kwargs.items() if value is not None or name in named}


@torch.no_grad()
def verify_packing(model: Any) -> None:
    """Check that packing does not change a model's log-probs, by some small forwards with and without it.

    Some models ignore a mask (recurrent layers), or do more after the head than :func:`logits_map` knows. Such a model
    would silently train on wrong log-probs. The check changes every token that a candidate must not see; the
    candidate's states must not change, however faint the leak is at the model's initialization. A model whose window
    counts a row's columns is refused if that window is below its context, as a packed row may be longer.

    Raises:
        ValueError: the log-probs differ, or the model cannot be packed at all.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     num_key_value_heads=1, head_dim=8
        ... )
        >>> from raddpo_ext.integrations.transformers import verify_packing
        >>> verify_packing(Qwen3ForCausalLM(config))  # raises for a model that cannot be packed
    """
    # A window that counts columns must reach as far as the context.
    inner = base_model(model)
    longest = context(inner.config.get_text_config(decoder=True)) or 0
    for name, window in slot_windows(inner).items():
        if not inner.config.is_encoder_decoder and window < longest:
            raise ValueError(
                f"{type(inner).__name__} cannot be packed: {name} = {window} counts a row's columns, not positions"
            )
    # Without dropout: rows must not compete, and packed and plain outputs must agree.
    was_training = inner.training
    inner.eval()
    try:
        if rows_compete(inner) or any(type(value) is float for value in expert_capacities(inner).values()):
            settings = ", ".join(f"{name} = {value}" for name, value in expert_capacities(inner).items())
            raise ValueError(f"experts with a capacity drop a row's tokens for another's ({settings})")
        difference, leaks = _packing_faults(inner)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{type(inner).__name__} cannot be packed: {type(error).__name__}: {error}") from error
    finally:
        inner.train(was_training)
    if leaks or not difference <= tolerance(inner).wrong:
        what = "a candidate's states depend on another's tokens" if leaks else f"by {difference:.2g} of their spread"
        raise ValueError(
            f"model gives different log-probs for packed sessions and for one row per candidate ({what}): "
            f"{type(inner).__name__} ignores the attention mask, or changes its head's output in an unknown way"
        )


def _packing_faults(model: Any) -> tuple[float, bool]:
    """Compare packed with plain forwards.

    Returns:
        The difference of the logits, relative to the effect of another token; and whether a candidate's states depend
        on another candidate or another session.
    """
    # Two sessions with three candidates of two tokens each.
    tokens = probe_tokens(model, 24)
    prompts = [tokens[:5], tokens[5:8]]
    candidates = torch.tensor(tokens[8:20]).view(6, 2)
    offsets, positives = torch.tensor([0, 3, 6]), torch.tensor([1, 1])

    def run(prompts: list[list[int]], candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The packed states that predict each candidate's tokens, ``[6, 2, H]``, and their logits."""
        sessions = SessionBatch(candidates, torch.full((6,), 2), offsets, positives)
        hidden, head = _predictors(model, pack_sessions(prompts, sessions).to(model.device)), _head(model)
        head = Head(head.weight, getattr(head, "bias", None), **logits_map(model))
        return hidden.float(), head.logits(hidden)

    def plain(session: int) -> Tensor:
        """The logits of one row per candidate, ``[3, 2, V]``."""
        prompt = torch.tensor([prompts[session]] * 3, device=model.device)
        rows = candidates[3 * session : 3 * session + 3].to(model.device)
        if model.config.is_encoder_decoder:
            return model(
                input_ids=prompt, decoder_input_ids=_decoder_inputs(model, rows)[:, :-1], use_cache=False
            ).logits
        return model(input_ids=torch.cat((prompt, rows[:, :-1]), 1), use_cache=False).logits[:, -2:]

    # The difference of the logits. A softmax ignores a constant that is added to all of them.
    states, logits = run(prompts, candidates)
    expected = torch.cat((plain(0), plain(1))).float()
    difference = logits - expected
    spread = size(expected[:, 1] - expected[:, 1].roll(1, 0))
    difference = difference - difference.mean(-1, keepdim=True)
    # The noise: how much states change without a leak.
    changed, leaks = torch.tensor(tokens[20:]).repeat(3).view(6, 2), False
    noise = size(run(prompts, candidates)[0] - states)
    if has_experts(model):  # their rounding depends on how many tokens they get
        other = torch.cat((candidates[:3], changed[3:]))
        noise = max(noise, size((run([prompts[0], prompts[1][::-1]], other)[0] - states)[:3]))
    # The leaks: change every token that one candidate must not see, for each candidate in turn.
    for kept in range(6):
        session = kept // 3
        other = changed.clone()
        other[kept] = candidates[kept]
        change = run([p if i == session else p[::-1] for i, p in enumerate(prompts)], other)[0] - states
        apart = torch.arange(6) != kept
        leaks = leaks or leaked(model, change[kept], change[apart, 1], noise)
    return ratio(size(difference), spread), leaks


def _decoder_only(model: Any, packed: PackedSessions) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``hidden``, ``rows`` and ``embeddings`` of :class:`SessionStates`, from one forward over the packed rows."""
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


def _check_attention(body: Any, packed: PackedSessions) -> None:
    """Raise ValueError for an attention that takes no custom mask here."""
    attention, device = body.config._attn_implementation, packed.input_ids.device
    if attention == "flex_attention" and device.type != "cuda":
        raise ValueError(f"flex_attention needs CUDA to train, got {device}; use 'sdpa'")
    if attention not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(
            f"model has the attention {attention!r}, which takes no custom mask; call "
            "model.set_attn_implementation('sdpa'), or 'eager', or 'flex_attention'"
        )


def _mask(body: Any, packed: PackedSessions) -> Any:
    """The mask of the packed rows in the form that the model's attention takes."""
    _check_attention(body, packed)
    attention = body.config._attn_implementation
    if attention == "eager":
        return packed.mask(body.dtype)  # adds the mask to its scores
    return packed.mask() if attention == "sdpa" else packed.block_mask()


def _encoder_decoder(model: Any, packed: PackedSessions) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``hidden``, None and ``embeddings`` of :class:`SessionStates`."""
    # Encode each prompt once.
    sessions = packed.sessions
    prompts, mask = packed.prompts()
    encoded = model.get_encoder()(input_ids=prompts, attention_mask=mask, return_dict=True).last_hidden_state
    # One row per candidate for the decoder. The last token is only needed for its embedding.
    session = sessions.owners()
    tokens = _decoder_inputs(model, sessions.tokens.masked_fill(~sessions.mask(), 0))
    if packed.last_tokens is None:
        tokens = tokens[:, :-1]
    if sessions.num_candidates == 0:  # attention cannot take 0 rows; this one is dropped below
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
    """The candidates' tokens, each row with the start token in front: ``[C, L + 1]``."""
    return F.pad(tokens, (1, 0), value=decoder_start(model))
