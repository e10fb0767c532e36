"""The codebooks of a residual quantiser, and their file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._files import open_regular, replacing


@dataclass(frozen=True)
class Codebooks:
    """A vector per code of each level.

    Attributes:
        levels: float32 ``[K_l, D]`` on the CPU, one per level, all of the same ``D``.

    Raises:
        ValueError, TypeError: naming the level and what is wrong with it.

    Example:
        >>> books = rx.sids.Codebooks((torch.tensor([[0.0, 0.0], [4.0, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])))
        >>> books.sizes
        (2, 2)
        >>> books.decode(torch.tensor([[1, 0]]))
        tensor([[4., 5.]])
    """

    levels: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels must hold at least one codebook")
        for level, book in enumerate(self.levels):
            name = f"levels[{level}]"
            _check.float_tensor(book, name, (torch.float32,))
            if book.dim() != 2 or not book.numel() or book.shape[1] != self.levels[0].shape[-1]:
                wanted = f"[codes, {self.levels[0].shape[-1]}]" if level else "[codes, D]"
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(book.shape)}")
            if not bool(torch.isfinite(book.square().sum(1)).all()):
                raise ValueError(f"{name} must be finite, squared too")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return tuple(len(book) for book in self.levels)

    @property
    def dim(self) -> int:
        """``D``."""
        return self.levels[0].shape[1]

    def decode(self, sids: Tensor) -> Tensor:
        """The sum of each SID's vectors: float32 ``[N, D]`` of int64 ``[N, L]``, as :func:`encode` returns them.

        Raises:
            ValueError, TypeError: ``sids`` are not of these codebooks.
        """
        check_codes(sids, "sids", self.sizes)
        total = self.levels[0][sids[:, 0]]
        for level, book in enumerate(self.levels[1:], 1):
            total += book[sids[:, level]]
        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file of the tensors ``level_0``, ``level_1``, ... It replaces ``path`` atomically.

        Raises:
            ImportError: ``safetensors`` is not installed.
            OSError: the file cannot be written.
        """
        tensors = {f"level_{level}": book.contiguous() for level, book in enumerate(self.levels)}
        content = _safetensors().save(tensors)
        with replacing(Path(path)) as file:
            file.write(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codebooks:
        """Read what :meth:`save` wrote.

        Raises:
            ImportError: ``safetensors`` is not installed.
            ValueError: the file is damaged or holds something else; names it.
            OSError: the file cannot be read.
        """
        module = _safetensors()
        from safetensors import SafetensorError

        with open_regular(path) as file:
            content = file.read()
        try:
            tensors = module.load(content)
            return cls(tuple(tensors.pop(f"level_{level}") for level in range(len(tensors))))
        except KeyError as error:
            raise ValueError(f"{os.fspath(path)}: holds no codebooks: tensor {error} is missing") from None
        except (SafetensorError, ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: holds no codebooks: {error}") from None


def check_codes(codes: Tensor, name: str, sizes: tuple[int, ...], minimum: int = 0) -> None:
    """int64 ``[N, L]`` in ``[minimum, size of the level)``."""
    _check.int64_tensor(codes, name)
    if codes.dim() != 2 or codes.shape[1] != len(sizes):
        raise ValueError(f"{name} must have shape [N, {len(sizes)}], got {tuple(codes.shape)}")
    if len(codes):
        for level, (low, high, size) in enumerate(zip(*codes.aminmax(dim=0), sizes, strict=True)):
            if low < minimum or high >= size:
                bad = int(low if low < minimum else high)
                raise ValueError(f"{name}[:, {level}] must be in [{minimum}, {size - 1}], got {bad}")


def _safetensors():  # type: ignore[no-untyped-def]
    try:
        import safetensors.torch
    except ImportError as error:
        message = f"codebooks are kept in safetensors files: pip install 'raddpo_ext[sids]' ({error})"
        raise ImportError(message) from error
    return safetensors.torch
