"""Too little memory: an error that says so, and a process that goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from test_faults import output_of

import raddpo_ext as rx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads memory from /proc"),
]

# Each operation is tried with no memory beyond what the process holds, with 1 MB, 2 MB, ... until it works.
LIMITED = """
import ctypes, json, resource, sys
import numpy as np
import torch
import raddpo_ext as rx

def held():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))

def errors_of(operation):
    operation()
    errors = []
    for megabytes in [0, *(2**i for i in range(12))]:
        ctypes.CDLL(None).malloc_trim(0)
        resource.setrlimit(resource.RLIMIT_AS, (held() + megabytes * 2**20, resource.RLIM_INFINITY))
        try:
            operation()
            return errors
        except (MemoryError, RuntimeError, OSError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    raise SystemExit(f"never worked: {errors[-1]}")

path = sys.argv[1]
rng = np.random.default_rng(0)
sids = rng.integers(0, 256, (200_000, 4), dtype=np.int32)
more = rng.integers(0, 256, (1000, 4), dtype=np.int32), np.arange(1000) + 2**20
index = rx.TrieIndex.build(sids)
half = index.restrict(np.arange(200_000) % 2 == 0)
index.save(path)
state = rx.BeamState.start(index, 2)
logits = torch.randn(400, 20_000, requires_grad=True)
hidden, weight = torch.randn(400, 64, requires_grad=True), torch.randn(20_000, 64, requires_grad=True)
targets = torch.randint(0, 20_000, (400,))
tokens = torch.randint(0, 256, (50_000, 4))
sessions = rx.SessionBatch(
    tokens, torch.full((50_000,), 4), torch.arange(0, 50_001, 100), torch.ones(500, dtype=torch.int64)
)
one = rx.SessionBatch(tokens, torch.full((50_000,), 4), torch.tensor([0, 50_000]), torch.tensor([1]))
logps = torch.randn(50_000, 4, requires_grad=True)
prompts = [list(range(40))] * 500
embeddings = torch.randn(50_000, 16)

found = {
    "TrieIndex.build": lambda: rx.TrieIndex.build(sids),
    "TrieIndex.add": lambda: index.add(more[0], item_ids=more[1]),
    "TrieIndex.restrict": lambda: index.restrict(np.arange(0, 200_000, 2)),
    "TrieIndex.discard": lambda: index.discard(np.arange(0, 200_000, 2)),
    "TrieIndex.save": lambda: half.save(path),
    "TrieIndex.load": lambda: rx.TrieIndex.load(path),
    "TrieIndex.lookup": lambda: index.lookup(sids),
    "beam_step": lambda: rx.beam_step(torch.zeros(2, 1, 256), state, index, 10**5),
    "sample_step": lambda: rx.sample_step(torch.zeros(2, 1, 256), rx.SampleState.start(index, 2), index, 10**5, seed=0),
    "beam_search": lambda: rx.beam_search(
        lambda tokens, parents, level: torch.zeros(*tokens.shape, 256), index, batch_size=2, beam_width=30_000
    ),
    "linear_beam_step": lambda: rx.linear_beam_step(torch.zeros(2, 1, 8), torch.zeros(256, 8), state, index, 10**5),
    "token_logps": lambda: rx.token_logps(logits, targets).sum().backward(),
    "linear_token_logps": lambda: rx.linear_token_logps(hidden, weight, targets).sum().backward(),
    "linear_token_logps in tiles": lambda: rx.linear_token_logps(
        hidden, weight, targets, logits_budget=2**20
    ).sum().backward(),
    "rad_dpo_loss": lambda: rx.rad_dpo_loss(logps, one).loss.backward(),
    "SimilarityWeighting": lambda: rx.SimilarityWeighting()(embeddings, sessions),
    "pack_sessions": lambda: rx.pack_sessions(prompts, sessions),
}
try:
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).eval()
    retriever = rx.SIDRetriever(model, index, beam_width=500)
    found["SIDRetriever"] = lambda: retriever.retrieve(torch.ones(2, 5, dtype=torch.int64))
except ImportError:
    pass
for name, operation in found.items():
    print(json.dumps([name, errors_of(operation)]), flush=True)
"""


def test_every_operation_says_that_memory_is_short(tmp_path: Path) -> None:
    found = dict(json.loads(line) for line in output_of(LIMITED, tmp_path / "shop.trie").splitlines())
    assert len(found) >= 16
    for name, errors in found.items():
        assert errors, f"{name} never lacked memory: the test has shown nothing"
        for error in errors:
            assert re.search(r"memory|allocate|bad_alloc|^MemoryError: $", error), f"{name}: {error}"
            assert "API call failed" not in error
    assert f"OSError: [Errno 12] Cannot allocate memory: '{tmp_path}/shop.trie'" in found["TrieIndex.load"]
    assert all(f"{tmp_path}/shop.trie" in error for error in found["TrieIndex.load"])
    assert [path.name for path in tmp_path.iterdir()] == ["shop.trie"]
    assert rx.TrieIndex.load(tmp_path / "shop.trie").num_items == 100_000


# As much memory as its process holds, in pieces of 500 bytes: enough for an error's text, too little for its backtrace.
IN_PIECES = """
import ctypes, json, resource
import torch
import raddpo_ext as rx

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def error_of(operation):
    operation()
    pieces = [libc.malloc(500) for _ in range(4000)]
    every_other = pieces[::2]
    libc.malloc_trim(0)
    held = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (held, resource.RLIM_INFINITY))
    while libc.malloc(2000):
        pass
    for piece in every_other:
        libc.free(piece)
    try:
        operation()
    except (MemoryError, RuntimeError) as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return f"{type(error).__name__}: {error}"

index = rx.TrieIndex.build([[a, b] for a in range(50) for b in range(50)])
state = rx.BeamState.start(index, 2)
logits, targets = torch.randn(400, 2000), torch.randint(0, 2000, (400,))
step = rx.beam_step(logits[:2, None, :50], state, index, 50)
hidden, weight = torch.randn(2, 50, 8), torch.randn(50, 8)
tokens = torch.ones(5000, 4, dtype=torch.int64)
offsets, num_chosen = torch.arange(0, 5001, 100), torch.ones(50, dtype=torch.int64)
sessions = rx.SessionBatch(tokens, torch.full((5000,), 4), offsets, num_chosen)
logps = torch.randn(5000, 4)
for name, operation in {
    "beam_step": lambda: rx.beam_step(logits[:2, None, :50], state, index, 2000),
    "linear_beam_step": lambda: rx.linear_beam_step(hidden, weight, step, index, 50, normalize="trie", level=1),
    "token_logps": lambda: rx.token_logps(logits, targets),
    "rad_dpo_loss": lambda: rx.rad_dpo_loss(logps, sessions),
}.items():
    print(json.dumps([name, error_of(operation)]), flush=True)
"""


def test_memory_too_short_for_a_backtrace() -> None:
    found = dict(json.loads(line) for line in output_of(IN_PIECES).splitlines())
    assert len(found) == 4
    for name, error in found.items():
        assert str(error).startswith("RuntimeError: raddpo_ext: out of memory. Tried to allocate"), f"{name}: {error}"


def test_threads_that_cannot_start(tmp_path: Path) -> None:
    """Their work is done by those that can: a hundred threads' stacks do not fit, the index does."""
    script = """
import resource
import numpy as np, torch
import raddpo_ext as rx
sids = np.random.default_rng(0).integers(0, 256, (100_000, 4))
expected = rx.TrieIndex.build(sids, item_ids=np.arange(100_000)[::-1].copy()).data.numpy()
torch.set_num_threads(100)
held = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (held + 100 * 2**20, resource.RLIM_INFINITY))
index = rx.TrieIndex.build(sids, item_ids=np.arange(100_000)[::-1].copy())
assert (index.data.numpy() == expected).all()
assert index.restrict(np.arange(500)).num_items == 500
"""
    output_of(script)


@pytest.mark.parametrize("width", [2**31, 2**40, 2**63, 2**70])
def test_widths_beyond_32_bits(width: int) -> None:
    index = rx.TrieIndex.build([[1, 2]])
    state, logits = rx.BeamState.start(index, 1), torch.zeros(1, 1, 3)
    message = f"{{}} must be at most 2147483647, got {width}"
    with pytest.raises(ValueError, match=message.format("beam_width")):
        rx.beam_step(logits, state, index, width)
    with pytest.raises(ValueError, match=message.format("beam_width")):
        rx.linear_beam_step(logits, torch.zeros(3, 3), state, index, width)
    with pytest.raises(ValueError, match=message.format("beam_width")):
        rx.beam_search(lambda *_: logits, index, batch_size=1, beam_width=width)
    with pytest.raises(ValueError, match=message.format(r"beam_width\[1\]")):
        rx.beam_search(lambda *_: logits, index, batch_size=1, beam_width=[1, width])
    with pytest.raises(ValueError, match=message.format("top_k")):
        rx.beam_search(lambda *_: logits, index, batch_size=1, beam_width=1, top_k=width)


def test_rows_of_a_multiple_that_no_memory_holds() -> None:
    sessions = rx.SessionBatch(torch.ones(1, 1, dtype=torch.int64), *(torch.tensor(x) for x in ([1], [0, 1], [1])))
    for multiple in (2**50, 2**62, 2**63 - 1):
        with pytest.raises(RuntimeError, match="out of memory"):
            rx.pack_sessions([[1]], sessions, pad_to_multiple_of=multiple)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at most"):
        rx.pack_sessions([[1]], sessions, pad_to_multiple_of=2**63)
