"""RADDPOTrainer: transformers' Trainer for RAD-DPO over packed sessions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from raddpo_ext import _check
from raddpo_ext._files import replacing
from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.integrations.base_model import base_model, logits_map
from raddpo_ext.integrations.session_collator import SessionCollator
from raddpo_ext.integrations.session_objective import METRICS, ROWS, SessionObjective
from raddpo_ext.integrations.session_pages import SessionPages
from raddpo_ext.integrations.session_trainer import SessionTrainer
from raddpo_ext.integrations.trainer_config import PAGE_OPTIONS, RADDPOConfig
from raddpo_ext.losses.similarity_weighting import SimilarityWeighting

_logger = logging.get_logger(__name__)
_WEIGHTING_FILE = "similarity_weighting.pt"


class RADDPOTrainer(SessionTrainer):
    """Trains a language model on sessions by RAD-DPO; everything else is as in ``transformers.Trainer``.

    The loss is normalized over the whole batch, across accumulated batches and ranks, so the trained model does not
    depend on how a batch is split. It works with gradient accumulation, DDP and FSDP2, PEFT adapters, gradient
    checkpointing, autocast and ``torch_compile``. A resumed run continues as if it had never stopped, the similarity
    weighting included; ``resume_from_checkpoint=True`` skips a checkpoint that was being written when the run was
    killed.

    It logs means since the last log: ``loss`` and its parts ``preference`` and ``sft``; the rewards, margins,
    accuracies, weights and detached share of :class:`raddpo_ext.RADDPOOutput`; ``dropped_pairs``, the share of pairs
    with equal SIDs; and ``truncated_prompts``, the share of prompts that lost tokens.

    With ``args.page`` it learns the positives by next-token prediction, item by item or page by page (GenRec), which
    comes before RAD-DPO. The loss is ``sft_weight`` times the weighted mean of :class:`SessionCollator`.

    An evaluation gives the loss, its parts and the rewards over the rows of the data set. With ``index`` and without
    ``args.prediction_loss_only`` it also retrieves, and gives ``sid_recall@k``, ``sid_ndcg@k`` and ``sid_mrr``; for
    rows with a column ``items`` also ``item_recall@k``, ``item_ndcg@k`` and ``item_mrr``.

    Args:
        model: a ``transformers`` model with a language modelling head, or one with PEFT adapters.
        args: the options.
        ref_model: the reference. Default with ``args.use_reference``: the model as it is now. Without adapters this is
            a frozen copy. With adapters only the trainable values are copied, and used for the reference's forward.
        data_collator: a :class:`SessionCollator`, which also decides about pages; default: one made from ``args``.
        train_dataset, eval_dataset: rows in the form that :class:`SessionCollator` takes.
        processing_class: a tokenizer, for rows of text.
        peft_config: PEFT adapters to add to the model, or None.
        index: the catalogue, for the evaluation and ``args.normalize = "trie"``.
        vocab: the SIDs' tokens, for ``args.normalize = "level"`` and to truncate prompts between SIDs; default:
            ``index.vocab``.
        callbacks, optimizers: see ``transformers.Trainer``.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     num_key_value_heads=1, head_dim=8
        ... )
        >>> from raddpo_ext.integrations.transformers import RADDPOConfig, RADDPOTrainer
        >>> rows = [{"prompt_ids": [1, 2], "positives": [[4, 8]], "negatives": [[4, 9], [5, 10]]}]
        >>> args = RADDPOConfig(output_dir="run", max_steps=1, use_cpu=True, disable_tqdm=True, logging_steps=99)
        >>> trainer = RADDPOTrainer(Qwen3ForCausalLM(config), args, train_dataset=rows)
        >>> trainer.train().global_step
        {'train_runtime': ...}
        1
    """

    METRICS = METRICS
    args: RADDPOConfig
    objective: SessionObjective

    def __init__(
        self,
        model: Any,
        args: RADDPOConfig | None = None,
        *,
        ref_model: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        index: TrieIndex | None = None,
        vocab: SIDVocab | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = RADDPOConfig(output_dir="tmp_trainer") if args is None else args
        _check.instance(args, "args", RADDPOConfig)
        super().__init__(
            model,
            args,
            use_reference=args.use_reference,
            need_index="normalize = 'trie'" if args.normalize == "trie" else "",
            ref_model=ref_model,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            index=index,
            vocab=vocab,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        pages = getattr(self.data_collator, "pages", None)
        if data_collator is not None:
            self._check_unused(PAGE_OPTIONS if pages is None else (*PAGE_OPTIONS, "level_weights"))
        if pages is not None:
            self._check_pages(pages)
        weighting = SimilarityWeighting(args.similarity_window) if args.similarity_weighting and not pages else None
        self.objective = SessionObjective(
            weighting,
            normalize=args.normalize,
            vocab=index.vocab if vocab is None and index is not None else vocab,
            index=self.index if args.normalize == "trie" else None,
            **logits_map(base_model(self.model)),
            **args.loss_options,
        ).to(args.device)
        if weighting is not None:
            self.add_callback(_Commit(weighting))

    def _collator(self, args: RADDPOConfig, options: dict[str, Any], index: TrieIndex | None) -> SessionCollator:
        pages = {name: getattr(args, name) for name in PAGE_OPTIONS}
        if args.page is not None:
            pages["level_weights"] = args.level_weights
        return SessionCollator(layout=args.layout, embeddings=args.similarity_weighting, **options, **pages)

    def _check_unused(self, names: tuple[str, ...]) -> None:
        """Raise ValueError for an option of pages that a given collator does not read."""
        for name in names:
            value, default = getattr(self.args, name), getattr(RADDPOConfig, name)
            if value != default:
                raise ValueError(
                    f"args.{name} must be {default} with a data_collator, which has its own, got {value!r}"
                )

    def _check_pages(self, pages: SessionPages) -> None:
        """Raise ValueError for options that pages cannot have."""
        if self.args.use_reference:
            raise ValueError("args.use_reference must be False with pages, which are not compared with a reference")
        if pages.is_sequence and base_model(self.model).config.is_encoder_decoder:
            raise ValueError("page must be 'set' for an encoder-decoder model, whose decoder has a row per candidate")
        if pages.has_targets and self.args.normalize != "vocab":
            raise ValueError(
                f"supervise_separator must be False with normalize = {self.args.normalize!r}, in which a separator is "
                "no token"
            )

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Overridden: the loss is computed inside the model's forward, from its states and not from logits."""
        packed: PackedSessions = inputs["packed"]
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        self.objective.train(model.training)
        loss, sums = model(
            packed=packed,
            compute=self.objective,
            accumulate_grad=self._accumulate_grad(),
            ref_logps=self._ref_logps(model, packed),
            normalizer=num_items_in_batch,
            page=inputs.get("page"),
        )
        if model.training:
            with torch.no_grad():
                # Preference and SFT are shares of one step's loss, so their divisors add up to the number of steps.
                sums[:2, 1] /= self.current_gradient_accumulation_steps * self.accelerator.num_processes
                self._sums += sums
        loss = loss * self.accelerator.num_processes  # the processes average their gradients
        return (loss, {"sums": sums}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """What the loss divides by, float64 ``[2]``: the counts of all accumulated batches on all ranks.

        Overridden because ``Trainer`` counts labels, and sessions have pairs and positives instead. Pages have weights.
        """
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batch_samples:
            if "page" in batch:
                counts[1] += batch["page"]["weights"].sum(dtype=torch.float64).to(device)
            else:
                counts += batch["packed"].sessions.counts(self.objective.positives).to(device)
        reduced: Tensor = self.accelerator.reduce(counts, reduction="sum")
        return torch.where(reduced > 0, reduced, 1)

    # The evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Overridden to predict the sums and divisors of metrics per row, because packed batches have no labels."""
        inputs = self._prepare_inputs(inputs)
        packed: PackedSessions = inputs["packed"]
        self.objective.eval()
        with torch.no_grad():
            ref_logps = self._ref_logps(model, packed)
            rows = model(packed=packed, compute=self.objective.rows, ref_logps=ref_logps, page=inputs.get("page"))
            if self.index is not None and not prediction_loss_only:
                rows = torch.cat((rows, self._retrieved(model, packed, inputs.get("items"))), 1)
        # The loop gathers predictions from all ranks. It computes metrics only if there are labels.
        return None, rows, torch.zeros_like(rows[:, :1])

    def _evaluation_metrics(self, prediction: Any) -> dict[str, float]:
        metrics = self._means_of_rows(prediction.predictions, ROWS)
        return {"loss": metrics["preference"] + self.args.sft_weight * metrics["sft"], **metrics}

    # The checkpoint

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Overridden to save the similarity weighting before ``trainer_state.json``; ``on_save`` comes after it."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.objective.similarity_weighting is not None and self.args.should_save:
            state = io.BytesIO()  # torch.save would hide why a file cannot be written
            torch.save(self.objective.similarity_weighting.state_dict(), state)
            with replacing(Path(output_dir, _WEIGHTING_FILE)) as file:
                file.write(state.getbuffer())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Overridden to load the similarity weighting; no callback is told the checkpoint's folder."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.objective.similarity_weighting is None:
            return
        path = Path(checkpoint, _WEIGHTING_FILE)
        if not path.is_file():
            _logger.warning("%s does not exist: similarity_weighting starts from scratch", path)
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.objective.similarity_weighting.load_state_dict(state)


class _Commit(TrainerCallback):
    """Ends an optimizer step of the similarity weighting: what it saw takes effect from the next step on."""

    def __init__(self, weighting: SimilarityWeighting) -> None:
        self.weighting = weighting

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weighting.commit()  # from here on similarities take effect at the end of a step

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.weighting.commit()
