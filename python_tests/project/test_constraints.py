"""The constraints that the retrieval benchmark times allow the same tokens."""

import pytest
import torch

pytest.importorskip("transformers")
import raddpo_ext as rx
from benchmarks.peers import compare_generate, retriever_cases
from benchmarks.peers.constraints import KINDS, Constraints
from raddpo_ext.bench.retriever import children_of, generate, random_model

VOCAB, WIDTH, LENGTH = 300, 4, 5


@pytest.mark.parametrize("kind", KINDS)
def test_generate_finds_what_the_retriever_finds(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sids = torch.randint(32, (60, 3), generator=generator)
    vocab = rx.SIDVocab([32] * 3, offset=200)
    index = rx.TrieIndex.build(sids, vocab=vocab)
    constraints = Constraints(index, children_of(vocab.encode(sids).tolist()), WIDTH)
    model = random_model(VOCAB, 64, 1)
    prompts = torch.randint(200, (2, LENGTH), generator=generator)
    for _ in range(2):  # each call has a processor of its own
        processor = constraints.make(kind, prompts)
        found = generate(model, prompts, width=WIDTH, levels=3, logits_processor=[processor])
        expected = rx.SIDRetriever(model, index, beam_width=WIDTH).retrieve(prompts)
        assert torch.equal(found[:, LENGTH:], vocab.encode(expected.sids.flatten(0, 1)))


def test_cases_and_table() -> None:
    cases = [*retriever_cases.CASES, *retriever_cases.GENERATE]
    assert len({case.name for case in cases}) == len(cases)
    ways = [case for case in cases if case.generate == "all"]
    assert [case.batch for case in ways] == [1, 4]
    assert set(ways[0].peers.values()) == {"", *KINDS}
    cell = {"case": "constraint W=2", "costs": {kind: {"ms": 2.0} for kind in KINDS}}
    cell["ratios"] = {f"{KINDS[2]} / dict": {"median": 0.5, "least": 0.4, "most": 0.6}}
    assert "| constraint W=2 | 2.0 | 2.0 | 2.0 | 0.50x (0.40-0.60) |" in compare_generate.markdown([cell])
    assert compare_generate.markdown([{"case": "a", "costs": {"shared vocab": {"ms": 1.0}}}]) == ""
