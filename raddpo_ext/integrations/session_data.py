"""A Trainer for rows of sessions: samples the rows by length, and moves and measures packed batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.integrations.checkpoints import CheckpointedTrainer
from raddpo_ext.integrations.session_collator import SessionCollator
from raddpo_ext.integrations.session_states import check_lengths

_BY_LENGTH = ("group_by_length", "batch_rebalance")


class SessionDataTrainer(CheckpointedTrainer):
    """``transformers.Trainer`` for rows in the form that :class:`SessionCollator` takes."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Overridden so that sampling by length works on rows of sessions, which have no ``input_ids``."""
        return super()._get_train_sampler(
            self._with_lengths(self.train_dataset if train_dataset is None else train_dataset)
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Overridden so that sampling by length works on rows of sessions, which have no ``input_ids``."""
        return super()._get_eval_sampler(self._with_lengths(eval_dataset))

    def _with_lengths(self, dataset: Any) -> Any:
        """The data set as a sampler by length reads it: with a column of lengths, else only the rows' token counts."""
        # Streams have no length, and other collators count differently: leave those to Trainer.
        by_length = self.args.train_sampling_strategy in _BY_LENGTH and hasattr(dataset, "__len__")
        has_lengths = self.args.length_column_name in (getattr(dataset, "column_names", None) or ())
        if not by_length or has_lengths or not isinstance(self.data_collator, SessionCollator):
            return dataset
        names = getattr(self.processing_class, "model_input_names", None) or ["input_ids"]
        return _Lengths(dataset, self.data_collator, names[0])

    def _prepare_input(self, data: Any) -> Any:
        """Overridden because ``Trainer`` moves only tensors and containers to the device, not ``PackedSessions``."""
        if isinstance(data, PackedSessions):
            packed = data.to(self.args.device, non_blocking=True)
            # Check here, as torch.compile may trace the forward.
            check_lengths(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), packed)
            return packed
        return super()._prepare_input(data)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Overridden because the tokens are inside ``inputs["packed"]``."""
        return int(super().floating_point_ops(self._main_input(inputs)))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Overridden because the tokens are inside ``inputs["packed"]``."""
        super()._track_num_input_tokens(self._main_input(inputs))

    def _main_input(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The packed tokens under the name that ``Trainer`` counts."""
        return {getattr(self.model, "main_input_name", "input_ids"): inputs["packed"].input_ids}


class _Lengths:
    """Rows that hold only a length, under the column name that a sampler reads."""

    def __init__(self, dataset: Any, collator: SessionCollator, name: str) -> None:
        self.dataset, self.collator, self.name = dataset, collator, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, range]:
        return {self.name: range(self.collator.num_tokens(self.dataset[number]))}

    def __iter__(self) -> Iterator[dict[str, range]]:
        return (self[number] for number in range(len(self)))
