"""PolicyTrainer in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
from support.policy_runs import CODES, INDEX, policy_trainer, prefix_reward, prompt_rows, run_policy
from support.tiny_models import llama, qwen3, seeded, t5
from support.trainer_runs import assert_same, assert_same_history

import raddpo_ext as rx
from raddpo_ext.integrations.rollouts import kept_rows
from raddpo_ext.integrations.transformers import PolicyConfig, PolicyTrainer, session_states

pytestmark = pytest.mark.slow

ROWS = prompt_rows(16)


def small(**options: Any) -> Any:
    return seeded(qwen3, num_hidden_layers=1, **options)


def by_hand(model: Any, rows: list[dict[str, Any]], steps: int, iterations: int = 1, reference: Any = None) -> None:
    """What the trainer does with one batch of eight rows a step, with SGD at a constant rate."""
    retriever = rx.SIDRetriever(model, INDEX, beam_width=5, normalize="trie")
    head = rx.RADDPOLoss(normalize="trie", index=INDEX)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def logps_of(policy: Any, packed: Any) -> torch.Tensor:
        states = session_states(policy, packed)
        return head.logps(states.hidden, states.weight, packed.sessions, rows=states.rows)

    for step in range(steps):
        batch = [rows[(step * 8 + i) % len(rows)] for i in range(8)]
        prompts = [row["prompt_ids"] for row in batch]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
        found = retriever.retrieve(ids, (ids > 0).long())
        sids = found.sids.flatten(0, 1)
        groups = rx.SessionBatch(
            INDEX.vocab.lookup(sids, torch.full((40,), 3)),
            torch.full((40,), 3),
            torch.arange(9) * 5,
            torch.zeros(8, dtype=torch.int64),
        )
        rewards = prefix_reward(found.items.flatten(), sids, [row for row in batch for _ in range(5)])
        advantages = rx.group_advantages(rewards, groups)
        kept, places = groups.select(advantages.active)
        alive = advantages.active.nonzero()[:, 0].tolist()
        packed = rx.pack_sessions([prompts[i] for i in alive], kept, layout="trie", embeddings=False)
        more: dict[str, Any] = {}
        if reference is not None:
            with torch.no_grad():
                more = {"ref_logps": logps_of(reference, packed), "kl_weight": 0.5}
        old = None
        for _ in range(iterations):
            logps = logps_of(model, packed)
            output = rx.policy_loss(logps, kept, advantages.values[places], old_logps=old, clip=(0.01, 0.02), **more)
            old = logps.detach() if old is None else old
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()


@pytest.mark.parametrize(("iterations", "kl_weight"), [(1, 0.0), (2, 0.5)])
def test_equals_a_loop_by_hand(iterations: int, kl_weight: float) -> None:
    model = seeded(qwen3)
    by_hand(model, ROWS, 3, iterations, seeded(qwen3) if kl_weight else None)
    found = run_policy(
        seeded(qwen3),
        ROWS,
        rollouts="beams",
        clip=[0.01, 0.02],
        kl_weight=kl_weight,
        num_iterations=iterations,
        max_steps=3 * iterations,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    assert_same(found.parameters, dict(model.named_parameters()))
    if iterations == 2:
        assert found.history[0]["approx_kl"] == 0 < found.history[1]["approx_kl"]
        assert found.history[0]["kl"] == 0 < found.history[2]["kl"]
        assert found.history[1]["clipped/low"] + found.history[1]["clipped/high"] > 0
        assert found.history[0]["reward"] == found.history[1]["reward"] != found.history[2]["reward"]


@pytest.mark.parametrize(("iterations", "kl_weight"), [(1, 0.0), (2, 0.5)])
def test_what_only_predicts_forced_tokens_is_not_read(
    iterations: int, kl_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But in steps that measure the mass of legal tokens, of which each token has some."""
    rows = [{"prompt_ids": row["prompt_ids"], "items": row["items"], "first": row["first"]} for row in ROWS]
    index = rx.TrieIndex.build(torch.tensor(CODES[::4]), vocab=INDEX.vocab)
    read: list[int] = []

    def noting(model: Any, packed: Any, **options: Any) -> Any:
        read.append(packed.input_ids.numel())
        return session_states(model, packed, **options)

    monkeypatch.setattr("raddpo_ext.integrations.session_states.session_states", noting)
    runs, tokens = [], []
    for logging_steps in (1, 99):
        read.clear()
        runs.append(
            run_policy(
                seeded(qwen3),
                rows,
                kl_weight=kl_weight,
                num_iterations=iterations,
                max_steps=2 * iterations,
                max_grad_norm=0.0,
                logging_steps=logging_steps,
                extra={"index": index},
            )
        )
        tokens.append(sum(read))
    assert_same(runs[1].parameters, runs[0].parameters)
    assert tokens[1] < 0.9 * tokens[0]


@pytest.mark.parametrize("preset", ["grpo_sr", "eg_grpo"])
def test_dead_groups_left_out_change_nothing(preset: str) -> None:
    """One step equals one on the loss of all groups, with their experts; one of eight has none and is dead."""
    seen: list[Any] = []

    def noting(items: Any, sids: Any, rows: Any, sessions: Any) -> torch.Tensor:
        seen.extend((sessions, prefix_reward(items, sids, rows)))
        return seen[1]

    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1, "extra": {"reward_fn": noting}}
    found = run_policy(small(), ROWS, preset=preset, rollouts="beams", **options)
    model, (groups, rewards) = small(), seen
    experts = rx.POLICY_PRESETS[preset]["experts"]
    advantages = rx.group_advantages(rewards, groups, experts=experts)
    assert 0 < int(advantages.active.sum()) < 8
    packed = rx.pack_sessions([row["prompt_ids"] for row in ROWS[:8]], groups, layout="trie", embeddings=False)
    states = session_states(model, packed)
    logps = rx.RADDPOLoss(normalize="trie", index=INDEX).logps(states.hidden, states.weight, groups, rows=states.rows)
    rx.policy_loss(logps, groups, advantages.values, **rx.POLICY_PRESETS[preset]).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    assert_same(found.parameters, dict(model.named_parameters()))


WAYS: dict[str, dict[str, Any]] = {
    "grpo": {"rollouts": "sample"},
    "dapo": {"rollouts": "independent", "temperature": 1.3, "scale": "batch"},
    "grpo_sr": {"rollouts": "sample", "normalize": "vocab"},
    "eg_grpo": {"rollouts": "sample", "kl_weight": 0.5, "num_iterations": 2, "count": "all", "aggregate": "token"},
    "dr_grpo": {"rollouts": "beams", "credit": "siblings", "protect": "positives"},
    "minionerec": {"rollouts": "independent", "credit": "marginal"},
}


@pytest.mark.parametrize("preset", WAYS)
def test_accumulation_equals_one_big_batch(preset: str) -> None:
    """Also in an epoch's last step, which has fewer rows; the marginal credit may leave none but dead groups."""
    rows = ROWS[:12] if preset != "eg_grpo" else ROWS
    one, found = (
        run_policy(small(), rows, preset=preset, max_steps=4, batch=batch, accumulate=8 // batch, **WAYS[preset])
        for batch in (8, 2)
    )
    assert_same(found.parameters, one.parameters)
    assert_same_history(found.history, one.history)
    assert 0 < one.history[0]["active"] < 1
    assert any(not torch.equal(p, one.parameters[name]) for name, p in small().named_parameters())


@pytest.mark.parametrize("stop", [6, 7])
def test_a_resumed_run_is_an_unbroken_one(stop: int, tmp_path: Any) -> None:
    """Within the second epoch, between the two iterations over one batch of rollouts too, with a reward that draws."""

    def drawing(items: Any, sids: Any, rows: Any) -> torch.Tensor:
        torch.rand(3)
        return prefix_reward(items, sids, rows)

    options: dict[str, Any] = {
        "batch": 4,
        "accumulate": 2,
        "num_iterations": 2,
        "max_steps": 8,
        "kl_weight": 0.2,
        "preset": "eg_grpo",
        "train_sampling_strategy": "random",
    }
    rows, folder, options["extra"] = prompt_rows(17), str(tmp_path), {"reward_fn": drawing}
    unbroken = run_policy(small(), rows, output_dir=folder, save_strategy="steps", save_steps=stop, **options)
    torch.manual_seed(99)
    again = run_policy(small(), rows, resume=f"{folder}/checkpoint-{stop}", **options)
    assert_same(again.parameters, unbroken.parameters, 0)
    assert_same_history(again.history[:-1], unbroken.history[:-1], 0)
    assert unbroken.history[0]["reward"] == unbroken.history[1]["reward"]
    assert len({logs["reward"] for logs in unbroken.history[:8]}) == 4
    assert (tmp_path / f"checkpoint-{stop}" / "rollouts_0.pt").exists() == (stop == 7)


@pytest.mark.parametrize("rollouts", ["sample", "independent", "beams"])
def test_the_reward_rises(rollouts: str) -> None:
    found = run_policy(small(), ROWS[:8], rollouts=rollouts, max_steps=12, learning_rate=0.05, optim="adamw_torch")
    rewards = [logs["reward"] for logs in found.history[:-1]]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3


def test_adapters_alone_are_trained() -> None:
    """And their start is the reference."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    found = run_policy(seeded(qwen3), ROWS, kl_weight=0.5, max_steps=3, extra={"peft_config": config})
    torch.manual_seed(3)
    start = dict(policy_model(config).named_parameters())
    assert found.trainer.ref_model is None
    assert found.history[0]["kl"] == 0 < found.history[2]["kl"]
    for name, parameter in found.parameters.items():
        assert torch.equal(parameter, start[name]) != ("lora_" in name), name


def policy_model(config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(seeded(qwen3), config)


def test_reference_that_is_given() -> None:
    own, other = (
        run_policy(small(), ROWS, kl_weight=0.5, max_steps=1, extra=extra)
        for extra in ({}, {"ref_model": seeded(llama)})
    )
    assert own.history[0]["kl"] == 0 < other.history[0]["kl"]
    assert not any(parameter.requires_grad for parameter in other.trainer.ref_model.parameters())


def fed(found: list[int]) -> Any:
    """Counts the tokens that the packed rows of a model's training forwards hold."""

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            found.append(int((kwargs["input_ids"] != 0).sum()))

    return hook


def packed_tokens(sessions: rx.SessionBatch, keep: torch.Tensor) -> int:
    """The number of tokens of some groups with prompts of three tokens."""
    some, _ = sessions.select(keep)
    packed = rx.pack_sessions([[20, 21, 22]] * some.num_sessions, some, layout="trie", embeddings=False)
    return int((packed.input_ids != 0).sum())


@pytest.mark.parametrize(("preset", "kl_weight"), [("grpo", 0.0), ("grpo", 0.3), ("grpo_sr", 0.0), ("grpo_sr", 0.3)])
def test_dead_groups_never_reach_the_model(preset: str, kl_weight: float) -> None:
    """Their experts do where the likelihood counts every group, and all of them where the KL does."""
    tokens: list[int] = []
    model = small()
    model.get_decoder().register_forward_pre_hook(fed(tokens), with_kwargs=True)
    rows = [{**row, "prompt_ids": [20, 21, 22]} for row in ROWS[:8]]
    drawn: list[rx.SessionBatch] = []

    def one_is_alive(items: Any, sids: Any, rows: Any, sessions: Any) -> list[float]:
        drawn.append(sessions)
        return [float(owner == 3 and i % 2) for i, owner in enumerate(sessions.owners().tolist())]

    found = run_policy(model, rows, preset=preset, kl_weight=kl_weight, max_steps=1, extra={"reward_fn": one_is_alive})
    assert found.history[0]["active"] == 1 / 8
    alive = torch.arange(8) == 3
    expected = packed_tokens(drawn[0], alive)
    if preset == "grpo_sr":
        rest = drawn[0] if kl_weight else kept_rows(drawn[0], drawn[0].is_positive())[0]
        expected += packed_tokens(rest, ~alive & (rest.offsets.diff() > 0))
    assert tokens == [expected]


@pytest.mark.parametrize("batch", [8, 2])
def test_a_dead_batch_is_a_step_of_zero(batch: int) -> None:
    tokens: list[int] = []
    model = small()
    model.get_decoder().register_forward_pre_hook(fed(tokens), with_kwargs=True)
    found = run_policy(
        model,
        ROWS,
        batch=batch,
        accumulate=8 // batch,
        num_iterations=2,
        max_steps=2,
        optim="adamw_torch",
        extra={"reward_fn": lambda items, sids, rows: [0.5] * len(rows)},
    )
    assert_same(found.parameters, dict(small().named_parameters()), 0)
    assert found.history[1]["loss"] == found.history[1]["grad_norm"] == found.history[1]["active"] == 0
    assert "legal_mass" not in found.history[1]
    assert tokens == [1] * (16 // batch)


def test_logs_equal_brute_force() -> None:
    """With more samples than SIDs the rollouts are the catalogue, and every mean is exact."""
    model = small()
    rows = [{**row, "prompt_ids": [20, 21, 22 + i]} for i, row in enumerate(ROWS[:4])]
    found = run_policy(small(), rows, num_generations=30, max_steps=1, temperature=1.5)
    codes = torch.tensor(CODES)
    tokens = INDEX.vocab.lookup(codes, torch.full((27,), 3))
    expected: dict[str, list[float]] = {}
    for row in rows:
        inputs = torch.cat((torch.tensor([row["prompt_ids"]]).expand(27, -1), tokens), 1)
        with torch.no_grad():
            logits = model(input_ids=inputs).logits[:, 2:-1].double() / 1.5
        nodes = INDEX.nodes(tokens)
        target = tokens[..., None]
        over_trie = rx.token_logps(logits, tokens, normalize="trie", index=INDEX, nodes=nodes).double().sum(1)
        valid = logits.log_softmax(-1).gather(2, target).sum((1, 2)).exp().sum()
        mass = rx.legal_mass(logits, INDEX, nodes).exp().mean()
        p, rewards = over_trie.exp(), prefix_reward(codes, codes, [row] * 27).double()
        for name, value in (
            ("reward", (p * rewards).sum()),
            ("reward_std", rewards.std()),
            ("active", rewards.any()),
            ("distinct", 27),
            ("entropy", -(p * over_trie).sum()),
            ("valid", valid),
            ("legal_mass", mass),
        ):
            expected.setdefault(name, []).append(float(value))
    logs = {**found.history[0], "valid": 1 - found.history[0]["invalid"]}
    for name, values in expected.items():
        assert logs[name] == pytest.approx(sum(values) / 4, rel=1e-4), name


def test_options_of_trainer() -> None:
    """Checkpointed and compiled models train as plain ones, and autocast leaves the weights in float32."""
    plain = run_policy(small(), ROWS, max_steps=2)
    for options in (
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ):
        found = run_policy(small(), ROWS, max_steps=2, **options)
        assert_same(found.parameters, plain.parameters)
    bf16 = run_policy(small(), ROWS, max_steps=2, bf16=True)
    assert bf16.parameters["lm_head.weight"].dtype == torch.float32
    assert bf16.history[1]["grad_norm"] == pytest.approx(plain.history[1]["grad_norm"], rel=0.2)


def test_long_prompts_lose_their_first_tokens() -> None:
    """So many that a rollout fits into the window; a row of stand-ins has the size of a row of rollouts."""
    rows = [{**row, "prompt_ids": [25] * 15 + [20 + i % 9 for i in range(45)]} for i, row in enumerate(ROWS[:8])]
    short = [{**row, "prompt_ids": row["prompt_ids"][15:]} for row in rows]
    found, right = (run_policy(small(), given, max_steps=2) for given in (rows, short))
    assert_same(found.parameters, right.parameters, 0)
    assert (found.history[0]["truncated_prompts"], right.history[0]["truncated_prompts"]) == (1, 0)
    packed = found.trainer.data_collator(short)["packed"]
    assert packed.sessions.offsets.diff().tolist() == [5 + len(row["positives"]) for row in short]


def test_evaluation() -> None:
    """As RADDPOTrainer's, whatever the rows' rollouts; training goes on as without it."""
    from raddpo_ext.integrations.transformers import RADDPOConfig, RADDPOTrainer

    plain = run_policy(small(), ROWS, max_steps=2)
    extra = {"eval_dataset": ROWS[:7]}
    found = run_policy(small(), ROWS, max_steps=2, eval_strategy="steps", eval_steps=1, extra=extra)
    assert_same(found.parameters, plain.parameters, 0)
    shared = {"output_dir": found.trainer.args.output_dir, "use_cpu": True, "eval_beam_width": 20, "eval_ks": [1, 5]}
    rows = [{**row, "negatives": []} for row in ROWS[:7]]
    right = RADDPOTrainer(found.trainer.model, RADDPOConfig(**shared), eval_dataset=rows, index=INDEX).evaluate()
    metrics = [logs for logs in found.history if "eval_item_mrr" in logs]
    assert len(metrics) == 2
    for name in ("sid_recall@5", "sid_mrr", "item_ndcg@5", "item_mrr"):
        assert metrics[1][f"eval_{name}"] == pytest.approx(right[f"eval_{name}"])


def test_encoder_decoder_and_collisions() -> None:
    """SIDs of one to three codes that end in a token, one of which two items have."""
    vocab = rx.SIDVocab([3, 3, 3], offsets=[3, 7, 11], eos=2)
    codes = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 1, 2], [1, 0, 0], [2, 2, 2], [2, 2, 2], [1, 2, 0]])
    lengths = torch.tensor([1, 2, 3, 1, 3, 3, 2])
    index = rx.TrieIndex.build(codes, lengths=lengths, vocab=vocab, item_ids=torch.arange(100, 107))
    rows = [{"prompt_ids": [20 + i], "positives": [[3, 8, 2]] * (i % 2), "bought": 100 + i} for i in range(4)]

    def bought(items: Any, sids: Any, rows: Any) -> torch.Tensor:
        assert set(items.tolist()) == {100, 101, 102, 103, 104, 106}
        return (items == torch.tensor([row["bought"] for row in rows])) + 0.5 * (sids[:, 0] == 0)

    for make, rollouts in ((t5, "beams"), (qwen3, "beams")):
        found = run_policy(
            seeded(make),
            rows,
            batch=4,
            rollouts=rollouts,
            num_generations=9,
            preset="eg_grpo",
            max_steps=2,
            extra={"index": index, "reward_fn": bought},
        )
        assert found.history[0]["distinct"] == 6
        assert found.history[0]["active"] == 1


def test_rewards_of_the_package() -> None:
    """A function that names them gets the groups and the ground truth."""

    def minionerec(items: Any, sids: Any, rows: Any, sessions: Any, targets: Any) -> torch.Tensor:
        hits = rx.rewards.match(sessions, targets)
        assert hits.tolist() == [float(i in row["items"]) for i, row in zip(items.tolist(), rows, strict=True)]
        assert len(rows) == sessions.num_candidates == len(sids)
        return hits + rx.rewards.ranking(hits > 0, sessions)

    extra = {"reward_fn": minionerec}
    found = run_policy(
        small(), ROWS, rollouts="beams", preset="minionerec", num_generations=20, max_steps=1, extra=extra
    )
    assert 0 < found.history[0]["active"] < 1


def test_bad_input(tmp_path: Any) -> None:
    def config(**options: Any) -> PolicyConfig:
        return PolicyConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, **{"num_generations": 4, **options})

    for options, message in [
        ({"preset": "ppo"}, "preset must be one of .*'grpo'.*, got 'ppo'"),
        ({"rollouts": "greedy"}, "rollouts must be one of 'sample', 'independent', 'beams', got 'greedy'"),
        ({"normalize": "level"}, "normalize must be one of 'trie', 'vocab', got 'level'"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": 0.5, "rollouts": "beams"}, "temperature must be 1 with rollouts = 'beams', got 0.5"),
        ({"kl_weight": -0.1}, "kl_weight must be at least 0, got -0.1"),
        ({"experts": "all"}, "experts must be one of 'none', 'group', 'nll', got 'all'"),
        ({"nll_weight": 0.5}, "nll_weight needs experts = 'group' or 'nll', got 'none'"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(**options)

    def trainer(given: Any = None, rows: Any = ROWS, **extra: Any) -> PolicyTrainer:
        arguments = {"reward_fn": prefix_reward, "index": INDEX, **extra}
        return PolicyTrainer(small(), given or config(), train_dataset=rows, **arguments)

    truth = [{"prompt_ids": [20], "positives": [sid]} for sid in ([3, 7, 14], [3, 7])]
    for given, message in [
        ({"given": config(objective="ppo")}, "objective must be one of"),
        ({"given": config(preset="minionerec", clip=[0.1, 0.2])}, r"clip must be \(0.2, 0.2\)"),
        ({"ref_model": small()}, "ref_model needs args.kl_weight above 0, got 0"),
        ({"index": INDEX.restrict([])}, "index must have at least one item, got none"),
        ({"rows": truth[:1]}, "1 of 1 candidates of 1 rows of train_dataset are not in the index, such as"),
        ({"rows": truth[1:]}, r"rows\[0\]\['positives'\]\[0\] = \[3, 7\]; PolicyTrainer needs every candidate"),
        ({"rows": [{"positives": []}]}, r"rows\[0\] has no column 'prompt_ids'"),
        ({"rows": [{"prompt": "text"}]}, r"holds text .* needs a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(**given)
    for given, message in [
        ({"given": None, "reward_fn": 3}, r"reward_fn must be a function \(items, sids, rows\) -> \[C\], got int"),
        ({"given": None, "index": [1]}, "index must be a TrieIndex, got list"),
    ]:
        with pytest.raises(TypeError, match=message):
            trainer(**given)
    stream = policy_stream()
    with pytest.raises(ValueError, match="num_iterations must be 1 for a data set without a length, got 2"):
        trainer(config(num_iterations=2), stream).train()
    with pytest.raises(ValueError, match="train_dataset must have at least one batch of 8 rows, got 3"):
        trainer(config(num_iterations=2), ROWS[:3]).train()


def policy_stream() -> Any:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(ROWS)

    return Stream()


def fails(items: Any, sids: Any, rows: Any) -> Any:
    raise KeyError("price")


@pytest.mark.parametrize(
    ("reward_fn", "message"),
    [
        (fails, "reward_fn raised KeyError: 'price'"),
        (
            lambda items, sids, rows: [0.0] * 7,
            r"reward_fn must return one number per candidate \(40\), got shape \(7,\)",
        ),
        (lambda items, sids, rows: None, "reward_fn must return a number per candidate, got NoneType"),
        (lambda items, sids, rows: ["a"] * 40, "reward_fn must return a number per candidate, got list"),
        (lambda items, sids, rows: items / 0, r"got inf for candidate 0 \(item 1\d\d\)"),
        (lambda items, sids, rows: [1.0] * 39 + [float("nan")], "must return finite numbers, got nan for candidate 39"),
    ],
)
def test_bad_rewards(reward_fn: Any, message: str) -> None:
    """Nothing is half-stepped: the model is as it was, in the mode it was in, and trains on with a good function."""
    calls: list[int] = []

    def second(items: Any, sids: Any, rows: Any) -> Any:
        calls.append(len(rows))
        return reward_fn(items, sids, rows) if len(calls) == 2 else prefix_reward(items, sids, rows)

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        trainer = policy_trainer(small(), ROWS, output_dir=folder, max_steps=2, extra={"reward_fn": second})
        with pytest.raises(ValueError, match=message):
            trainer.train()
        one = run_policy(small(), ROWS, max_steps=2, extra={"callbacks": [stop_after_one()]})
        assert_same(dict(trainer.model.named_parameters()), one.parameters, 0)
        assert trainer.state.global_step == 1
        assert trainer.model.training
        assert all(parameter.grad is None for parameter in trainer.model.parameters())


def stop_after_one() -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    return Stop()
