"""A Trainer over packed sessions with a loss of their states: the part that RADDPOTrainer and PolicyTrainer share."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from raddpo_ext import _check
from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.integrations.adapters import StartValues, add_adapters, has_adapters, refuse_adapters, verify_adapters
from raddpo_ext.integrations.base_model import base_model, context
from raddpo_ext.integrations.data_checks import check_rows, check_vocabulary
from raddpo_ext.integrations.embedding_gradient import is_unwatched
from raddpo_ext.integrations.merger_checks import merger_of, shared_vocab, verify_merger
from raddpo_ext.integrations.retriever import SIDRetriever
from raddpo_ext.integrations.session_collator import SessionCollator
from raddpo_ext.integrations.session_config import SessionConfig
from raddpo_ext.integrations.session_data import SessionDataTrainer
from raddpo_ext.integrations.session_retrieval import retrieval_names, retrieval_rows
from raddpo_ext.integrations.session_states import accept_sessions, check_lengths, verify_packing


class SessionTrainer(SessionDataTrainer):
    """``transformers.Trainer`` over packed sessions: checks the model and the data, and keeps a reference.

    A subclass makes ``objective`` and names its metrics in ``METRICS``. It adds a sum and a divisor per metric to
    ``_sums``, which :meth:`log` turns into means.

    Args:
        use_reference: whether a reference is needed. Without ``ref_model`` it is the model as it is now.
        need_index: see :func:`check_rows`.
        other arguments: see :class:`RADDPOTrainer`.
    """

    METRICS: tuple[str, ...]
    args: SessionConfig
    objective: Any  # a module with ``logps(states, packed)``
    loss_is_scaled_for_ga = True  # the normalizer counts all accumulated batches

    def __init__(
        self,
        model: Any,
        args: SessionConfig,
        *,
        use_reference: bool,
        need_index: str,
        ref_model: Any,
        data_collator: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        peft_config: Any,
        index: TrieIndex | None,
        vocab: SIDVocab | None,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[Any, Any],
    ) -> None:
        # Options and arguments.
        if args.deepspeed:
            raise ValueError("args.deepspeed must be None: use FSDP2 to shard the model (fsdp='full_shard')")
        if args.n_gpu > 1:
            raise ValueError(
                f"args.n_gpu must be at most 1, got {args.n_gpu}: start one process per GPU, with torchrun"
            )
        if index is not None:
            _check.instance(index, "index", TrieIndex)
            vocab = index.vocab if vocab is None else vocab
        # The model: refuse what cannot be trained on packed sessions.
        if peft_config is not None:
            model = add_adapters(model, peft_config)
        is_adapted = has_adapters(model)
        if is_adapted:
            refuse_adapters(model)
        inner = base_model(model)
        if args.disable_dropout:
            _disable_dropout(model)
        if inner.device.type != "meta":  # FSDP may load the weights on rank 0 only
            verify_packing(model)
            verify_merger(model)
            if is_adapted:
                verify_adapters(accept_sessions(model))
        # The reference: copied before training changes the model.
        if ref_model is None and use_reference and not is_adapted:
            ref_model = copy.deepcopy(model)
        needs_start = ref_model is None and use_reference
        if needs_start and inner.device.type == "meta":
            raise ValueError(
                "ref_model must be given with args.use_reference if a rank's model is on the meta device, got None"
            )
        vocab = shared_vocab(model, ref_model, vocab)
        # The data: a sample of rows is collated and looked up now, so that a mismatch shows before training.
        check_vocabulary(vocab, index, inner.get_input_embeddings().weight.shape[0], processing_class)
        if data_collator is None:
            data_collator = self._collator(args, self._collating(inner, args, vocab, processing_class), index)
        self._check_rows = partial(
            check_rows,
            collator=data_collator,
            vocab=vocab,
            index=index,
            need_index=need_index,
            check_packed=partial(check_lengths, inner),  # a sharded model cannot be checked
        )
        self._check_rows({"train_dataset": train_dataset, "eval_dataset": eval_dataset})
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=self._evaluation_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # What the steps and the evaluations need.
        accept_sessions(self.model)
        self.ref_model = ref_model
        self._start = StartValues(model) if needs_start else None
        if ref_model is not None:
            if has_adapters(ref_model):
                refuse_adapters(ref_model)
            accept_sessions(ref_model).requires_grad_(False).eval().to(args.device)
        self.index = None if index is None else index.to(args.device)
        self._retriever: SIDRetriever | None = None  # made by the first evaluation
        self._sums = torch.zeros(len(self.METRICS), 2, dtype=torch.float64, device=args.device)

    @staticmethod
    def _collating(model: Any, args: SessionConfig, vocab: SIDVocab | None, tokenizer: Any) -> dict[str, Any]:
        """The arguments of a collator for this model."""
        config = model.config.get_text_config(decoder=True)
        pad_token_id = getattr(tokenizer, "pad_token_id", None)
        window = None if model.config.is_encoder_decoder else context(config)
        return {
            "pad_token_id": (config.pad_token_id or 0) if pad_token_id is None else pad_token_id,
            "pad_to_multiple_of": args.pad_to_multiple_of,
            "max_length": window if args.max_length is None else args.max_length,
            "vocab": vocab,
            "tokenizer": tokenizer,
            "vocab_size": model.get_input_embeddings().weight.shape[0],
            "sids_only": vocab is not None,
            "merge": merger_of(model) is not None,
        }

    def _collator(self, args: Any, options: dict[str, Any], index: TrieIndex | None) -> SessionCollator:
        """The collator of these options."""
        raise NotImplementedError

    # The loss

    def _accumulate_grad(self) -> bool:
        """Whether head and embeddings add their gradients to ``weight.grad`` directly; tells the objective.

        Not where something else must see them: wrappers for several processes, adapters, and hooks on the weights,
        which some optimizers have.
        """
        model: Any = self.model
        inner = base_model(model)
        weights = [layer.weight for layer in (inner.get_input_embeddings(), inner.get_output_embeddings())]
        alone = self.accelerator.distributed_type.value == "NO" and not self.args.torch_compile
        on = alone and not has_adapters(model) and all(map(is_unwatched, weights))
        self.objective.accumulate_grad(on)
        return on

    @torch.no_grad()
    def _ref_logps(self, model: nn.Module, packed: PackedSessions) -> Tensor | None:
        """The reference's token log-probs ``[C, L]``, or None without a reference."""
        if self.ref_model is not None:
            logps: Tensor = self.ref_model(packed=packed, compute=self.objective.logps)
            return logps
        if self._start is None:
            return None
        # The model with its start values is the reference.
        was_training = model.training
        model.eval()  # no dropout in the reference
        with self._start(self.accelerator.unwrap_model(model, keep_torch_compile=False)):
            logps = model(packed=packed, compute=self.objective.logps)
        model.train(was_training)
        return logps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Overridden to add the metrics of the batches since the last log."""
        if "loss" in logs and self.is_in_train:
            logs |= self._means(self.accelerator.reduce(self._sums, reduction="sum"))
            self._sums.zero_()
        super().log(logs, start_time)

    def _means(self, sums: Tensor) -> dict[str, float]:
        """The metrics to log, from the sums and divisors of all ranks. A mean over nothing is 0."""
        totals, weights = sums.unbind(1)
        return dict(zip(self.METRICS, (totals / torch.where(weights > 0, weights, 1)).tolist(), strict=True))

    # The evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Overridden to check the rows of a data set that is given to ``evaluate``."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            self._check_rows({"eval_dataset": eval_dataset})
        return super().get_eval_dataloader(eval_dataset)

    def _retrieved(self, model: nn.Module, packed: PackedSessions, items: Tensor | None) -> Tensor:
        """:func:`retrieval_rows` of a batch, searched with the model."""
        assert self.index is not None
        if self._retriever is None:
            unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            self._retriever = SIDRetriever(unwrapped, self.index, beam_width=self.args.eval_beam_width)
        return retrieval_rows(self._retriever, packed, items, self.args.eval_ks)

    def _evaluation_metrics(self, prediction: Any) -> dict[str, float]:
        """The metrics of an evaluation, from the predictions of all rows: see :meth:`_means_of_rows`."""
        raise NotImplementedError

    def _means_of_rows(self, rows: Any, names: tuple[str, ...]) -> dict[str, float]:
        """Means over the rows of an evaluation.

        Args:
            rows: float64 ``[rows, 2 * metrics]``: a sum and a divisor per metric.
            names: the metrics, but for those of the retrieval, which may follow. These are left out if no row has them.
        """
        totals = rows.sum(0).reshape(-1, 2)
        every = [*names]
        if len(totals) > len(names):
            every += retrieval_names(self.args.eval_ks)
        return {
            name: float(total / weight) if weight > 0 else 0.0
            for name, (total, weight) in zip(every, totals, strict=True)
            if weight > 0 or not name.startswith(("sid_", "item_"))
        }


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: of its modules, and the rates that attention layers keep as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
