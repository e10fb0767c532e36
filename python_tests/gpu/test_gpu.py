"""How the operators run on a CUDA device: on which stream, in graphs, compiled. Skipped without a device."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from support.agreement import assert_scores_close, assert_states_equal
from support.beam_cases import NORMALIZE, exact_logits, generator_of, six_beams, wide_index
from support.logit_cases import MAPS, SUPPORTS, random_call, random_grad
from support.on_gpu import NEEDS_GPU, REPEATS, moved, no_synchronisation
from support.sample_cases import sample_state
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.decoding.row_lse import row_lse

pytestmark = NEEDS_GPU


def test_runs_on_the_current_stream() -> None:
    """Its input is made on a stream of its own, behind a long wait; nothing synchronises, and nothing waits for it."""
    index, state = wide_index(), six_beams()
    logits = exact_logits((2, 6, 1601), torch.float32, 0)
    expected = rx.beam_step(logits, state, index, 70)
    index, state, ready = index.to("cuda"), moved(state, "cuda"), logits.cuda()
    late = torch.full_like(ready, math.nan)
    assert (rx.beam_step(late, state, index, 70).nodes == -1).all()  # loads the kernels, and proves that NaN shows
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        late.copy_(ready)
        got = rx.beam_step(late, state, index, 70)
        waiting = not stream.query()
    assert waiting
    stream.synchronize()
    assert_states_equal(moved(got, "cpu"), expected)


def test_graph_capture_and_replay() -> None:
    index, state = wide_index(), six_beams()
    logits = [exact_logits((2, 6, 1601), torch.float32, seed) for seed in range(3)]
    on_device, device_state = index.to("cuda"), moved(state, "cuda")
    static = logits[0].cuda()
    rx.beam_step(static, device_state, on_device, 70)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rx.beam_step(static, device_state, on_device, 70)
    for values in [*logits, logits[0]]:
        static.copy_(values)
        graph.replay()
        assert_states_equal(moved(got, "cpu"), rx.beam_step(values, state, index, 70))


def test_never_synchronises() -> None:
    index, state = wide_index().to("cuda"), moved(six_beams(), "cuda")
    logits = torch.randn(2, 6, 1601, device="cuda")
    nodes = state.nodes.flatten()
    with no_synchronisation():
        for normalize in NORMALIZE:
            rx.beam_step(logits, state, index, 70, normalize=normalize)
        row_lse(logits.view(12, -1))
        index.paths(nodes)
        index.item_ranges(nodes)


def test_sample_step_in_a_graph() -> None:
    """Without a synchronisation; a replay draws what the CPU does, by the seed that it finds."""
    index, beams = wide_index(), six_beams()
    state = sample_state(beams.scores, beams.nodes, beams.scores + 1)
    on_device, device_state = index.to("cuda"), rx.SampleState(*(part.cuda() for part in vars(state).values()))
    logits = torch.randn(2, 6, 1601, generator=generator_of(0))
    static, seed = logits.cuda(), torch.tensor(0, device="cuda")
    with no_synchronisation():
        rx.sample_step(static, device_state, on_device, 70, seed=seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rx.sample_step(static, device_state, on_device, 70, seed=seed)
    for value in (3, 4):
        seed.fill_(value)
        graph.replay()
        expected = rx.sample_step(logits, state, index, 70, seed=value)
        assert got.nodes.tolist() == expected.nodes.tolist()
        assert_scores_close(got.perturbed.cpu(), expected.perturbed, "sample_step")


@pytest.mark.parametrize("beam_width", [70, 1500])
def test_identical_runs(beam_width: int) -> None:
    index, state = wide_index().to("cuda"), moved(six_beams(), "cuda")
    logits = torch.randn(2, 6, 1601, device="cuda", dtype=torch.bfloat16)  # few distinct values: many ties
    first = rx.beam_step(logits, state, index, beam_width)
    for _ in range(REPEATS):
        again = rx.beam_step(logits, state, index, beam_width)
        assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))


def test_compiles_to_one_graph() -> None:
    index, state = wide_index().to("cuda"), moved(six_beams(), "cuda")
    hidden = exact_logits((2, 6, 1601), torch.float32, 0).cuda()

    def step(hidden: Tensor, state: rx.BeamState) -> rx.BeamState:
        got = rx.beam_step(hidden * 2 + 1, state, index, 5, length_penalty=1.0)
        return rx.BeamState(got.scores - 1, got.tokens, got.parents, got.nodes)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for _ in range(2):
        assert_states_equal(moved(compiled(hidden, state), "cpu"), moved(step(hidden, state), "cpu"))


@pytest.mark.parametrize("normalize", [0, 1, 2])
def test_opcheck(normalize: int) -> None:
    index, state = wide_index().to("cuda"), moved(six_beams(), "cuda")
    logits = torch.randn(2, 6, 1601, device="cuda")
    arguments = (logits, state.scores, state.nodes, *index.block, None, -1, 5, normalize, 0.5)
    torch.library.opcheck(torch.ops.raddpo.beam_step, arguments)


def test_streams_of_several_threads() -> None:
    """Each on its own stream, at once, with its own workspace."""
    index, state = wide_index(), six_beams()
    on_device, device_state = index.to("cuda"), moved(state, "cuda")
    logits = [exact_logits((2, 6, 1601), torch.float32, seed) for seed in range(4)]
    wrong = []

    def work(values: Tensor) -> None:
        expected = rx.beam_step(values, state, index, 70)
        with torch.cuda.stream(torch.cuda.Stream()):
            values = values.cuda()
            for _ in range(2 * REPEATS):
                got = moved(rx.beam_step(values, device_state, on_device, 70), "cpu")
                if got.nodes.tolist() != expected.nodes.tolist():
                    wrong.append(got)

    torch.cuda.synchronize()
    workers = [threading.Thread(target=work, args=(values,)) for values in logits]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_retriever(name: str) -> None:
    """A model and its cache on the GPU: the CPU's items and scores."""
    transformers = pytest.importorskip("transformers")
    from raddpo_ext.integrations.retriever import SIDRetriever

    torch.manual_seed(0)
    shape = {"vocab_size": 120, "pad_token_id": 0, "eos_token_id": 2}
    if name == "qwen3":
        config = transformers.Qwen3Config(
            **shape, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.Qwen3ForCausalLM(config).eval()
    else:
        config = transformers.T5Config(
            **shape, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config).eval()
    sids = np.random.default_rng(0).integers(0, 12, (200, 3))
    index = rx.TrieIndex.build(sids, vocab=rx.SIDVocab([12] * 3, offset=50))
    prompts = torch.randint(3, 50, (3, 7), generator=generator_of(0))
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    results = [
        SIDRetriever(model.to(device), index.to(device), beam_width=20).retrieve(
            prompts.to(device), mask.to(device), 10
        )
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(results[1].scores.cpu(), results[0].scores, rtol=1e-3, atol=1e-3)
    assert results[1].items.device.type == "cuda"
    assert (results[1].items >= 0).all()


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_identical_runs(support: str, dtype: torch.dtype) -> None:
    call = random_call(40, 70_001, dtype, support, MAPS[0], 0).to("cuda")
    grad = random_grad(call.to("cpu"), 0).cuda()

    def run() -> tuple[Tensor, Tensor, Tensor]:
        logps, lse = torch.ops.raddpo.token_logps(*call)
        return logps, lse, torch.ops.raddpo.token_logps_backward(*call.backward(grad, lse))

    first = run()
    for _ in range(REPEATS):
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, run(), strict=True))


def test_token_logps_in_a_graph_without_synchronising() -> None:
    """Captured with its clusters of blocks, forward and backward in place; never synchronises."""
    calls = [random_call(12, 40_000, torch.float32, "lists", MAPS[0], seed).to("cuda") for seed in range(2)]
    grad = random_grad(calls[0].to("cpu"), 0).cuda()
    static, source = calls[0]._replace(logits=calls[0].logits.clone()), calls[0].logits.clone()

    def run() -> tuple[Tensor, Tensor]:
        static.logits.copy_(source)
        logps, lse = torch.ops.raddpo.token_logps(*static)
        arguments = static.backward(grad, lse)
        torch.ops.raddpo.token_logps_backward_(*arguments[:7], None, *arguments[7:])
        return logps, static.logits

    run()
    with no_synchronisation():
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for call in [*calls, calls[0]]:
        source.copy_(call.logits)
        graph.replay()
        replayed = [part.clone() for part in got]
        for one, other in zip(replayed, run(), strict=True):
            assert torch.equal(one, other)


def test_token_logps_on_a_stream() -> None:
    """Both passes wait for what their stream does before, and for nothing else."""
    call = random_call(12, 40_000, torch.float32, "vocab", MAPS[0], 0)
    ready, grad = call.to("cuda"), random_grad(call, 0).cuda()
    expected = torch.ops.raddpo.token_logps(*ready)
    fresh = torch.ops.raddpo.token_logps_backward(*ready.backward(grad, expected[1]))
    late = ready._replace(logits=torch.full_like(ready.logits, math.nan))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        late.logits.copy_(ready.logits)
        logps, lse = torch.ops.raddpo.token_logps(*late)
        got = torch.ops.raddpo.token_logps_backward(*late.backward(grad, lse))
        waiting = not stream.query()
    assert waiting
    stream.synchronize()
    assert torch.equal(logps, expected[0])
    assert torch.equal(got, fresh)


@pytest.mark.parametrize("support", SUPPORTS)
def test_token_logps_opcheck(support: str) -> None:
    call = random_call((2, 3), 100, torch.float32, support, MAPS[0], 0).to("cuda")
    torch.library.opcheck(torch.ops.raddpo.token_logps, tuple(call))
    arguments = call.backward(torch.ones(2, 3, device="cuda"), torch.zeros(2, 3, device="cuda"))
    torch.library.opcheck(torch.ops.raddpo.token_logps_backward, arguments)
