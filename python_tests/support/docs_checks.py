"""What the Python blocks of the README and of docs/ must have made: a check a block, run by ``test_docs.py`` behind it.

A check takes the names that the page has so far, as attributes, and ``weights_before``: the model's before the block.
"""

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import softplus

import raddpo_ext as rx
from raddpo_ext.data.session_picture import draw

Page = SimpleNamespace
ROOT = Path(__file__).resolve().parents[2]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def log_probs(model: torch.nn.Module, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Of each candidate's tokens ``[C, L]`` behind a prompt ``[T]``, by a plain forward: float64 ``[C, L]``."""
    logits = model(torch.cat((prompt.expand(len(tokens), -1), tokens), 1)).logits[:, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def found_items(found: rx.BeamResult, index: rx.TrieIndex, shape: tuple[int, int]) -> None:
    """Items of the index, each once, with their SIDs and log-probs, best first."""
    items, scores, sids = found.items, found.scores, found.sids
    assert (items.dtype, scores.dtype, sids.dtype) == (torch.int64, torch.float32, torch.int64)
    assert items.shape == scores.shape == sids.shape[:2] == shape
    assert torch.equal(index.sids_of(items.flatten()).view_as(sids), sids)
    assert all(len(set(row)) == shape[1] for row in items.tolist())
    assert (scores <= 0).all()
    assert (scores.diff() <= 0).all()


def model_scores(found: rx.BeamResult, index: rx.TrieIndex, model: torch.nn.Module, prompts: list[Tensor]) -> None:
    """The scores are the model's own."""
    for query, prompt in enumerate(prompts):
        tokens = index.vocab.encode(found.sids[query])
        close(found.scores[query], log_probs(model, prompt, tokens).sum(1))


def changed(before: dict[str, Tensor], model: torch.nn.Module) -> None:
    """A step went through the whole model: its matrices are others, and finite."""
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        assert value.dim() < 2 or not torch.equal(value.cpu(), before[name].cpu()), f"{name} has not changed"


def session_loss(page: Page, **options: object) -> None:
    """``result`` is the reference's of ``logps``, those are torch's, and the gradient has reached ``hidden``."""
    logits = page.hidden.double() @ page.head.weight.double().T
    expected = logits.log_softmax(-1).gather(-1, page.sessions.tokens[..., None])[..., 0]
    assert page.logps.dtype == torch.float32
    assert (page.logps < 0).all()
    close(page.logps, expected)
    reference = rx.reference.rad_dpo_loss(expected, page.sessions, **options)
    close(page.result.loss, reference.loss)
    close(page.result.rewards, reference.rewards)
    assert page.result.sft > 0
    assert 0 <= page.result.accuracy <= 1
    assert page.hidden.grad.isfinite().all()
    assert (page.hidden.grad != 0).any()


def evaluated(page: Page, beam_width: int) -> None:
    """The evaluation's retrieval is that of a retriever with its beam, and its loss is there."""
    metrics = next(entry for entry in reversed(page.trainer.state.log_history) if "eval_loss" in entry)
    assert metrics["eval_loss"] > 0
    assert metrics["eval_sft"] > 0
    retriever = rx.SIDRetriever(page.model.eval(), page.trainer.index, beam_width=beam_width)
    recall = []
    for row in page.rows:
        prompt = torch.tensor([row["prompt_ids"]], device=page.model.device)
        found = page.vocab.encode(retriever.retrieve(prompt, top_k=10).sids[0]).tolist()
        recall.append(sum(sid in found for sid in row["positives"]) / len(row["positives"]))
    assert metrics["eval_sid_recall@10"] == sum(recall) / len(recall)
    assert 0 <= metrics["eval_sid_ndcg@10"] <= 1
    assert 0 <= metrics["eval_sid_mrr"] <= 1


def readme_search(page: Page) -> None:
    found_items(page.found, page.index, (4, 10))


def readme_retrieval(page: Page) -> None:
    found_items(page.found, page.index, (2, 10))
    model_scores(page.found, page.index, page.model, list(page.input_ids))


def readme_loss(page: Page) -> None:
    session_loss(page, beta=2.0, sft_weight=0.1)


def readme_loop(page: Page) -> None:
    changed(page.weights_before, page.model)
    candidates = torch.tensor(page.rows[0]["positives"] + page.rows[0]["negatives"])
    assert page.index.lookup(candidates - torch.tensor([1000, 1256, 1512]))[0].tolist() == [17, 4, 30]


def readme_trainer(page: Page) -> None:
    changed(page.weights_before, page.model)
    evaluated(page, page.config.eval_beam_width)


def readme_policy(page: Page) -> None:
    changed(page.weights_before, page.model)
    assert page.trainer.state.global_step == 3


def losses_functions(page: Page) -> None:
    session_loss(page, beta=2.0, sft_weight=0.1)
    assert page.result.margins.shape == (3 + 2,)  # the winners' pairs


def losses_module(page: Page) -> None:
    reference = rx.reference.rad_dpo_loss(page.logps.double(), page.sessions)  # until a window is full, weights are 1
    close(page.loss, reference.loss)
    assert all(value.isfinite() for value in page.metrics.values())


def training_rows(page: Page) -> None:
    for row in page.rows:
        for sid in row["positives"] + row["negatives"]:
            assert [int(token - 1000) // 256 for token in sid] == [0, 1, 2]  # a code of each level
    assert page.vocab.encode(torch.tensor([[3, 4, 3]])).tolist() == page.rows[0]["positives"]


def training_loop(page: Page) -> None:
    changed(page.weights_before, page.model)
    assert page.result.loss > 0
    assert all(value.isfinite() for value in page.result.metrics.values())


def training_trainer(page: Page) -> None:
    changed(page.weights_before, page.model)
    evaluated(page, 10)


def training_streamed(page: Page) -> None:
    assert len(page.losses[0]) == 4


def training_packing(page: Page) -> None:
    assert page.packed.input_ids.tolist() == [[1, 5, 7, 1003, 1260, 1261, 1009, 1262]]
    assert page.packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 3, 4]]
    close(page.logps, log_probs(page.model, torch.tensor([1, 5, 7]), page.sessions.tokens))


def training_pages(page: Page) -> None:
    ids = torch.tensor([[1, 5, 7, 1003, 1260, 2, 1009, 1262]])
    with torch.no_grad():
        logps = page.model(ids).logits[0, 2:-1].log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0]
    weights = torch.tensor([1, 0.5, 1, 0.1, 0.05])
    close(page.page_loss.detach(), -(weights * logps).sum() / weights.sum())


def training_merged(page: Page) -> None:
    assert [page.merger.split(ids) for ids in page.ids] == page.prompts
    with torch.no_grad():
        expected = page.merged.lm_head(page.merged.model(page.packed.input_ids[:1, :5]).last_hidden_state[:, -1])
        close(page.states.hidden[:1] @ page.states.weight.T, expected)  # the first code's logits
    model_scores(page.found, page.index, page.merged, page.ids)


def training_negatives(page: Page) -> None:
    assert page.found.dtype == torch.int64
    assert page.found.shape == (1, 4)
    assert sorted(page.found[0].tolist()) == [-1, -1, 0, 2]  # the two other items under the code 3


def training_log(page: Page) -> None:
    """The report is compared with what the page shows; the picture is the page's too."""
    if not find_spec("matplotlib"):
        return
    from matplotlib.image import imread

    draw(page.check_sessions("sessions.jsonl"), Path("sessions.png"))
    new, shown = imread("sessions.png"), imread(ROOT / "docs/figures/session-check.png")
    assert new.shape == shown.shape
    assert abs(new - shown).mean() < 0.005  # another font renderer moves a few pixels


def training_metrics(page: Page) -> None:
    """By hand: 3 and 1 are wanted and stand at the places 2 and 4."""
    at = {place: 1 / math.log2(1 + place) for place in (1, 2, 4)}
    first = {name: float(values[0]) for name, values in page.metrics.items()}
    expected = {"recall@2": 0.5, "recall@4": 1, "mrr": 0.5}
    expected |= {"ndcg@2": at[2] / (at[1] + at[2]), "ndcg@4": (at[2] + at[4]) / (at[1] + at[2])}
    assert first.keys() == expected.keys()
    assert all(abs(first[name] - value) < 1e-9 for name, value in expected.items())


def own_loop_before(page: Page) -> None:
    close(page.logps, log_probs(page.model, page.prompt, page.candidates))
    rewards = 2 * page.logps.double().mean(1)
    close(page.before, ((rewards[1:] - rewards[0]).exp().sum() + 1).log())


def own_service_endpoint(page: Page) -> None:
    assert page.asyncio.run(page.endpoint([11, 12, 13])) == page.answer
    assert any(getattr(route, "path", "") == "/recommend" for route in page.app.routes)


def trl_rows(page: Page) -> None:
    assert page.rows[3] == {
        "prompt": "history <a_3><b_3><c_3>",
        "chosen": "<a_3><b_4><c_1>",
        "rejected": "<a_3><b_7><c_3>",
    }
    assert all(torch.equal(a, b) for a, b in zip(page.start.parameters(), page.model.parameters(), strict=True))


def trained(trainer: object, start: torch.nn.Module) -> list[float]:
    changed(start.state_dict(), trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    return losses


def trl_before(page: Page) -> None:
    assert abs(trained(page.before, page.start)[0] - math.log(2)) < 1e-3  # the reference is the model


def trl_after(page: Page) -> None:
    assert abs(trained(page.after, page.start)[0] - math.log(2)) < 1e-3


def trl_sessions(page: Page) -> None:
    trained(page.trainer, page.start)
    assert page.sessions[3]["rejected"] == ["<a_3><b_7><c_3>", "<a_3><b_3><c_3>"]


def minionerec_files(page: Page) -> None:
    assert json.loads((page.folder / "Industrial.index.json").read_text())["7"] == page.names[7]
    assert len(page.names) == 200
    for split in ("train", "valid", "test"):
        assert len((page.folder / f"{split}.csv").read_text().splitlines()) == 21


def minionerec_before(page: Page) -> None:
    assert page.before.dtype == torch.int64
    assert page.before.shape == (20, page.width + 4)
    found = page.before[:, page.width :].tolist()
    sids = {(*page.tokenizer.convert_tokens_to_ids(name), page.newline) for name in page.names.values()}
    assert len(set(map(tuple, found))) == 20
    assert set(map(tuple, found)) <= sids


def minionerec_after(page: Page) -> None:
    found_items(page.found, page.index, (1, 20))
    model_scores(page.found, page.index, page.model, list(page.prompt["input_ids"]))


def minionerec_split(page: Page) -> None:
    assert (page.catalogue.test[0].history, page.catalogue.test[0].item) == ([0, 1], 2)
    assert len(page.catalogue.train) == len(page.catalogue.test) == 20


def prefix_before(page: Page) -> None:
    assert page.before.dtype == torch.int64
    assert page.before.shape[0] == 8
    for row in page.before[:, page.width :].tolist():
        assert tuple(token for token in row if token not in (0, page.EOS)) in page.sids


def trainer_before(page: Page) -> None:
    expected = []
    for row in page.rows:
        tokens = torch.tensor(row["positives"] + row["negatives"])
        rewards = 2 * log_probs(page.model, torch.tensor(row["prompt_ids"]), tokens).mean(1)
        expected.append(softplus((rewards[1:] - rewards[0]).logsumexp(0)))
    close(page.Before.compute_loss(None, page.model, {"rows": page.rows}), torch.stack(expected).mean())


def howto_model(page: Page) -> None:
    logits = page.model(page.input_ids, attention_mask=page.attention_mask).logits
    assert not page.model.training
    assert logits.shape == (2, 6, 1000 + 3 * 256)
    assert page.input_ids.max() < 1000
    assert logits.isfinite().all()


def static_inputs(page: Page) -> None:
    assert page.sids.dtype == torch.int64
    assert page.sids.shape == (2000, 4)
    assert page.sids.min() >= 0
    assert page.sids.max() < page.size == len(page.table) == page.table.shape[1]


def static_before(page: Page) -> None:
    assert page.before.shape == (1, page.beams, 4)
    assert {tuple(sid) for sid in page.before[0].tolist()} <= {tuple(sid) for sid in page.unique.tolist()}


def static_after(page: Page) -> None:
    found_items(page.after, page.index, (1, page.beams))
    sids = page.after.sids[0]
    last = torch.cat((torch.full_like(sids[:, :1], page.start), sids[:, :-1]), 1)
    close(page.after.scores[0], page.table.double().log_softmax(-1)[last, sids].sum(1))


def serving_inputs(page: Page) -> None:
    assert page.index.num_items == 500
    assert max(page.index.max_tokens) < page.model.config.vocab_size
    assert page.vocab.encode(torch.tensor([[1, 2, 3]])).tolist() == [[101, 134, 167]]
    assert page.inputs["input_ids"].shape == page.inputs["attention_mask"].shape == (2, 4)


def serving_retrieval(page: Page) -> None:
    found_items(page.found, page.index, (2, 10))
    prompts = [ids[mask.bool()] for ids, mask in zip(*page.inputs.values(), strict=True)]
    model_scores(page.found, page.index, page.model, prompts)


def serving_store(page: Page) -> None:
    assert (page.first.version, page.store.current().version) == (1, 2)
    assert page.store.current().index.num_items == 500


def tutorial_catalogue(page: Page) -> None:
    written = json.loads((page.folder / "shop.index.json").read_text())
    assert list(map(int, written)) == list(range(len(page.stock)))
    assert len(set(page.stock)) == len(page.stock)
    assert written["7"] == [f"<{level}_{code}>" for level, code in zip("abc", page.stock[7], strict=True)]


def tutorial_visits(page: Page) -> None:
    visits = [json.loads(line) for line in (page.folder / "visits.jsonl").read_text().splitlines()]
    assert len(visits) == 1200
    for visit in visits:
        assert len(visit["history"]) == 4
        assert len(set(visit["shown"])) == len(visit["shown"])
        assert {visit["ordered"], *visit["clicked"]} <= set(visit["shown"]) <= set(range(len(page.stock)))


def tutorial_index(page: Page) -> None:
    assert page.index.num_items == len(page.stock)
    assert tuple(page.codes) == page.stock[7]
    assert page.tokens == [first + code for first, code in zip((1, 9, 17), page.codes, strict=True)]
    assert page.index.children([0, 1]).tolist() == [
        size for kind, colour, size in page.stock if (kind, colour) == (0, 1)
    ]
    assert torch.equal(rx.TrieIndex.load(page.folder / "shop.trie").sids_of([7]), page.index.sids_of([7]))


def tutorial_sessions(page: Page) -> None:
    assert len(page.sessions) == 1200
    for row, liked in zip(page.sessions, page.positives, strict=True):
        assert row["positives"] == rx.item_tokens(page.index, liked)
        assert row["negatives"]
        assert not any(sid in row["positives"] for sid in row["negatives"])
        assert row["prompt_ids"][0] == page.START
        assert max(row["prompt_ids"]) < 1 + sum(page.vocab.sizes)


def tutorial_model(page: Page) -> None:
    assert page.loss.dtype == torch.float32
    assert page.loss < math.log(1 + sum(page.vocab.sizes)) - 1  # a nat below one who guesses


def tutorial_retrieval(page: Page) -> None:
    found_items(page.found, page.index, (200, 10))
    model_scores(page.found, page.index, page.model, list(page.queries[:5]))
    for k in (1, 10):
        recall = (page.found.items[:, :k] == page.ordered).any(1).float().mean()
        assert page.before[f"recall@{k}"] == round(float(recall), 2)


def tutorial_names(page: Page) -> None:
    assert page.sid == ",".join(map(str, page.stock[7]))
    assert page.names.ids == [f"SKU-{item:04}" for item in range(len(page.stock))]
    assert page.names.titles == [page.title(item) for item in range(len(page.stock))]
    assert torch.equal(rx.TrieIndex.load(page.named).sids_of([7, 100]), page.index.sids_of([7, 100]))


def mathematics_helpers(page: Page) -> None:
    assert page.session([1, 2], [3]).lengths.tolist() == [2, 1]
    assert page.same(1.0, 1.0 + 1e-13)
    assert not page.same(1.0, 1.001)
    assert page.same(page.push([-1.0, -1.0]), [0.5, -0.5])


def papers_gram(page: Page) -> None:
    """Also of candidates with one SID, which are no pair."""
    logps = page.both.detach().double().requires_grad_()
    joint = logps.sum(2).exp().mean(0).log()
    expected = softplus((0.5 * (joint[1:] - joint[0])).logsumexp(0))
    close(page.gram.loss, expected)
    close(page.both.grad, torch.autograd.grad(expected, logps)[0])
    tokens = torch.tensor([[1003, 1260], [1003, 1260], [1009, 9]])
    sessions = rx.SessionBatch(tokens, torch.tensor([2, 2, 1]), torch.tensor([0, 3]), torch.tensor([1]))
    assert page.gram_loss(*page.both.detach(), sessions).kept.tolist() == [False, True]


#: Of each page its blocks' checks, in order; None where a block asserts itself. Of a page that is not here, all do.
CHECKS: dict[str, list[Callable[[Page], None] | None]] = {
    "README.md": [readme_search, readme_retrieval, readme_loss, readme_loop, readme_trainer, readme_policy],
    "docs/losses.md": [losses_functions, losses_module],
    "docs/training.md": [
        training_rows,
        training_loop,
        training_trainer,
        training_streamed,
        training_packing,
        training_pages,
        training_merged,
        training_negatives,
        training_log,
        training_metrics,
    ],
    "docs/howto/index.md": [howto_model],
    "docs/howto/minionerec.md": [minionerec_files, minionerec_before, minionerec_after, None, minionerec_split, None],
    "docs/howto/own-loop.md": [own_loop_before, None, None, None, None],
    "docs/howto/own-service.md": [None, own_service_endpoint],
    "docs/howto/prefix-allowed-tokens-fn.md": [prefix_before, None, None, None, None],
    "docs/howto/static.md": [static_inputs, static_before, static_after, None],
    "docs/howto/transformers-trainer.md": [trainer_before, None],
    "docs/howto/trl.md": [trl_rows, trl_before, trl_after, None, trl_sessions],
    "docs/mathematics.md": [mathematics_helpers, *[None] * 12],
    "docs/papers.md": [None, None, None, None, papers_gram],
    "docs/serving.md": [serving_inputs, serving_retrieval, None, None, None, serving_store],
    "docs/tutorial.md": [
        tutorial_catalogue,
        tutorial_visits,
        tutorial_index,
        tutorial_sessions,
        tutorial_model,
        tutorial_retrieval,
        None,
        None,
        tutorial_names,
    ],
}
