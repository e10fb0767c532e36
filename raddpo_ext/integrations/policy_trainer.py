"""PolicyTrainer: transformers' Trainer for policy training over SIDs, from rollouts to the update."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.utils import logging

from raddpo_ext import _check
from raddpo_ext._files import replacing
from raddpo_ext.data.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.integrations.base_model import base_model, logits_map
from raddpo_ext.integrations.packed_lengths import in_shards
from raddpo_ext.integrations.policy_config import PolicyConfig
from raddpo_ext.integrations.policy_objective import METRICS, OF_ROLLOUTS, PolicyObjective, counts, rollout_sums
from raddpo_ext.integrations.prompt_collator import PromptCollator
from raddpo_ext.integrations.repeated_sampler import RepeatedSampler
from raddpo_ext.integrations.retriever import SIDRetriever
from raddpo_ext.integrations.rollouts import Groups, advantages_of, draw, group, kept_rows, reward
from raddpo_ext.integrations.session_trainer import SessionTrainer
from raddpo_ext.losses.session import SessionBatch

_logger = logging.get_logger(__name__)


class PolicyTrainer(SessionTrainer):
    """Trains a language model on the rewards of SIDs that it draws itself; else it is as ``transformers.Trainer``.

    For each batch of prompts it draws rollouts from the catalogue, rewards them and computes their advantages. It
    leaves out the groups that teach nothing, packs the others as tries, and takes ``args.num_iterations`` optimizer
    steps on :func:`raddpo_ext.policy_loss`. What fails while rollouts are drawn and rewarded fails before a gradient
    exists.

    The loss is normalized over the whole batch, across accumulated batches and ranks, so the trained model does not
    depend on how a batch is split. The noise of a rollout is a function of ``args.seed``, the step and the row's place
    in the step's batch. A resumed run continues as if it had never stopped. It works with gradient accumulation, DDP
    and FSDP2, PEFT adapters, gradient checkpointing and autocast.

    It logs means since the last log: ``loss`` and its parts ``policy``, ``kl`` and ``nll``; of the rollouts ``reward``,
    ``reward_std`` (of a group), ``active`` (the share of groups with different rewards), ``distinct`` (different SIDs
    per prompt) and ``entropy`` (the mean of ``-log p``, in nats per SID); ``approx_kl`` from the policy that drew them,
    ``clipped/low`` and ``clipped/high``; ``truncated_prompts``. Once per log, over the groups that are trained,
    ``legal_mass`` (the probability of the tokens that can follow, per token of a rollout) and ``invalid`` (the
    probability that a draw without the constraint is no item). Means over nothing are left out.

    An evaluation retrieves for the rows' positives, and gives ``sid_recall@k``, ``sid_ndcg@k`` and ``sid_mrr``; for
    rows with a column ``items`` also ``item_recall@k``, ``item_ndcg@k`` and ``item_mrr``.

    Args:
        model: a ``transformers`` model with a language modelling head, or one with PEFT adapters.
        args: the options.
        reward_fn: ``(items, sids, rows) -> [C]``: a finite number for each candidate, as a tensor or a list. The
            candidates come group by group, experts first. ``items`` are int64 ``[C]`` item ids, ``sids`` int64 codes
            ``[C, L]``, padded with -1, on the model's device; ``rows`` is a list of ``C`` dicts, each candidate's row
            of the data set. A function that names ``sessions`` also gets the groups as a
            :class:`raddpo_ext.SessionBatch`, and one that names ``targets`` the rows' positives, one session per group,
            as :mod:`raddpo_ext.rewards` takes them.
        index: the catalogue. It must have every positive.
        ref_model: the reference, for ``args.kl_weight > 0``. Default: the model as it is now, see
            :class:`RADDPOTrainer`.
        train_dataset, eval_dataset: rows with ``prompt_ids``, or the text ``prompt``, and if known ``positives``
            (``chosen`` as text), the ground truth, and its ``items``. Other columns are for ``reward_fn``.
        processing_class: a tokenizer, for rows of text.
        peft_config: PEFT adapters to add to the model, or None.
        callbacks, optimizers: see ``transformers.Trainer``.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     num_key_value_heads=1, head_dim=8
        ... )
        >>> from raddpo_ext.integrations.transformers import PolicyConfig, PolicyTrainer
        >>> index = rx.TrieIndex.build([[4, 8], [4, 9], [5, 10]], item_ids=[70, 71, 72])
        >>> def reward_fn(items, sids, rows):
        ...     return [float(item == row["bought"]) for item, row in zip(items.tolist(), rows)]
        >>> rows = [{"prompt_ids": [1, 2], "bought": 71}]
        >>> args = PolicyConfig(
        ...     output_dir="run", max_steps=1, use_cpu=True, disable_tqdm=True, logging_steps=99, num_generations=3
        ... )
        >>> model = Qwen3ForCausalLM(config)
        >>> trainer = PolicyTrainer(model, args, train_dataset=rows, reward_fn=reward_fn, index=index)
        >>> trainer.train().global_step
        {'train_runtime': ...}
        1
    """

    METRICS = METRICS
    args: PolicyConfig
    objective: PolicyObjective
    index: TrieIndex
    data_collator: PromptCollator

    def __init__(
        self,
        model: Any,
        args: PolicyConfig | None = None,
        *,
        reward_fn: Callable[..., Any],
        index: TrieIndex,
        ref_model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = PolicyConfig(output_dir="tmp_trainer") if args is None else args
        _check.instance(args, "args", PolicyConfig)
        if not callable(reward_fn):
            raise TypeError(f"reward_fn must be a function (items, sids, rows) -> [C], got {type(reward_fn).__name__}")
        _check.instance(index, "index", TrieIndex)
        if index.num_items == 0:
            raise ValueError("index must have at least one item, got none")
        if ref_model is not None and args.kl_weight == 0:
            raise ValueError("ref_model needs args.kl_weight above 0, got 0: it would not be used")
        is_stream = isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__len__")
        if args.num_iterations > 1 and train_dataset is not None and is_stream:
            raise ValueError(f"num_iterations must be 1 for a data set without a length, got {args.num_iterations}")
        super().__init__(
            model,
            args,
            use_reference=args.kl_weight > 0,
            need_index="PolicyTrainer",
            ref_model=ref_model,
            data_collator=None,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            index=index,
            vocab=None,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reward_fn = reward_fn
        head = logits_map(base_model(self.model))
        head["temperature"] = head.get("temperature", 1.0) * args.temperature
        self.objective = PolicyObjective(self.index, args.normalize, head, args.loss_options).to(args.device)
        self._catalogue = index.to("cpu")
        self._sampler: SIDRetriever | None = None  # made by the first step
        self._update: dict[str, Any] | None = None  # the rollouts of the current batch, see _roll_out

    def _collator(self, args: PolicyConfig, options: dict[str, Any], index: TrieIndex | None) -> PromptCollator:
        assert index is not None
        return PromptCollator(index, args.num_generations, **options)

    # The rollouts

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Overridden to repeat each step's rows for its further iterations."""
        sampler, times = super()._get_train_sampler(train_dataset), self.args.num_iterations
        if times == 1:
            return sampler
        ranks = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        rows = self._train_batch_size * self.args.gradient_accumulation_steps * ranks
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedSampler(sampler, rows, times, seed)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Overridden to turn the prompts of an optimizer step into rollouts, or to return those of the last one."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        is_first = self.state.global_step % self.args.num_iterations == 0
        if is_first or self._update is None:
            if not is_first:
                _logger.warning("the checkpoint has no rollouts: those of this batch are drawn anew")
            self._update = self._roll_out(samples)
        self._sums[: len(OF_ROLLOUTS)] += self._update["sums"].to(self._sums.device)
        return self._update["batches"], self._update["normalizer"].to(device)

    def _roll_out(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Draw and reward the rollouts of an optimizer step.

        Args:
            samples: its batches of prompts.

        Returns:
            ``batches``, what :meth:`compute_loss` takes for each of them; ``normalizer``, float64 ``[2]``, what the
            loss divides by: the counts of all batches on all ranks; and ``sums`` of the rollouts' metrics.
        """
        args, options = self.args, self.args.loss_options
        packed = [sample["packed"] for sample in samples]
        groups = self._groups(packed)
        rows = [row for sample in samples for row in sample["rows"].rows]
        rewards = reward(self.reward_fn, groups, rows, args.device)
        advantages = advantages_of(rewards, groups, args.advantage_options, self.accelerator)
        sessions, values = groups.sessions, advantages.values
        probed = any(self._is_logged(further) for further in range(args.num_iterations))
        total: Tensor = self.accelerator.reduce(counts(sessions, values, options).to(args.device), reduction="sum")
        # The rows that have a term in the loss: the others never reach the model.
        kept = advantages.active[sessions.owners()]
        if options.get("count") == "all" and args.kl_weight > 0:
            kept = torch.ones_like(kept)
        elif options.get("count") == "all" and options.get("nll_weight", 0) > 0:
            kept |= sessions.is_positive()
        sessions, places = kept_rows(sessions, kept)
        per_row = {"advantages": values, "weights": groups.weights, "gates": advantages.gates}
        batches, first = [], 0
        for number, part in enumerate(packed):
            last = first + len(part.prompt_lengths)
            numbers = torch.arange(sessions.num_sessions)
            chosen = (sessions.offsets.diff() > 0) & (numbers >= first) & (numbers < last)
            some, moved = sessions.select(chosen)
            batch: dict[str, Any] = {
                name: None if value is None else value[places[moved]] for name, value in per_row.items()
            }
            batch["packed"] = self._packed(part, some, numbers[chosen] - first, skip_forced=not probed)
            batches.append({**batch, "number": number, "old_logps": None, "ref_logps": None})
            first = last
        truncated = sum(part.num_truncated for part in packed)
        sums = rollout_sums(groups, rewards, advantages.active, truncated)
        return {"batches": batches, "normalizer": total.clamp(min=1), "sums": sums}

    @torch.no_grad()
    def _groups(self, packed: list[PackedSessions]) -> Groups:
        """Draw the rollouts of some batches with the policy as it is, and join them to groups."""
        args = self.args
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        if self._sampler is None:
            self._sampler = SIDRetriever(model, self.index, beam_width=args.num_generations, normalize=args.normalize)
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        was_training, is_sharded = model.training, in_shards(model)
        model.eval()
        try:
            drawn = []
            for number, part in enumerate(packed):
                # The row's place in the step's batch, however it is split.
                place = (number * ranks + rank) * self._train_batch_size
                prompts, mask = part.prompts()
                drawn.append(
                    draw(
                        self._sampler,
                        *(self._of_one_length(prompts, mask) if is_sharded else (prompts, mask)),
                        kind=args.rollouts,
                        count=args.num_generations,
                        temperature=args.temperature,
                        skip_forced=not is_sharded,
                        seed=(args.seed << 32) + self.state.global_step,
                        keys=place + torch.arange(len(prompts), device=args.device),
                    )
                )
        finally:
            model.train(was_training)
        return group(drawn, packed, self._catalogue, args.experts != "none")

    def _of_one_length(self, prompts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts and one more, as long as the longest one of any rank.

        The retriever runs the model more often for prompts longer than before. Sharded models run on all ranks at once.
        """
        columns = torch.tensor([prompts.shape[1]], device=prompts.device)
        missing = int(self.accelerator.gather(columns).max()) - prompts.shape[1]
        return F.pad(prompts, (0, missing, 0, 1)), F.pad(F.pad(mask, (0, missing)), (0, 0, 0, 1), value=1)

    def _packed(
        self, prompts: PackedSessions, sessions: SessionBatch, chosen: Tensor, *, skip_forced: bool
    ) -> PackedSessions:
        """Pack groups with their prompts, as tries. Without a group, pack one token, whose gradients are 0.

        Args:
            skip_forced: leave out what only predicts forced tokens, where log-probs are over the trie.
        """
        ids, mask = (part.cpu() for part in prompts.prompts())
        lengths = mask.sum(1)
        kept = [ids[row, : lengths[row]] for row in chosen.tolist()]
        if not kept:
            zero = torch.zeros(1, dtype=torch.int64)
            kept = [ids[0, :1]]
            sessions = SessionBatch(sessions.tokens, sessions.lengths, torch.zeros(2, dtype=torch.int64), zero)
        options = {name: self.data_collator.options[name] for name in ("pad_token_id", "pad_to_multiple_of")}
        index = self._catalogue if skip_forced and self.args.normalize == "trie" else None
        return pack_sessions(kept, sessions, layout="trie", embeddings=False, skip_forced=index, **options)

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Overridden: the loss is computed inside the model's forward, from its states and not from logits."""
        assert self._update is not None
        kept = self._update["batches"][inputs["number"]]  # what the further iterations compare with
        if self.args.kl_weight > 0 and kept["ref_logps"] is None:
            kept["ref_logps"] = self._ref_logps(model, inputs["packed"])
        names = ("advantages", "weights", "gates", "old_logps")
        given = {name: inputs[name] for name in names if inputs[name] is not None}
        if kept["ref_logps"] is not None:
            given["ref_logps"] = kept["ref_logps"].to(self.args.device)
        loss, sums, logps = model(
            packed=inputs["packed"],
            compute=self.objective,
            accumulate_grad=self._accumulate_grad(),
            normalizer=num_items_in_batch,
            probe=self._is_logged(),
            **given,
        )
        if self.args.num_iterations > 1 and kept["old_logps"] is None:
            kept["old_logps"] = logps
        # The parts of the loss are shares of one step's loss, so their divisors add up to the number of steps.
        sums[:3, 1] /= self.current_gradient_accumulation_steps * self.accelerator.num_processes
        self._sums[len(OF_ROLLOUTS) :] += sums
        loss = loss * self.accelerator.num_processes  # the processes average their gradients
        return (loss, {"logps": logps}) if return_outputs else loss

    def _is_logged(self, further: int = 0) -> bool:
        """Whether the trainer logs after this step, or after a further one."""
        every, step = self.state.logging_steps, self.state.global_step + 1 + further
        return (every > 0 and step % every == 0) or (step == 1 and self.args.logging_first_step)

    def _means(self, sums: Tensor) -> dict[str, float]:
        return {
            name: mean
            for (name, mean), (_, weight) in zip(super()._means(sums).items(), sums.tolist(), strict=True)
            if weight > 0
        }

    # The evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor | None, Tensor | None]:
        """Overridden to predict the sums and divisors of metrics per row, because packed batches have no labels."""
        if prediction_loss_only:
            return None, None, None
        inputs = self._prepare_inputs(inputs)
        rows = self._retrieved(model, inputs["packed"], inputs.get("items"))
        return None, rows, torch.zeros_like(rows[:, :1])

    def _evaluation_metrics(self, prediction: Any) -> dict[str, float]:
        return self._means_of_rows(prediction.predictions, ())

    # The checkpoint

    def _rollouts_file(self, folder: str) -> Path:
        return Path(folder, f"rollouts_{self.accelerator.process_index}.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        """Overridden to save each rank's rollouts, if a further iteration will use them."""
        if self.state.global_step % self.args.num_iterations != 0:
            Path(output_dir).mkdir(parents=True, exist_ok=True)  # rank 0 may not have come here yet
            state = io.BytesIO()  # torch.save would hide why a file cannot be written
            torch.save(self._update, state)
            with replacing(self._rollouts_file(output_dir)) as file:
                file.write(state.getbuffer())
        super()._save_rng_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Overridden to load the rollouts; no callback is told the checkpoint's folder."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._rollouts_file(checkpoint).is_file():
            with torch.serialization.safe_globals([PackedSessions, SessionBatch]):
                self._update = torch.load(self._rollouts_file(checkpoint), map_location="cpu", weights_only=True)
