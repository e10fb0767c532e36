"""Tokenizes rows with the columns of TRL's preference trainers: ``prompt``, ``chosen`` and ``rejected``."""

from __future__ import annotations

from typing import Any

#: The columns of a row, and those of the tokenized row.
TEXT = ("prompt", "chosen", "rejected")
TOKENS = ("prompt_ids", "positives", "negatives")


def tokenize_row(row: dict[str, Any], tokenizer: Any, name: str, eos: int | None = None) -> dict[str, Any]:
    """Tokenize a row of text or of messages. TRL itself is not needed.

    Args:
        row: ``prompt``: text, or a conversation (a list of ``{"role": ..., "content": ...}``); ``chosen`` and
            ``rejected``: one completion or a list of them, of the same kind as the prompt. Other columns are kept.
        tokenizer: a tokenizer of ``transformers``. A text prompt is tokenized with special tokens, a text completion
            without them, and a conversation by the chat template.
        name: name of the row in errors.
        eos: token id that is appended to text completions, and after which completions of conversations are cut; or
            None.

    Returns:
        ``prompt_ids``, ``positives`` and ``negatives``, and the row's other columns.

    Raises:
        ValueError: a column is missing or of another kind, or the chat template of prompt and completion does not begin
            with that of the prompt.
    """
    # The prompt.
    for column in TEXT:
        if column not in row:
            raise ValueError(f"{name} has no column {column!r}, only {sorted(row)}")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt, verbose=False)["input_ids"]
    elif _is_conversation(prompt):
        prompt_ids = _template(tokenizer, prompt, add_generation_prompt=True)
    else:
        raise ValueError(f"{name}['prompt'] must be text or a list of messages, got {_short(prompt)}")
    tokens: dict[str, Any] = {key: value for key, value in row.items() if key not in TEXT}
    tokens["prompt_ids"] = prompt_ids
    # The completions: one, or a list of them.
    for column, target in zip(TEXT[1:], TOKENS[1:], strict=True):
        completions = row[column]
        if isinstance(completions, str) or _is_conversation(completions):
            completions = [completions]
        if not isinstance(completions, list):
            raise ValueError(f"{name}[{column!r}] must be a completion or a list of them, got {_short(completions)}")
        tokens[target] = [
            _completion(tokenizer, prompt, prompt_ids, completion, f"{name}[{column!r}][{i}]", eos)
            for i, completion in enumerate(completions)
        ]
    return tokens


def _completion(
    tokenizer: Any, prompt: Any, prompt_ids: list[int], completion: Any, name: str, eos: int | None
) -> list[int]:
    """The token ids of one completion, which ends in ``eos``."""
    if isinstance(prompt, str) and isinstance(completion, str):
        ids: list[int] = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
    if isinstance(prompt, str) or not _is_conversation(completion):
        raise ValueError(f"{name} must be text or messages, like the prompt, got {_short(completion)}")
    # Templates take whole conversations: tokenize both together, and remove the prompt.
    whole = _template(tokenizer, prompt + completion)
    if whole[: len(prompt_ids)] != prompt_ids:
        raise ValueError(f"{name}: the chat template of prompt and completion does not begin with that of the prompt")
    ids = whole[len(prompt_ids) :]
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def _template(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
