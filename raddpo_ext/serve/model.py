"""A worker's model and tokenizer, from a folder: nothing is downloaded and no code of the folder runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raddpo_ext.serve.config import ServeConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")


def load_model(config: ServeConfig) -> Any:
    """The folder's causal or encoder-decoder model on ``config.device``, in evaluation mode."""
    disable_progress_bar()
    encoder_decoder = AutoConfig.from_pretrained(config.model, local_files_only=True).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model: Any = auto.from_pretrained(config.model, local_files_only=True, dtype=config.dtype)
    return model.to(config.device).eval()


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, or None if it has none."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
