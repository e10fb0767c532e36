"""RADDPOTrainer in one process."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
import datasets
import transformers
from support.tiny_models import gpt2, llama, qwen3, seeded, session_rows, t5
from support.trainer_runs import assert_same, assert_same_history, run, trainer_for

import raddpo_ext as rx
from raddpo_ext.integrations.transformers import RADDPOConfig, RADDPOTrainer, SessionCollator, session_states

pytestmark = pytest.mark.slow

ROWS = session_rows(22)
WHOLE = {"batch": 22, "train_sampling_strategy": "sequential"}  # all rows at every step, in their order


def by_hand(model: Any, rows: list[dict[str, Any]], steps: int, rate: float = 0.01, **options: Any) -> list[dict]:
    """What the trainer does with one batch of all rows a step, in plain torch."""
    reference = options.pop("reference", None)
    weighting = rx.SimilarityWeighting(12)
    loss = rx.RADDPOLoss(weighting, **options)
    packed = SessionCollator()(rows)["packed"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    history = []
    for step in range(steps):
        states = session_states(model, packed)
        ref_logps = None if reference is None else reference(packed)
        output = loss(sessions=packed.sessions, ref_logps=ref_logps, **states._asdict())
        gradients = torch.autograd.grad(output.loss, parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * (1 - step / steps) * gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
        history.append({name: float(value) for name, value in output.metrics.items()})
    return history


def test_equals_a_loop_by_hand() -> None:
    model = seeded(qwen3).train()
    found = run(seeded(qwen3), ROWS, **WHOLE, max_steps=4, protect="positives", beta=1.5, sft_weight=0.5)
    history = by_hand(model, ROWS, 4, protect="positives", beta=1.5, sft_weight=0.5)
    assert_same(found.parameters, dict(model.named_parameters()))
    for logs, right in zip(found.history, history, strict=False):
        for name, value in right.items():
            assert logs[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert 0 < found.history[-2]["pair_weights"] < 1
    assert 0 < found.history[0]["detached"] < 1


@pytest.mark.parametrize(("positives", "batch", "accumulate"), [("winner", 4, 2), ("pooled", 1, 8)])
def test_accumulation_equals_one_big_batch(positives: str, batch: int, accumulate: int) -> None:
    """Also in an epoch's last step, which has fewer rows."""
    one = run(seeded(qwen3), ROWS, positives=positives)
    found = run(seeded(qwen3), ROWS, batch=batch, accumulate=accumulate, positives=positives)
    assert_same(found.parameters, one.parameters)
    assert_same_history(found.history, one.history)


def test_logs_are_means_over_steps() -> None:
    each = run(seeded(qwen3), ROWS, batch=4, accumulate=2, max_steps=4)
    two = run(seeded(qwen3), ROWS, batch=4, accumulate=2, max_steps=4, logging_steps=2)
    assert_same(two.parameters, each.parameters, 0)
    for name in ("loss", "preference", "sft"):
        pairs = [sum(logs[name] for logs in each.history[i : i + 2]) / 2 for i in (0, 2)]
        assert [logs[name] for logs in two.history[:2]] == pytest.approx(pairs)
    assert two.history[0]["loss"] == pytest.approx(two.history[0]["preference"] + two.history[0]["sft"])


@pytest.mark.parametrize(("dropout", "stop"), [(0.0, 4), (0.3, 3)])
def test_a_resumed_run_is_an_unbroken_one(dropout: float, stop: int, tmp_path: Any) -> None:
    options = {"batch": 4, "accumulate": 2, "disable_dropout": False, "max_steps": 6, "use_reference": True}
    make = {"resid_pdrop": dropout, "attn_pdrop": dropout}
    folder = str(tmp_path)
    saving = {"save_strategy": "steps", "save_steps": stop}
    unbroken = run(seeded(gpt2, **make), ROWS, output_dir=folder, **saving, **options)
    again = run(seeded(gpt2, **make), ROWS, resume=f"{folder}/checkpoint-{stop}", **options)
    assert_same(again.parameters, unbroken.parameters, 0)
    assert_same_history(again.history[:-1], unbroken.history[:-1], 0)
    assert len(again.history) == 7
    weights = [logs["pair_weights"] for logs in unbroken.history[:-1]]
    assert min(weights[stop:]) < 1
    # Rewards of a model with dropout differ from those of its reference before the first step.
    assert (unbroken.history[0]["rewards/chosen"] == 0) == (dropout == 0)
    mine, right = (r.trainer.objective.similarity_weighting.state_dict() for r in (again, unbroken))
    torch.testing.assert_close(mine, right, rtol=0, atol=0, equal_nan=True)


def streamed(folder: Path, passes: int) -> Any:
    """Shards of JSON lines, shuffled as they are read."""
    for shard in range(4):
        lines = [json.dumps(row) for row in ROWS[6 * shard : 6 * shard + 6]]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    files = [str(path) for path in sorted(folder.glob("*.jsonl"))]
    read = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    return read.shuffle(seed=0, buffer_size=5).repeat(passes)


@pytest.mark.parametrize(("stop", "passes"), [(2, 1), (3, 1), (5, 3)])  # a pass is of three steps
def test_a_resumed_run_over_streamed_files_is_an_unbroken_one(stop: int, passes: int, tmp_path: Path) -> None:
    options = {"batch": 8, "max_steps": 7}
    saving = {"save_strategy": "steps", "save_steps": stop, "output_dir": str(tmp_path / "run")}
    unbroken = run(seeded(qwen3), streamed(tmp_path, passes), **saving, **options)
    again = run(seeded(qwen3), streamed(tmp_path, passes), resume=f"{tmp_path}/run/checkpoint-{stop}", **options)
    assert_same(again.parameters, unbroken.parameters, 0)
    assert_same_history(again.history[:-1], unbroken.history[:-1], 0)


def test_the_order_of_a_later_pass_over_a_stream_is_not_resumed(tmp_path: Path) -> None:
    options = {"batch": 8, "max_steps": 6, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 5}
    run(seeded(qwen3), streamed(tmp_path, 1), **options)
    checkpoint = f"{tmp_path}/checkpoint-5"
    with pytest.raises(ValueError, match="checkpoint-5' was saved in pass 2 over a stream"):
        run(seeded(qwen3), streamed(tmp_path, 1), resume=checkpoint, **options)
    begun = run(seeded(qwen3), streamed(tmp_path, 1), resume=checkpoint, ignore_data_skip=True, **options)
    assert begun.trainer.state.global_step == 6


KILLED = """
import os, signal
from test_trainer import KILL_OPTIONS, ROWS, run, seeded, qwen3
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

run(seeded(qwen3), ROWS, output_dir={folder!r}, extra={{"callbacks": [Kill()]}}, **KILL_OPTIONS)
"""
KILL_OPTIONS = {"batch": 4, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}


def test_a_killed_run_goes_on_where_it_was_saved(tmp_path: Any) -> None:
    """Between its checkpoint and its next step, by a signal that nothing can catch."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, "-c", KILLED.format(folder=str(tmp_path))]
    dead = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths})
    assert dead.returncode == -signal.SIGKILL
    again = run(seeded(qwen3), ROWS, output_dir=str(tmp_path), resume=True, **KILL_OPTIONS)
    unbroken = run(seeded(qwen3), ROWS, **KILL_OPTIONS)
    assert_same(again.parameters, unbroken.parameters, 0)
    assert_same_history(again.history[:-1], unbroken.history[:-1], 0)


def test_disable_dropout() -> None:
    for make, options in (
        (gpt2, {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
        (llama, {"attention_dropout": 0.5}),
        (t5, {"dropout_rate": 0.5}),
    ):
        found, plain = (run(seeded(make, **o), ROWS, max_steps=1) for o in (options, {}))
        assert_same(found.parameters, plain.parameters, 0)


def test_reference() -> None:
    """A frozen copy, and a model that is given."""
    options = {**WHOLE, "max_steps": 3, "beta": 0.5, "length_normalized": False}

    def logps_of(model: Any) -> Any:
        plain = rx.RADDPOLoss()

        def reference(packed: Any) -> torch.Tensor:
            with torch.no_grad():
                states = session_states(model, packed)
                return plain(states.hidden, states.weight, packed.sessions, rows=states.rows).logps

        return reference

    for other in (None, seeded(llama)):
        reference = seeded(qwen3) if other is None else other
        model = seeded(qwen3).train()
        history = by_hand(model, ROWS, 3, reference=logps_of(reference), beta=0.5, length_normalized=False)
        extra = {} if other is None else {"ref_model": other}
        found = run(seeded(qwen3), ROWS, use_reference=other is None, extra=extra, **options)
        assert_same(found.parameters, dict(model.named_parameters()))
        assert (found.history[0]["rewards/chosen"] == 0) == (other is None)
        assert found.history[2]["rewards/margins"] == pytest.approx(history[2]["rewards/margins"], rel=1e-5)
        assert not any(parameter.requires_grad for parameter in found.trainer.ref_model.parameters())


def test_adapters_alone_are_trained() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    torch.manual_seed(3)
    model = get_peft_model(seeded(qwen3), config).train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def reference(packed: Any) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            states = session_states(model, packed)
            return rx.RADDPOLoss()(states.hidden, states.weight, packed.sessions, rows=states.rows).logps

    by_hand(model, ROWS, 4, reference=reference)
    for checkpointing in (False, True):
        torch.manual_seed(3)
        found = run(
            seeded(qwen3),
            ROWS,
            **WHOLE,
            max_steps=4,
            use_reference=True,
            gradient_checkpointing=checkpointing,
            extra={"peft_config": config},
        )
        assert_same(found.parameters, dict(model.named_parameters()))
        assert found.trainer.ref_model is None
        for name, parameter in found.parameters.items():
            assert torch.equal(parameter, start[name]) != ("lora_" in name), name


@pytest.mark.parametrize(("make", "reentrant"), [(qwen3, False), (t5, True)])
def test_gradient_checkpointing_changes_nothing(make: Any, reentrant: bool) -> None:
    plain = run(seeded(make), ROWS, max_steps=2)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_same(run(seeded(make), ROWS, max_steps=2, **checkpointing).parameters, plain.parameters)


def catalogue() -> tuple[rx.TrieIndex, dict[int, list[int]]]:
    """27 SIDs, of 2 of which two items each, and each item's tokens."""
    codes = [[a, b, c] for a in range(3) for b in range(3) for c in range(3)] + [[0, 0, 0], [1, 2, 0]]
    vocab = rx.SIDVocab([4, 4, 4], offsets=[3, 7, 11])
    items = {100 + row: [3 + a, 7 + b, 11 + c] for row, (a, b, c) in enumerate(codes)}
    return rx.TrieIndex.build(torch.tensor(codes), item_ids=torch.tensor(list(items)), vocab=vocab), items


def catalogue_rows(count: int) -> list[dict[str, Any]]:
    """Every third row without a positive, every fourth without a negative."""
    _, items = catalogue()
    source, rows = random.Random(1), session_rows(count)
    for number, row in enumerate(rows):
        row["items"] = source.sample(sorted(items), (number % 3))
        row["positives"] = [items[item] for item in row["items"]]
        row["negatives"] = [items[item] for item in source.sample(sorted(items), number % 4)]
    return rows


def scores_by_hand(model: Any, prompt: list[int], items: dict[int, list[int]]) -> dict[int, float]:
    """Each item's log-prob, by a forward of its own."""
    tokens = torch.tensor(list(items.values()))
    prompts = torch.tensor([prompt]).expand(len(tokens), -1)
    with torch.no_grad():
        logits = model(input_ids=torch.cat((prompts, tokens), 1)).logits[:, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
    return dict(zip(items, logps.tolist(), strict=True))


def gain(ranks: list[int], wanted: int, k: int) -> float:
    return sum(1 / math.log2(1 + r) for r in ranks if r <= k) / sum(1 / math.log2(2 + i) for i in range(min(k, wanted)))


def test_evaluation_equals_brute_force() -> None:
    """Over batches of three rows: the means are the rows', not the batches'."""
    index, items = catalogue()
    rows = catalogue_rows(10)
    model = seeded(qwen3)
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, "eval_beam_width": 27, "similarity_weighting": False, "sft_weight": 0.5}
        trainer = trainer_for(seeded(qwen3), ROWS, extra={"index": index, "eval_dataset": rows}, **options)
        metrics = trainer.evaluate()
    packed = SessionCollator(embeddings=False)(rows)["packed"]
    states = session_states(model, packed)
    right = rx.RADDPOLoss(sft_weight=0.5)(sessions=packed.sessions, **states._asdict()).metrics
    for name in ("loss", "preference", "sft", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert metrics[f"eval_{name}"] == pytest.approx(float(right[name]), rel=1e-5, abs=1e-6), name
    assert metrics["eval_rewards/accuracies"] == pytest.approx(float(right["rewards/accuracies"]))

    expected: dict[str, list[float]] = {}
    for row in rows:
        if not row["items"]:
            continue
        scores = scores_by_hand(model, row["prompt_ids"], items)
        found = sorted(items, key=lambda item: (-round(scores[item], 4), item))
        sids = list(dict.fromkeys(tuple(items[item]) for item in found))
        levels = {
            "item": [found.index(item) + 1 for item in row["items"]],
            "sid": [sids.index(sid) + 1 for sid in {tuple(items[item]) for item in row["items"]}],
        }
        for level, ranks in levels.items():
            ranks = [rank for rank in ranks if rank <= 27]
            wanted = len(levels[level])
            for k in (1, 5):
                expected.setdefault(f"{level}_recall@{k}", []).append(sum(r <= k for r in ranks) / wanted)
                expected.setdefault(f"{level}_ndcg@{k}", []).append(gain(ranks, wanted, k))
            expected.setdefault(f"{level}_mrr", []).append(1 / min(ranks))
    for name, values in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(sum(values) / len(values)), name
    assert 0 < metrics["eval_sid_recall@5"] < 1
    assert metrics["eval_item_mrr"] != metrics["eval_sid_mrr"]


def test_evaluation_in_a_run() -> None:
    """It leaves training as it is, the similarity weighting too, and without items there are no metrics of items."""
    index, _ = catalogue()
    plain = run(seeded(qwen3), ROWS, max_steps=4, similarity_window=24)
    rows = [{name: value for name, value in row.items() if name != "items"} for row in catalogue_rows(5)]
    extra = {"index": index, "eval_dataset": rows}
    found = run(
        seeded(qwen3), ROWS, max_steps=4, similarity_window=24, eval_strategy="steps", eval_steps=1, extra=extra
    )
    assert_same(found.parameters, plain.parameters, 0)
    evaluations = [logs for logs in found.history if "eval_loss" in logs]
    assert len(evaluations) == 4
    assert "eval_sid_mrr" in evaluations[0]
    assert "eval_item_mrr" not in evaluations[0]
    assert [logs["loss"] for logs in found.history if "loss" in logs] == [
        logs["loss"] for logs in plain.history if "loss" in logs
    ]


@pytest.mark.parametrize("normalize", ["level", "trie"])
def test_other_supports_and_layouts(normalize: str) -> None:
    rows = catalogue_rows(8)
    index, _ = catalogue()
    options: dict[str, Any] = {"normalize": normalize, "max_steps": 2, "extra": {"index": index}}
    found = run(seeded(qwen3), rows, **options)
    trie = run(seeded(qwen3), rows, layout="trie", pad_to_multiple_of=8, **options)
    assert_same(trie.parameters, found.parameters)
    assert found.history[0]["sft"] < run(seeded(qwen3), rows, max_steps=1).history[0]["sft"]


def test_encoder_decoder() -> None:
    one = run(seeded(t5), ROWS, max_steps=2)
    assert_same(run(seeded(t5), ROWS, batch=4, accumulate=2, max_steps=2).parameters, one.parameters)


def test_bf16() -> None:
    plain = run(seeded(qwen3), ROWS, max_steps=2)
    bf16 = run(seeded(qwen3), ROWS, max_steps=2, bf16=True)
    assert bf16.parameters["lm_head.weight"].dtype == torch.float32
    assert bf16.history[0]["loss"] != plain.history[0]["loss"]
    assert bf16.history[1]["loss"] == pytest.approx(plain.history[1]["loss"], rel=0.05)


def test_compile() -> None:
    small = {"num_hidden_layers": 1}
    plain, compiled = (
        run(seeded(qwen3, **small), ROWS, max_steps=1, **options)
        for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )
    assert type(compiled.trainer.model_wrapped).__name__ == "OptimizedModule"
    assert_same(compiled.parameters, plain.parameters)


def test_truncated_and_dropped() -> None:
    """Shares over the rows and the pairs of a log."""
    rows = [{"prompt_ids": [5] * 46, "positives": [[3, 7]], "negatives": [[4, 7, 11], [3, 7]]}] * 2
    rows += [{"prompt_ids": [5], "positives": [[3, 7]], "negatives": [[4, 8], [4, 9]]}] * 6
    found = run(seeded(qwen3), rows, batch=2, accumulate=4, max_steps=1)
    assert found.history[0]["truncated_prompts"] == pytest.approx(2 / 8)
    assert found.history[0]["dropped_pairs"] == pytest.approx(2 / 16)


def test_bad_input(tmp_path: Any) -> None:
    def config(**options: Any) -> RADDPOConfig:
        return RADDPOConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, **options)

    for options, message in [
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"eval_ks": [5, 60]}, "eval_ks must name cut-offs up to eval_beam_width = 50, got"),
        ({"eval_ks": []}, "eval_ks must name cut-offs"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(**options)
    for options, message in [
        ({"beta": -1.0}, "beta must be"),
        ({"protect": "loser"}, "protect must be one of"),
        ({"positives": "all"}, "positives must be one of"),
        ({"normalize": "level"}, "normalize = 'level' needs vocab"),
        ({"similarity_window": 1}, "window must be at least 2"),
        ({"layout": "tree"}, "layout must be one of"),
        ({"max_length": 3}, r"max_length = 3 leaves prompts\[\d\] no token"),
    ]:
        with pytest.raises(ValueError, match=message):
            RADDPOTrainer(seeded(qwen3), config(**options), train_dataset=ROWS).train()
    with pytest.raises(TypeError, match="args must be a RADDPOConfig, got TrainingArguments"):
        RADDPOTrainer(seeded(qwen3), transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="index must be a TrieIndex, got list"):
        RADDPOTrainer(seeded(qwen3), config(), index=[1])
    several = config()
    several._n_gpu = 2
    with pytest.raises(ValueError, match=r"args\.n_gpu must be at most 1, got 2"):
        RADDPOTrainer(seeded(qwen3), several)
    row = {"prompt_ids": [1], "positives": [[99]], "negatives": []}
    with pytest.raises(ValueError, match=r"rows\[\d\] holds token id 99, outside \[0, 40\)"):
        RADDPOTrainer(seeded(qwen3), config(), train_dataset=[row]).train()


def test_a_checkpoint_without_the_weighting(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever stops a write midway leaves no half file; a checkpoint without the file is told of."""
    run(seeded(qwen3), ROWS, output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    assert [path.name for path in checkpoint.glob("similarity_weighting*")] == ["similarity_weighting.pt"]
    (checkpoint / "similarity_weighting.pt").unlink()
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        run(seeded(qwen3), ROWS, resume=str(checkpoint), max_steps=2)
    assert any("similarity_weighting starts from scratch" in record.getMessage() for record in caplog.records)
