"""A worker's model and tokenizer, from a folder: nothing is downloaded and no code of the folder runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raddpo_ext._check import FLOATS
from raddpo_ext.integrations.onednn import use_onednn
from raddpo_ext.serve.config import ServeConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
_SHOWN = 5  # names of weights in an error's message


def load_model(config: ServeConfig) -> Any:
    """The folder's causal or encoder-decoder model on ``config.device``, in evaluation mode.

    Raises:
        ValueError: the checkpoint lacks weights, has weights that the model lacks, or holds NaN; names them.
    """
    disable_progress_bar()
    encoder_decoder = AutoConfig.from_pretrained(config.model, local_files_only=True).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    loaded: Any = auto.from_pretrained(
        config.model, local_files_only=True, dtype=config.dtype, output_loading_info=True
    )
    model, loading = loaded
    # transformers initialises missing weights at random and ignores unknown ones, with a warning at most.
    for key, problem in (("missing_keys", "lacks"), ("unexpected_keys", f"does not fit {type(model).__name__}:")):
        if names := sorted(loading[key]):
            raise ValueError(f"{config.model}: the checkpoint {problem} {_shown(names)}")
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if weight.dtype in FLOATS and bool(weight.isnan().any()):
            raise ValueError(f"{config.model}: the checkpoint's {name} holds NaN")
    return use_onednn(model.to(config.device).eval())


def _shown(names: list[str]) -> str:
    """Names for an error's message, at most five."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, or None if it has none."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
