"""What users of transformers' Trainer do with it, done with RADDPOTrainer: each habit has its effect, or is refused.

Accumulation, resuming, adapters, autocast and compiling have tests of their own in test_trainer.py.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
import datasets
import transformers
from support.tiny_models import qwen3, seeded, session_rows
from support.trainer_runs import Run, assert_same, assert_same_history, parameters_of, run, trainer_for

import raddpo_ext as rx
from raddpo_ext.integrations.transformers import RADDPOConfig, RADDPOTrainer, SessionCollator

pytestmark = pytest.mark.slow

ROWS = session_rows(16, empty=False)
SIDS = [[a, b, c] for a in range(4) for b in range(4) for c in range(2)]
INDEX = rx.TrieIndex.build(torch.tensor(SIDS), vocab=rx.SIDVocab([4, 4, 4], offsets=[3, 7, 11]))
EVAL = [
    {"prompt_ids": [1, 5 + i], "positives": [[3 + i % 4, 7, 11]], "negatives": [[3, 8, 12], [4, 9, 11]]}
    for i in range(6)
]
IN_ORDER = {"train_sampling_strategy": "sequential", "max_steps": 4}


def model() -> Any:
    return seeded(qwen3, num_hidden_layers=1)


def habit(rows: Any = ROWS, **options: Any) -> Run:
    return run(model(), rows, **{**IN_ORDER, **options})


@functools.cache
def plain() -> Run:
    return habit()


def losses(found: Run) -> list[float]:
    return [logs["loss"] for logs in found.history if "loss" in logs]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


NEUTRAL: dict[str, Callable[[], dict[str, Any]]] = {
    "accumulation": lambda: {"batch": 2, "accumulate": 4},
    "auto_find_batch_size": lambda: {"auto_find_batch_size": True},
    "columns of one's own": lambda: {"rows": [{**row, "user": "x", "labels": [1]} for row in ROWS]},
    "datasets.Dataset": lambda: {"rows": datasets.Dataset.from_list(ROWS)},
    "datasets' stream": lambda: {"rows": datasets.Dataset.from_list(ROWS).to_iterable_dataset()},
    "torch's stream": lambda: {"rows": Stream()},
    "a stream and workers": lambda: {"rows": Stream(), "batch": 8, "dataloader_num_workers": 1},
    "dataloader_num_workers": lambda: {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "dataloader_pin_memory": lambda: {"dataloader_pin_memory": True},
    "debug": lambda: {"debug": "underflow_overflow"},
    "empty cache": lambda: {"torch_empty_cache_steps": 1},
    "epochs for steps": lambda: {"max_steps": -1, "num_train_epochs": 2},
    "eval_on_start": lambda: {"eval_on_start": True, "eval_strategy": "steps", "extra": {"eval_dataset": EVAL}},
    "gradient_checkpointing": lambda: {"gradient_checkpointing": True},
    "label_names": lambda: {"label_names": ["positives"]},
    "logging_nan_inf_filter": lambda: {"logging_nan_inf_filter": False},
    "no hub": lambda: {"push_to_hub": False, "hub_model_id": "me/model"},
    "a collator": lambda: {"extra": {"data_collator": SessionCollator()}},
    "seedable sampler": lambda: {"accelerator_config": {"use_seedable_sampler": True}},
    "memory metrics": lambda: {"skip_memory_metrics": False},
    "split_batches": lambda: {"accelerator_config": {"split_batches": True}},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_habits_that_change_no_result(name: str) -> None:
    found = habit(**NEUTRAL[name]())
    assert_same(found.parameters, plain().parameters)
    assert losses(found) == pytest.approx(losses(plain()), rel=1e-6)


def test_optimizers_of_ones_own() -> None:
    """An optimizer and schedule that are given are the ones that step, over the parameters they hold alone."""
    ours = model()
    optimizer = torch.optim.SGD([ours.lm_head.weight], lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    start = parameters_of(ours)
    found = run(ours, ROWS, **IN_ORDER, extra={"optimizers": (optimizer, schedule)})
    assert [logs["learning_rate"] for logs in found.history[:4]] == [0.05, 0.025, 0.0125, 0.00625]
    moved = {name for name, value in found.parameters.items() if not torch.equal(value, start[name])}
    assert moved == {"lm_head.weight"}


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "rmsprop", "adagrad", "sgd"])
def test_optimizers_by_name(optim: str) -> None:
    found = habit(optim=optim, learning_rate=0.02, lr_scheduler_type="constant", max_steps=8)
    assert type(found.trainer.optimizer.optimizer).__name__.lower() == optim.removesuffix("_torch")
    assert found.history[6]["loss"] < found.history[0]["loss"]
    assert found.history[7]["loss"] < found.history[1]["loss"]


@pytest.mark.parametrize("kind", ["constant", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_schedules(kind: str) -> None:
    found = habit(lr_scheduler_type=kind, warmup_steps=2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = transformers.get_scheduler(kind, optimizer, num_warmup_steps=2, num_training_steps=4)
    expected = []
    for _ in range(4):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [logs["learning_rate"] for logs in found.history[:4]] == pytest.approx(expected)


def test_weight_decay_and_a_clipped_norm() -> None:
    """Decay pulls matrices towards 0 and leaves norms alone; a gradient is clipped as a whole."""
    decayed = habit(max_steps=1, weight_decay=0.5, max_grad_norm=0.0, lr_scheduler_type="constant")
    bare = habit(max_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant")
    start = parameters_of(model())
    for name, value in bare.parameters.items():
        pull = 0.01 * 0.5 * start[name] if value.dim() > 1 else 0
        torch.testing.assert_close(decayed.parameters[name], value - pull, rtol=0, atol=1e-6)
    clipped = habit(max_steps=1, max_grad_norm=0.1, lr_scheduler_type="constant")
    steps = [
        torch.cat([(start[name] - value).flatten() for name, value in found.parameters.items()])
        for found in (bare, clipped)
    ]
    assert float(steps[1].norm()) == pytest.approx(0.01 * 0.1, rel=1e-3)
    torch.testing.assert_close(steps[1] / steps[1].norm(), steps[0] / steps[0].norm(), rtol=0, atol=1e-3)


def test_seeds() -> None:
    """``seed`` and ``data_seed`` decide the order of the rows; the same ones give the same run."""

    def order(**options: Any) -> list[float]:
        return losses(run(model(), ROWS, batch=4, max_steps=4, **options))

    assert order(data_seed=1) == order(data_seed=1) != order(data_seed=2)
    assert order(seed=5) == order(seed=5) != order(seed=6)


def test_drop_last() -> None:
    """Of 16 rows in batches of 5 an epoch has three steps, not four."""
    for drop, steps in ((False, 4), (True, 3)):
        found = run(model(), ROWS, batch=5, max_steps=-1, num_train_epochs=1, dataloader_drop_last=drop)
        assert found.trainer.state.global_step == steps


def test_group_by_length_reads_every_row_once() -> None:
    seen: list[int] = []

    class Watched(SessionCollator):
        def __call__(self, rows: Any) -> Any:
            seen.extend(ROWS.index(row) for row in rows)
            return super().__call__(rows)

    options = {"max_steps": -1, "num_train_epochs": 1, "train_sampling_strategy": "group_by_length", "batch": 4}
    extra = {"data_collator": Watched(vocab_size=40)}
    made = run(model(), ROWS, **options, extra=extra)
    assert sorted(seen[-16:]) == list(range(16))
    longest = max(range(16), key=lambda number: made.trainer.data_collator.num_tokens(ROWS[number]))
    assert longest in seen[-16:-12]  # it comes first, so that a lack of memory shows at once


def test_bf16_weights() -> None:
    """A model whose own weights are bfloat16, as from_pretrained gives it: they stay so, and it learns."""
    found = run(model().to(torch.bfloat16), ROWS, **IN_ORDER, learning_rate=0.1)
    assert {value.dtype for value in found.parameters.values()} == {torch.bfloat16}
    assert found.history[0]["loss"] == pytest.approx(plain().history[0]["loss"], rel=0.05)
    assert found.history[2]["loss"] < found.history[0]["loss"]


def test_neftune() -> None:
    """Noise on the embeddings while training, none in an evaluation, and none that stays."""
    found = habit(neftune_noise_alpha=20.0, eval_strategy="steps", eval_steps=4, extra={"eval_dataset": EVAL})
    assert losses(found)[0] != losses(plain())[0]
    again = found.trainer.evaluate()
    assert again["eval_loss"] == found.trainer.evaluate()["eval_loss"] == found.history[4]["eval_loss"]
    assert not found.trainer.model.get_input_embeddings()._forward_hooks


def test_input_tokens_are_counted() -> None:
    """Those of the packed rows, prompt and candidates, padding left out."""
    found = habit(include_num_input_tokens_seen="all", max_steps=2)
    counts = [SessionCollator()(part)["packed"].input_ids.numel() for part in (ROWS[:8], ROWS[8:])]
    assert found.trainer.state.num_input_tokens_seen == sum(counts)
    assert found.history[0]["num_input_tokens_seen"] == counts[0]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


SAVING = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 5}


@pytest.mark.parametrize(("metric", "greater"), [("loss", False), ("sid_mrr", True)])
def test_load_best_model_at_end(metric: str, greater: bool, tmp_path: Path) -> None:
    """A rate so high that the last step is not the best: what is left are the best step's parameters."""
    found = habit(
        **{**SAVING, "learning_rate": 1.0, "metric_for_best_model": metric, "greater_is_better": greater},
        load_best_model_at_end=True,
        output_dir=str(tmp_path),
        extra={"eval_dataset": EVAL, "index": INDEX},
    )
    values = [logs[f"eval_{metric}"] for logs in found.history if f"eval_{metric}" in logs]
    best = (max if greater else min)(values)
    assert found.trainer.state.best_metric == best
    assert found.trainer.evaluate()[f"eval_{metric}"] == best
    saved = type(found.trainer.model).from_pretrained(found.trainer.state.best_model_checkpoint)
    assert_same(found.parameters, parameters_of(saved), 0)
    assert len(set(values)) > 1


def test_save_the_best_and_limit_the_rest(tmp_path: Path) -> None:
    best, limited = tmp_path / "best", tmp_path / "limited"
    options = {**SAVING, "extra": {"eval_dataset": EVAL}}
    found = habit(
        **{**options, "save_strategy": "best", "metric_for_best_model": "loss", "learning_rate": 1.0},
        output_dir=str(best),
    )
    values = [logs["eval_loss"] for logs in found.history if "eval_loss" in logs]
    assert checkpoints(best) == [i + 1 for i, value in enumerate(values) if value == min(values[: i + 1])]
    habit(**options, save_total_limit=2, output_dir=str(limited))
    assert checkpoints(limited) == [4, 5]


def test_save_only_the_model(tmp_path: Path) -> None:
    """Its weights, configuration and tokenizer are there, no optimizer's state; from_pretrained reads it."""
    found = habit(max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True, output_dir=str(tmp_path))
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"model.safetensors", "config.json"} <= names
    assert not names & {"optimizer.pt", "scheduler.pt", "similarity_weighting.pt"}
    found.trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-1", "final"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert_same(parameters_of(loaded), found.parameters, 0)


@pytest.mark.parametrize("how", ["path", "last", "stream"])
def test_resume(how: str, tmp_path: Path) -> None:
    """From a path, from the last checkpoint, in a stream: the losses of the unbroken run."""
    rows = Stream() if how == "stream" else ROWS
    options = {"batch": 4, "rows": rows, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    unbroken = habit(**options)
    options["save_strategy"] = "no"
    again = habit(**options, resume=True if how == "last" else str(tmp_path / "checkpoint-2"), max_steps=4)
    assert_same(again.parameters, unbroken.parameters, 0)
    assert losses(again) == losses(unbroken)


def test_early_stopping(tmp_path: Path) -> None:
    """After two evaluations without a better one, and not before."""
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    options = {**SAVING, "max_steps": 30, "learning_rate": 2.0, "lr_scheduler_type": "constant", "save_total_limit": 1}
    found = habit(
        **options,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        output_dir=str(tmp_path),
        extra={"eval_dataset": EVAL, "callbacks": [stop]},
    )
    values = [logs["eval_loss"] for logs in found.history if "eval_loss" in logs]
    assert found.trainer.state.global_step == len(values) < 30
    assert min(values) == values[-3] < min(values[-2:])


def test_callbacks() -> None:
    """They meet each step once, see its metrics, and can end the run and ask for an evaluation."""
    seen: list[tuple[str, Any]] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(("step", state.global_step))
            control.should_evaluate = state.global_step == 1
            control.should_training_stop = state.global_step == 3

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(("log", logs.get("rewards/margins")))

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            seen.append(("evaluate", metrics["eval_loss"]))

    found = habit(extra={"eval_dataset": EVAL, "callbacks": [Watch()]}, max_steps=10)
    assert [value for kind, value in seen if kind == "step"] == [1, 2, 3]
    margins = [logs["rewards/margins"] for logs in found.history if "rewards/margins" in logs]
    assert [value for kind, value in seen if kind == "log" and value is not None] == margins
    assert [kind for kind, _ in seen].count("evaluate") == 1
    assert len(margins) == 3


def test_logs_on_disk(tmp_path: Path) -> None:
    """A callback that writes them as JSON lines, and the trainer's own files."""

    class Lines(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            with open(tmp_path / "log.jsonl", "a") as file:
                file.write(json.dumps(logs) + "\n")

    found = habit(extra={"callbacks": [Lines()]}, report_to="none", logging_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[:2]] == losses(found)
    made = trainer_for(model(), ROWS, output_dir=str(tmp_path), **IN_ORDER)
    result = made.train()
    made.save_metrics("train", result.metrics)
    made.save_state()
    assert json.loads((tmp_path / "train_results.json").read_text())["train_loss"] == result.training_loss
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [logs["loss"] for logs in state["log_history"][:-1]] == pytest.approx(losses(plain()))


@pytest.mark.parametrize("steps", [1, 2, 0.5])
def test_logging_steps(steps: float) -> None:
    """Means over what came since; a fraction is one of all steps."""
    found = losses(habit(logging_steps=steps))
    every = 2 if steps == 0.5 else int(steps)
    expected = [sum(losses(plain())[i : i + every]) / every for i in range(0, 4, every)]
    assert found == pytest.approx(expected)


def test_several_evaluation_sets() -> None:
    """Each under its name, equal to an evaluation of it alone."""
    parts = {"first": EVAL[:2], "rest": datasets.Dataset.from_list(EVAL[2:])}
    found = habit(eval_strategy="epoch", max_steps=2, extra={"eval_dataset": parts, "index": INDEX})
    for name, rows in parts.items():
        (logged,) = (logs for logs in found.history if f"eval_{name}_loss" in logs)
        alone = found.trainer.evaluate(rows, metric_key_prefix=f"eval_{name}")
        for metric in ("loss", "rewards/margins", "sid_recall@5", "sid_mrr"):
            assert logged[f"eval_{name}_{metric}"] == alone[f"eval_{name}_{metric}"], metric


def test_predict_and_evaluate_alone(tmp_path: Path) -> None:
    """Without training, and without a training set; ``predict`` gives a row's figures, which add up to the metrics."""
    made = trainer_for(model(), None, output_dir=str(tmp_path), extra={"eval_dataset": EVAL, "index": INDEX})
    before = parameters_of(made.model)
    metrics = made.evaluate()
    predicted = made.predict(EVAL)
    assert predicted.predictions.shape[0] == len(EVAL)
    for name in ("loss", "sft", "sid_ndcg@5", "sid_mrr"):
        assert predicted.metrics[f"test_{name}"] == metrics[f"eval_{name}"]
    assert predicted.predictions[:, 0].sum() / len(EVAL) == pytest.approx(metrics["eval_preference"])
    assert_same(parameters_of(made.model), before, 0)
    streamed = made.evaluate(datasets.Dataset.from_list(EVAL).to_iterable_dataset())
    assert streamed["eval_sid_mrr"] == metrics["eval_sid_mrr"]


@pytest.mark.parametrize("options", [{"eval_accumulation_steps": 1}, {"dataloader_drop_last": True}])
def test_options_that_leave_an_evaluation_alone(options: dict[str, Any], tmp_path: Path) -> None:
    values = []
    for more in ({}, options):
        made = trainer_for(model(), ROWS, output_dir=str(tmp_path), extra={"eval_dataset": EVAL}, **more)
        values.append(made.evaluate()["eval_loss"])
    assert values[0] == values[1]


def test_prediction_loss_only(tmp_path: Path) -> None:
    """Nothing is retrieved, and the loss and its parts are what they are otherwise."""
    found = []
    for only in (False, True):
        extra = {"eval_dataset": EVAL, "index": INDEX}
        made = trainer_for(model(), ROWS, output_dir=str(tmp_path), extra=extra, prediction_loss_only=only)
        found.append(made.evaluate())
    assert found[0]["eval_loss"] == found[1]["eval_loss"]
    assert found[0]["eval_rewards/margins"] == found[1]["eval_rewards/margins"]
    assert "eval_sid_mrr" in found[0]
    assert not any("sid_" in name for name in found[1])


def test_evaluation_in_bfloat16(tmp_path: Path) -> None:
    made = trainer_for(model(), ROWS, output_dir=str(tmp_path), extra={"eval_dataset": EVAL}, bf16_full_eval=True)
    exact = trainer_for(model(), ROWS, output_dir=str(tmp_path), extra={"eval_dataset": EVAL}).evaluate()["eval_loss"]
    assert made.evaluate()["eval_loss"] == pytest.approx(exact, rel=0.05)
    assert made.evaluate()["eval_loss"] != exact


def test_max_steps_and_epochs(tmp_path: Path) -> None:
    """``max_steps`` wins; a fraction of an epoch is one; a stream needs ``max_steps``."""
    for options, steps in [
        ({"max_steps": 3, "num_train_epochs": 1}, 3),
        ({"max_steps": -1, "num_train_epochs": 0.5}, 2),
        ({"max_steps": -1, "num_train_epochs": 1.5}, 6),
    ]:
        assert run(model(), ROWS, batch=4, **options).trainer.state.global_step == steps
    with pytest.raises(ValueError, match="max_steps"):
        trainer_for(model(), Stream(), output_dir=str(tmp_path), max_steps=-1).train()


def test_two_runs_of_one_trainer(tmp_path: Path) -> None:
    """``train()`` again begins a run anew with the model as it is: a schedule and steps of its own."""
    made = trainer_for(model(), ROWS, output_dir=str(tmp_path), **{**IN_ORDER, "max_steps": 2})
    made.train()
    halfway = parameters_of(made.model)
    made.train()
    assert made.state.global_step == 2
    assert any(not torch.equal(value, halfway[name]) for name, value in parameters_of(made.model).items())


@pytest.mark.parametrize("kind", ["json", "yaml", "dict"])
def test_options_from_a_file(kind: str, tmp_path: Path) -> None:
    """By HfArgumentParser, as transformers' scripts read them; to_json_string and back changes nothing."""
    given = {"output_dir": str(tmp_path), "beta": 0.5, "positives": "pooled", "eval_ks": [1, 5], "use_cpu": True}
    parser = transformers.HfArgumentParser(RADDPOConfig)
    if kind == "dict":
        (config,) = parser.parse_dict(given)
    else:
        path = tmp_path / f"options.{kind}"  # JSON is YAML too
        path.write_text(json.dumps(given))
        (config,) = (parser.parse_json_file if kind == "json" else parser.parse_yaml_file)(str(path))
    assert (config.beta, config.positives, config.eval_ks, config.learning_rate) == (0.5, "pooled", [1, 5], 1e-6)
    (again,) = parser.parse_dict(json.loads(config.to_json_string()), allow_extra_keys=True)
    assert again.loss_options == config.loss_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor must be 0.0, got 0.1: the preference has its own, label_smoothing",
        ),
        ({"batch_eval_metrics": True}, "batch_eval_metrics must be False, got True"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches must be True, got False"),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics must be [], got ['inputs']"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches must be False"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, ImportError), match=f"(?i){re.escape(message)}"):
        trainer_for(model(), ROWS, output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    "name", ["compute_metrics", "model_init", "compute_loss_func", "preprocess_logits_for_metrics"]
)
def test_arguments_that_are_refused(name: str, tmp_path: Path) -> None:
    """What the trainer does itself is no argument of it, and Python says so by its name."""
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        RADDPOTrainer(model(), RADDPOConfig(output_dir=str(tmp_path), use_cpu=True), **{name: lambda *_: None})


def test_metrics_of_ones_own(tmp_path: Path) -> None:
    """By a subclass, as for any Trainer: they are logged, and can choose the best model."""

    class Ours(RADDPOTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_ours"] = metrics["eval_sft"] - metrics["eval_rewards/margins"]
            return metrics

    config = RADDPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=0.1,
        optim="sgd",
        metric_for_best_model="ours",
        save_total_limit=1,
        **SAVING,
    )
    made = Ours(model(), config, train_dataset=ROWS, eval_dataset=EVAL)
    made.train()
    assert made.state.best_metric is not None


def test_history_equals_the_plain_runs() -> None:
    """The whole log of a habit's run, not only its losses, where nothing should differ."""
    assert_same_history(habit(rows=Stream(), batch=8).history[:4], plain().history[:4])
