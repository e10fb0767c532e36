"""Tests at the rows' length whether packing leaves a model's states unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext.data.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.integrations.base_model import slot_windows, windows
from raddpo_ext.integrations.lengths import FAR_OFF, PADDING, LongProbe, ProvenLengths
from raddpo_ext.integrations.probes import tolerance
from raddpo_ext.losses.session import SessionBatch

_NO_ROUNDING = 0.5  # change of the far tokens' effect, relative, that no precision explains
_SHORT, _CANDIDATE = 8, 2  # tokens of the short prompt, and of a candidate
_UNLIMITED = 1 << 62  # tokens
_proven: WeakKeyDictionary[Any, ProvenLengths] = WeakKeyDictionary()  # of packed rows, per model


def prove_lengths(model: Any, packed: PackedSessions, predictors: Callable[[PackedSessions], Tensor]) -> None:
    """Check that packing leaves a model's states unchanged in rows as long as the longest one of ``packed``.

    This finds windows that no setting names. It runs the model once per power of two of the length. If the weights are
    sharded, nothing is run, because a forward would wait for other ranks, whose rows may be shorter; a warning then
    names the length that was not checked.

    Args:
        model: the model without its wrappers.
        packed: the rows.
        predictors: returns the states that predict each candidate's tokens, ``[C, L, H]``.

    Raises:
        ValueError: the states differ, or a known window is too short.
    """
    # Windows that settings name need no pass.
    is_encoder_decoder = model.config.is_encoder_decoder
    if not is_encoder_decoder:
        _check_windows(model, packed)
    if torch.compiler.is_compiling() or model.device.type == "meta" or packed.sessions.num_sessions == 0:
        return
    # Lengths that were shown right before need no pass either.
    columns = int(packed.prompt_lengths.max()) if is_encoder_decoder else packed.input_ids.shape[1]
    lengths, way = _proven.setdefault(model, ProvenLengths()), model.config._attn_implementation
    if columns <= lengths.longest(way):
        return
    if in_shards(model):
        warnings.warn(
            f"packed rows of more than {lengths.longest(way)} tokens are not checked, because the weights of "
            f"{type(model).__name__} are sharded: call check_lengths(model, packed) with such rows before sharding",
            stacklevel=2,
        )
        return
    # Run the probes in evaluation mode, without dropout.
    longest = min(windows(model).values(), default=_UNLIMITED)
    limit = _UNLIMITED if is_encoder_decoder else min(slot_windows(model).values(), default=_UNLIMITED)
    refused = f"{type(model).__name__} cannot be packed in rows of {columns} tokens"
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        holds = lengths.cover(way, columns, limit, lambda n: _holds_at(model, n, longest, predictors))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{refused}: {type(error).__name__}: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not holds:
        raise ValueError(
            f"{refused}: its states differ from those of one row per candidate, as with a window of the last tokens; "
            "use fewer candidates per session, or set max_length"
        )


def in_shards(model: Any) -> bool:
    """Whether a forward waits for other ranks: under FSDP, tensor parallelism or DeepSpeed ZeRO-3."""
    marks = ("placements", "ds_id")
    if any(hasattr(parameter, mark) for parameter in model.parameters() for mark in marks):
        return True
    return any("_fsdp_wrapped_module" in name for name, _ in model.named_modules())


def _check_windows(model: Any, packed: PackedSessions) -> None:
    """Raise ValueError if a row is longer than a window of the model's settings."""
    # These windows count the columns of a row, so its candidates add up.
    columns = packed.input_ids.shape[1]
    for name, window in slot_windows(model).items():
        if columns > window:
            sessions = packed.sessions
            row = int(packed.prompt_lengths.index_add(0, sessions.owners(), sessions.lengths).argmax())
            raise ValueError(
                f"packed has rows of {columns} tokens (row {row} is the longest), more than {name} = {window} of "
                f"{type(model).__name__}, which counts a row's columns; use fewer candidates per session, or set "
                "max_length"
            )
    # These count positions: a prompt with its longest candidate.
    for name, window in windows(model).items():
        if packed.input_ids.shape[1] <= window:
            continue
        longest = int(packed.position_ids.max()) + 1
        if longest > window:
            raise ValueError(
                f"packed holds a prompt and candidate of {longest} tokens, more than the model's config.{name} = "
                f"{window}; set max_length of the collator or of pack_sessions"
            )


@torch.no_grad()
def _holds_at(model: Any, columns: int, longest: int, predictors: Callable[[PackedSessions], Tensor]) -> bool:
    """Whether packed rows of this many columns give the states that the model's own head reads.

    Two rows are packed together: a long prompt with two candidates, and a short prompt with candidates that fill the
    row; the last of them is tested. It costs about six such rows, without gradients.

    Args:
        model: the model without its wrappers.
        columns: number of columns of the rows; for an encoder-decoder, of tokens of the prompts.
        longest: maximum number of positions of a prompt with its candidate.
        predictors: returns the states that predict each candidate's tokens, ``[C, L, H]``.
    """
    # The plain outputs of a long and a short prompt, and the number of candidates of each.
    room = 0 if model.config.is_encoder_decoder else 2 * _CANDIDATE
    lengths = [max(1, min(n, columns - room, longest - _CANDIDATE)) for n in (columns, _SHORT)]
    probes = [LongProbe(model, n, _CANDIDATE - 1, partial(_head_inputs, model)) for n in lengths]
    counts = [max(2, (columns - n) // _CANDIDATE) if room else 2 for n in lengths]
    ends = torch.tensor(counts).cumsum(0)

    def packed(version: int) -> Tensor:
        """The packed states of each session's last candidate, ``[2, L, H]``; the other candidates are other tokens."""
        path = probes[0].path.cpu()
        candidates = path[1:].repeat(sum(counts), 1)
        candidates[ends - 1] = path[:_CANDIDATE]
        offsets = F.pad(ends, (1, 0))
        sessions = SessionBatch(
            candidates, torch.full_like(candidates[:, 0], _CANDIDATE), offsets, torch.ones(2).long()
        )
        prompts = [probe.prompts[version].tolist() for probe in probes]
        return predictors(pack_sessions(prompts, sessions).to(model.device))[ends - 1]

    found = torch.stack([packed(version) for version in range(2)]).float()
    return all(_is_rounded(probe, found[:, i]) for i, probe in enumerate(probes))


def _is_rounded(probe: LongProbe, outputs: Tensor) -> bool:
    """Whether a probe's outputs differ by no more than the model's own outputs differ if some padding is masked."""
    limits = tolerance(probe.base)
    wrong, far = probe.error(lambda: outputs)
    if wrong <= limits.rounding and far <= FAR_OFF:
        return True
    # Beyond rounding: compare with what masked padding alone does to a plain forward.
    alone, noise = probe.error(lambda: probe.counted(probe.plain(PADDING)))
    if wrong > max(limits.rounding, min(4 * alone, limits.wrong)):
        return False
    return far <= max(FAR_OFF, min(8 * noise, _NO_ROUNDING))


def _head_inputs(model: Any, **inputs: Any) -> Tensor:
    """The states that a model's own forward passes to its head."""
    states: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, given: states.append(given[0]))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return states[0]
