"""RADDPOTrainer on two ranks, by DDP and by FSDP2: what one process with the whole batch does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import on_ranks
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
from support.tiny_models import qwen3, seeded, session_rows
from support.trainer_runs import assert_same, assert_same_history, run

import raddpo_ext as rx

pytestmark = pytest.mark.slow

STEPS = 5
# The first four rows of every eight have no pair, and the first two nothing at all: with four rows a batch rank 0 then
# never sees a pair, and it counts as little as it should. Every eight rows have 18 pairs: the window holds two steps.
PATTERN = [(0, 0), (0, 0), (2, 0), (0, 3), (2, 3), (1, 1), (3, 3), (1, 2)]
KINDS = {"DDP": DistributedDataParallel, "FSDP2": FSDPModule}
SHARED: dict[str, Any] = {"max_steps": STEPS, "train_sampling_strategy": "sequential", "similarity_window": 36}


def rows_in_pattern() -> list[dict[str, Any]]:
    rows = session_rows(8 * STEPS, codes=3)
    for number, row in enumerate(rows):
        positives, negatives = PATTERN[number % 8]
        sids = [[3 + code // 9 % 3, 7 + code // 3 % 3, 11 + code % 3] for code in range(number, number + 27)]
        # Distinct, so that no pair is dropped; some share a prefix, and one is short.
        sids[0], row["items"] = sids[0][:2], [1000 + number * 3 + i for i in range(positives)]
        row["positives"], row["negatives"] = sids[:positives], sids[positives : positives + negatives]
    return rows


def join(fsdp: bool) -> dict[str, Any]:
    """Makes accelerate find this rank's process group anew. On CPUs it leaves FSDP out, so it is told of GPUs."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_TORCH_DEVICE": "cpu"})
    kind = DistributedType.MULTI_GPU if fsdp else DistributedType.MULTI_CPU
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", kind)
    return {"fsdp": True} if fsdp else {}


def ways() -> dict[str, dict[str, Any]]:
    """Of each run the options on two ranks that one process has otherwise."""
    from peft import LoraConfig

    adapters = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    return {
        "plain": {"batch": 4},
        "accumulated": {"batch": 2, "accumulate": 2},
        "reference": {"batch": 4, "use_reference": True, "gradient_checkpointing": True},
        "adapters": {"batch": 4, "use_reference": True, "extra": adapters},
        "streamed": {"batch": 4},
    }


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(rows_in_pattern())


def rows_of(way: str) -> Any:
    return Stream() if way == "streamed" else rows_in_pattern()


def evaluated(made: Any) -> dict[str, float]:
    """Over eleven rows: not as many for each rank."""
    metrics = made.trainer.evaluate(rows_in_pattern()[:11])
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second", "time"))}


def catalogue() -> dict[str, Any]:
    sids = [[a, b, c] for a in range(3) for b in range(3) for c in range(3)] + [[0, 0, 0]]
    vocab = rx.SIDVocab([3, 3, 3], offsets=[3, 7, 11])
    return {"index": rx.TrieIndex.build(torch.tensor(sids), item_ids=torch.arange(1000, 1028), vocab=vocab)}


def rank(folder: str) -> dict[str, Any]:
    rows = rows_in_pattern()
    found: dict[str, Any] = {}
    for kind, wrapper in KINDS.items():
        options = {**SHARED, **join(kind == "FSDP2")}
        for way, more in ways().items():
            made = run(seeded(qwen3), rows_of(way), **more, **options)
            assert isinstance(made.trainer.model_wrapped, wrapper)
            found[f"{kind}, {way}"] = made.parameters, made.history
        made = run(seeded(qwen3), rows, batch=4, extra=catalogue(), **options)
        found[f"{kind}, evaluated"] = evaluated(made)

        saved = {"output_dir": f"{folder}/{kind}", "save_strategy": "steps", "save_steps": 3}
        options["optim"] = "adamw_torch"  # torch cannot load FSDP2's optimizer if it has no state
        unbroken = run(seeded(qwen3), rows, batch=4, **saved, **options)
        again = run(seeded(qwen3), rows, batch=4, resume=f"{folder}/{kind}/checkpoint-3", **options)
        assert_same(again.parameters, unbroken.parameters, 0)
        assert_same_history(again.history[:-1], unbroken.history[:-1], 0)
    return found


def test_equals_one_process(tmp_path: Any) -> None:
    rows = rows_in_pattern()
    every = on_ranks(rank, str(tmp_path))
    for way, more in ways().items():
        one = run(seeded(qwen3), rows_of(way), **{**more, "batch": 8, "accumulate": 1}, **SHARED)
        assert one.history[-2]["pair_weights"] < 0.95
        for found in every:
            for kind in KINDS:
                parameters, history = found[f"{kind}, {way}"]
                assert_same(parameters, one.parameters)
                assert_same_history(history, one.history)
    metrics = evaluated(run(seeded(qwen3), rows, batch=8, extra=catalogue(), **SHARED))
    assert metrics["eval_item_mrr"] > 0
    for found in every:
        for kind in KINDS:
            assert found[f"{kind}, evaluated"] == pytest.approx(metrics, rel=1e-5), kind
