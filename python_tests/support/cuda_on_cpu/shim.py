"""The CUDA kernels compiled by the C++ compiler, called on torch's CPU tensors."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.losses import session_loss
from raddpo_ext.policy import group_advantages, policy_loss_op

FOLDER = Path(__file__).parent
_NORMALIZE = ("vocab", "level", "trie")
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Compiles with AddressSanitizer and UndefinedBehaviorSanitizer; the process must have libasan preloaded.
SANITIZE = "CUDA_ON_CPU_SANITIZE"
#: Checks that are calls are compiled in two thirds of the time.
_SANITIZERS = [
    *("-fsanitize=address,alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),
]


# Fields of csrc/session_loss/session_loss.h's structs, in order: name and kind, of _KINDS or N, the number type T.
_SESSIONS = "lengths:P offsets:P num_positives:P sessions:I candidates:I "
_SESSION_LOSS_ARGS = (
    _SESSIONS + "tokens:P pair_offsets:P levels:I pairs:I columns:I logps:P ref_logps:P pair_weights:P detach:P "
    "level_weights:P divisors:P session_divisor:D token_divisor:D beta:N gamma:N sft_weight:N label_smoothing:N "
    "length_normalized:B protect:E aggregation:E weighting:E positives:E reduction:E loss:P preference:P sft:P "
    "rewards:P margins:P accuracy:P kept:P totals:P gradient:P scales:P"
)
_SESSION_LOSS_BACKWARD_ARGS = (
    _SESSIONS + "columns:I grad_loss:P grad_preference:P grad_sft:P stride_loss:I stride_preference:I stride_sft:I "
    "gradient:P scales:P level_weights:P sft_weight:N grad_logps:P"
)
#: Fields of csrc/group_advantages/group_advantages.h's struct.
_GROUP_ADVANTAGES_ARGS = (
    _SESSIONS + "tokens:P levels:I rewards:P weights:P baselines:P target_tokens:P target_lengths:P target_offsets:P "
    "targets:I target_levels:I level_weights:P blend:D eps:D credit:E scale:E baseline:E count_experts:B contiguous:B "
    "values:P active:P gates:P"
)
#: Fields of csrc/policy_loss/policy_loss.h's structs.
_POLICY_LOSS_ARGS = (
    _SESSIONS + "tokens:P levels:I logps:P old_logps:P ref_logps:P advantages:P weights:P gates:P level_weights:P "
    "divisors:P row_divisor:D token_divisor:D low:D high:D dual_clip:D delta:D kl_weight:D nll_weight:D max_length:D "
    "objective:E ratio:E divergence:E aggregate:E reduction:E by_token:B use_experts:B protect:B count_all:B loss:P "
    "policy:P kl:P nll:P ratios:P clipped:P approx_kl:P counts:P counted:P gradient:P scales:P"
)
_POLICY_LOSS_BACKWARD_ARGS = (
    _SESSIONS + "levels:I grad_loss:P stride:I gradient:P scales:P counted:P level_weights:P nll_weight:D grad_logps:P"
)
_KINDS = {
    "P": ctypes.c_void_p,
    "I": ctypes.c_int64,
    "D": ctypes.c_double,
    "B": ctypes.c_bool,
    "E": ctypes.c_int,
}


def _struct(fields: str, number: type) -> ctypes.Structure:
    pairs = [field.split(":") for field in fields.split()]
    kinds = [(name, {**_KINDS, "N": number}[kind]) for name, kind in pairs]
    made: ctypes.Structure = type("Struct", (ctypes.Structure,), {"_fields_": kinds})()
    return made


def _sizes(a: session_loss.Arguments | session_loss.BackwardArguments) -> dict[str, int]:
    sizes = {"sessions": len(a.num_positives), "candidates": a.logps.shape[0], "columns": a.logps.shape[1]}
    return sizes if isinstance(a, session_loss.BackwardArguments) else {**sizes, "levels": a.tokens.shape[1]}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _run_compiler(*arguments: str | Path) -> None:
    program = compiler()
    assert program is not None
    flags = _SANITIZERS if SANITIZE in os.environ else []
    flags = [*flags, "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", f"-I{FOLDER}"]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # libasan is not for g++
    result = subprocess.run([program, *flags, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Shim:
    """Keeps the compiled source in ``folder`` for the next. ``kernels``: object files of translated PTX
    (ptx_kernels.py), which run in place of the source's."""

    def __init__(self, folder: Path, kernels: Sequence[Path] = ()) -> None:
        source = folder / "library.o"
        if not source.exists():
            _run_compiler("-c", FOLDER / "library.cpp", "-o", source)
        library = Path(tempfile.mkdtemp(dir=folder)) / "cuda_on_cpu.so"
        _run_compiler("-shared", source, *kernels, "-o", library)
        self._library = ctypes.CDLL(str(library))
        self._library.last_error.restype = ctypes.c_char_p
        if kernels:
            self._run_translated(library)
        self.set_order(0, 0)

    def _run_translated(self, library: Path) -> None:
        """Tells the launcher which kernel of the source each translated one stands for: that of its name."""
        symbols = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
        lines = [words for words in map(str.split, symbols.splitlines()) if len(words) == 3]  # two: not defined here
        addresses = {name: int(address, 16) for address, _, name in lines}
        begin = (ctypes.cast(self._library.set_order, ctypes.c_void_p).value or 0) - addresses["set_order"]
        for name, address in addresses.items():
            self._library.run_translated(name.encode(), ctypes.c_void_p(begin + address))

    def run_alone(self, name: str, values: Tensor, out: Tensor) -> None:
        """Runs a translated kernel of two addresses, which no source has, on 64 threads."""
        code = self._library.run_alone(name.encode(), *(ctypes.c_uint64(t.data_ptr()) for t in (values, out)))
        if code:
            raise RuntimeError(f"{name}: error {code}: {self._library.last_error().decode()}")

    def set_order(self, threads: int, blocks: int) -> None:
        """0: ascending, 1: descending, any other number: shuffled from it as the seed."""
        self._library.set_order(threads, blocks)

    def set_clusters(self, has: bool) -> None:
        """Whether the GPU has clusters of blocks (sm_90 and later)."""
        self._library.set_clusters(int(has))

    def set_shared(self, bytes_: int) -> None:
        """How much shared memory a block may ask for: 48 KiB at least, on sm_90 227 KiB."""
        self._library.set_shared(bytes_)

    def call(self, name: str, *arguments: Tensor | float | None) -> None:
        values = [
            ctypes.c_void_p(argument.data_ptr())
            if isinstance(argument, Tensor)
            else ctypes.c_double(argument)
            if isinstance(argument, float)
            else ctypes.c_int64(argument or 0)
            for argument in arguments
        ]
        codes = [getattr(self._library, name)(*values), self._library.finish()]
        code = codes[0] or codes[1]
        if code:
            raise RuntimeError(f"{name}: error {code}: {self._library.last_error().decode()}")

    def beam_step(
        self,
        logits: Tensor,
        state: rx.BeamState,
        index: rx.TrieIndex,
        beam_width: int,
        *,
        normalize: str = "vocab",
        length_penalty: float = 0.0,
        lse: Tensor | None = None,
        level: int = -1,
    ) -> rx.BeamState:
        assert logits.stride(2) == 1
        batch, width, vocab = logits.shape
        sizes = [_TYPES.index(logits.dtype), batch, width, vocab, *logits.stride()[:2], beam_width]
        shape = (batch, beam_width)
        scores = torch.full(shape, 777.0)
        tokens, parents, nodes = (torch.full(shape, 777) for _ in range(3))
        self.call(
            "beam_step",
            *index.block,
            torch.tensor([*sizes, _NORMALIZE.index(normalize), level]),
            logits,
            state.scores.contiguous(),
            state.nodes.contiguous(),
            lse,
            length_penalty,
            scores,
            tokens,
            parents,
            nodes,
        )
        return rx.BeamState(scores, tokens, parents, nodes)

    def sample_step(
        self,
        logits: Tensor,
        state: rx.SampleState,
        index: rx.TrieIndex,
        beam_width: int,
        *,
        seed: int,
        keys: Tensor,
        temperature: float = 1.0,
    ) -> rx.SampleState:
        assert logits.stride(2) == 1
        sizes = [_TYPES.index(logits.dtype), *logits.shape, *logits.stride()[:2], beam_width, -1]
        shape = (len(logits), beam_width)
        scores, perturbed, logps = (torch.full(shape, 777.0) for _ in range(3))
        tokens, parents, nodes = (torch.full(shape, 777) for _ in range(3))
        self.call(
            "sample_step",
            *index.block,
            torch.tensor(sizes),
            logits,
            state.scores.contiguous(),
            state.perturbed.contiguous(),
            state.nodes.contiguous(),
            keys,
            torch.tensor(seed),
            1 / temperature,
            scores,
            tokens,
            parents,
            nodes,
            perturbed,
            logps,
        )
        return rx.SampleState(scores, tokens, parents, nodes, perturbed, logps)

    def child_logits(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: rx.BeamState,
        index: rx.TrieIndex,
        level: int,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> Tensor:
        columns = index.num_symbols[level]
        sizes = [_TYPES.index(hidden.dtype), *hidden.shape, len(weight), hidden.stride(0), weight.stride(0)]
        out = torch.full((len(hidden), columns), 777.0)
        self.call(
            "child_logits",
            *index.block,
            torch.tensor([*sizes, level, columns]),
            torch.tensor([scale, softcap], dtype=torch.float64),
            hidden,
            weight,
            bias,
            state.scores.contiguous(),
            state.nodes.contiguous(),
            out,
        )
        return out

    def row_lse(self, logits: Tensor) -> Tensor:
        out = torch.full((len(logits),), 777.0)
        self.call("row_lse", logits, _TYPES.index(logits.dtype), *logits.shape, out)
        return out

    def trie_walk(self, tokens: Tensor, index: rx.TrieIndex) -> Tensor:
        nodes = torch.full((tokens.shape[0], tokens.shape[1] + 1), 777)
        self.call("trie_walk", *index.block, tokens, *tokens.shape, nodes)
        return nodes

    def trie_paths(self, nodes: Tensor, index: rx.TrieIndex) -> tuple[Tensor, Tensor]:
        codes, depths = torch.full((len(nodes), index.sid_levels), 777), torch.full((len(nodes),), 777)
        self.call("trie_paths", *index.block, nodes, len(nodes), codes, depths)
        return codes, depths

    def trie_ranges(self, nodes: Tensor, index: rx.TrieIndex, items: bool) -> tuple[Tensor, Tensor]:
        first, number = torch.full((len(nodes),), 777), torch.full((len(nodes),), 777)
        self.call("trie_ranges", *index.block, nodes, len(nodes), int(items), first, number)
        return first, number

    def trie_top_items(self, nodes: Tensor, index: rx.TrieIndex, top_k: int) -> tuple[Tensor, Tensor]:
        items, owners = torch.full((2, len(nodes), top_k), 777)
        self.call("trie_top_items", *index.block, nodes, *nodes.shape, top_k, items, owners)
        return items, owners

    def trie_select(self, places: Tensor, index: rx.TrieIndex, items: bool) -> Tensor:
        numbers = torch.full((len(places),), 777)
        self.call("trie_select", *index.block, places, len(places), int(items), numbers)
        return numbers

    def session_loss(self, *arguments: Any) -> session_loss.Results:
        """The operator's own arguments and outputs."""
        a = session_loss.Arguments(*arguments)
        results = session_loss.Results(*(value.fill_(777) for value in session_loss.empty_results(*a)))
        given = {**a._asdict(), **results._asdict(), "gradient": results.gradient if a.need_gradient else None}
        given |= {**_sizes(a), "pairs": a.num_pairs}
        self._call_with_struct("session_loss", _SESSION_LOSS_ARGS, a.logps, given)
        return results

    def session_loss_backward(self, *arguments: Any) -> Tensor:
        """The operator's own arguments and output."""
        a = session_loss.BackwardArguments(*arguments)
        out = torch.full_like(a.logps, 777)
        upstream = {"loss": a.grad_loss, "preference": a.grad_preference, "sft": a.grad_sft}
        strides = {f"stride_{k}": g.stride(0) if g is not None and g.dim() else 0 for k, g in upstream.items()}
        given = {**a._asdict(), **_sizes(a), **strides, "grad_logps": out}
        self._call_with_struct("session_loss_backward", _SESSION_LOSS_BACKWARD_ARGS, a.logps, given)
        return out

    def legal_mass(self, grad: Tensor, logits: Tensor, *lists: Tensor) -> tuple[Tensor, Tensor]:
        """The mass, and the gradient of the logits."""
        mass, lse = torch.full((len(logits),), 777.0), torch.full((2, len(logits)), 777.0, dtype=torch.float64)
        out, sizes = torch.full_like(logits, 777), torch.tensor([_TYPES.index(logits.dtype), *logits.shape])
        self.call("legal_mass", sizes, logits, *lists, mass, lse, None, None)
        self.call("legal_mass", sizes, logits, *lists, None, lse, grad, out)
        return mass, out

    def group_advantages(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The operator's own arguments and outputs."""
        a = group_advantages.Arguments(*arguments)
        values, active, gates = (value.fill_(777) for value in group_advantages.empty_results(*a))
        targets, target_levels = (0, 0) if a.target_tokens is None else a.target_tokens.shape
        sizes = {"sessions": len(a.num_positives), "candidates": len(a.rewards), "levels": a.tokens.shape[1]}
        given = {**a._asdict(), **sizes, "targets": targets, "target_levels": target_levels}
        given |= {"values": values, "active": active, "gates": gates}
        self._call_with_struct("group_advantages", _GROUP_ADVANTAGES_ARGS, a.rewards, given)
        return values, active, gates

    def policy_loss(self, *arguments: Any) -> policy_loss_op.Results:
        """The operator's own arguments and outputs."""
        a = policy_loss_op.Arguments(*arguments)
        results = policy_loss_op.Results(*(value.fill_(777) for value in policy_loss_op.empty_results(*a)))
        given = {**a._asdict(), **results._asdict(), "gradient": results.gradient if a.need_gradient else None}
        given |= {"sessions": len(a.num_positives), "candidates": a.logps.shape[0], "levels": a.logps.shape[1]}
        self._call_with_struct(
            "policy_loss", _POLICY_LOSS_ARGS, a.logps, {**given, "by_token": a.advantages.dim() == 2}
        )
        return results

    def policy_loss_backward(self, *arguments: Any) -> Tensor:
        """The operator's own arguments and output."""
        a = policy_loss_op.BackwardArguments(*arguments)
        out = torch.full_like(a.logps, 777)
        given = {**a._asdict(), "grad_logps": out, "stride": a.grad_loss.stride(0) if a.grad_loss.dim() else 0}
        given |= {"sessions": len(a.num_positives), "candidates": out.shape[0], "levels": out.shape[1]}
        self._call_with_struct("policy_loss_backward", _POLICY_LOSS_BACKWARD_ARGS, a.logps, given)
        return out

    def _call_with_struct(self, name: str, fields: str, like: Tensor, given: dict[str, Any]) -> None:
        """Calls with the C++ struct of these fields, each filled by its name; ``like`` has the number type."""
        struct = _struct(fields, ctypes.c_double if like.dtype == torch.float64 else ctypes.c_float)
        for field, _ in struct._fields_:
            value = given[field]
            setattr(struct, field, value.data_ptr() if isinstance(value, Tensor) else value)
        size = ctypes.sizeof(struct)
        self.call(name, int(like.dtype == torch.float64), ctypes.addressof(struct), size)

    def fault(self, kind: str, values: Tensor) -> Tensor:
        """Runs a kernel of faults.cuh on int32 ``[64]``."""
        kinds = ("none", "missing_barrier", "divergent_barrier", "early_exit", "divergent_shuffle")
        kinds += ("early", "too_early", "never_waiting")
        out = torch.full_like(values, 777)
        self.call("fault", kinds.index(kind), values, out)
        return out

    def token_logps(
        self,
        logits: Tensor,
        targets: Tensor,
        columns: Tensor | None,
        begin: Tensor | None,
        count: Tensor | None,
        scale: float,
        softcap: float,
        *numbers: int,
    ) -> tuple[Tensor, Tensor]:
        """The registered op of that name; ``numbers`` are ignore_index, first_column and vocab_size."""
        type_ = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logps, lse = (torch.full(targets.shape, 777.0, dtype=dtype) for dtype in (type_, torch.float64))
        supports = (targets, columns, begin, count, float(scale), float(softcap))
        self.call("token_logps", token_logps_sizes(logits, logits, numbers), logits, *supports, logps, lse, None, None)
        return logps, lse

    def token_logps_backward(
        self, grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, *options: Any, out: Tensor
    ) -> None:
        """Writes the logits' gradient to ``out``, which may be ``logits``."""
        columns, begin, count, scale, softcap, *numbers = options
        supports = (targets, columns, begin, count, float(scale), float(softcap))
        self.call("token_logps", token_logps_sizes(logits, out, numbers), logits, *supports, None, lse, grad, out)


def token_logps_sizes(logits: Tensor, grad_logits: Tensor, numbers: Sequence[int]) -> Tensor:
    assert logits.shape[-1] <= 1 or logits.stride(-1) == grad_logits.stride(-1) == 1
    outer, inner = (logits.shape[0] if logits.dim() == 3 else 1), logits.shape[-2]
    strides = [n for t in (logits, grad_logits) for n in ((t.stride(0) if t.dim() == 3 else 0), t.stride(-2))]
    ignore_index, first_column, vocab_size = numbers
    sizes = [_TYPES.index(logits.dtype), outer * inner, inner, logits.shape[-1], *strides]
    return torch.tensor([*sizes, first_column, vocab_size, ignore_index])
