"""TokenMerger: the input embeddings of a model that reads a whole SID of its prompt at one position."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raddpo_ext import _check
from raddpo_ext.data.merged_ids import MergedIds
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.integrations.onednn import is_linear

_PROJECTION = "sid_projection"
_OPTIONS = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}  # of nn.Embedding, with the only value


class TokenMerger(nn.Embedding):
    """Input embeddings that also take merged ids: one id, and so one position, per SID of a prompt (GenRec).

    It takes the place of a model's input embeddings, as in the example. In an encoder-decoder it takes the place of
    the encoder's, which read the prompts: put ``model.get_encoder()`` for ``model``. It has their very parameter
    ``weight``, so a tied head stays tied and the weight keeps its name in checkpoints, and a linear layer
    ``sid_projection``. Tokens get the rows that they got before. A merged id gets
    ``sid_projection(concat(e_1, ..., e_L))`` of its codes' embeddings; a level beyond the SID's end counts as zeros.

    From then on everything that runs the model accepts merged prompts: :class:`SIDRetriever`, the trainers,
    ``session_states``, ``generate``. Candidates and what a search feeds stay tokens. Positions count merged ids, as the
    model reads one id per position. The ids are numbers, not entries of a table, so new items need no change here.

    ``sid_projection`` starts as the mean over the levels, so that the model gets inputs of the kind it knows. It must
    be trained before it helps.

    Each level's table is projected once, ``E_l W_l^T``, and a SID is a sum of its rows, unless a batch has fewer codes
    than the tables have rows. Without gradients, on the CPU, the projected tables are kept until a weight changes.

    Args:
        embeddings: the model's input embeddings, ``model.get_input_embeddings()``. Their output must be a constant
            times the row of the weight, as that of ``nn.Embedding`` and of Gemma's and BART's embeddings is.
        vocab: the SIDs' tokens. Its end token belongs to no merged id.

    Attributes:
        ids: the conversion between tokens and merged ids, without weights.

    Raises:
        ValueError, TypeError: the embeddings are of another kind, sharded, on the meta device, or have hooks; a token
            of ``vocab`` is beyond them; or ``vocab`` has more than 2**62 SIDs.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     num_key_value_heads=1, head_dim=8
        ... )
        >>> model = Qwen3ForCausalLM(config).eval()
        >>> merger = rx.TokenMerger(model.get_input_embeddings(), rx.SIDVocab([4, 4], offset=4))
        >>> model.set_input_embeddings(merger)
        >>> merger.merge([1, 4, 9, 5, 10])  # a token and two SIDs
        [1, 23, 29]
        >>> model(input_ids=torch.tensor([[1, 23, 29]])).logits.shape
        torch.Size([1, 3, 16])

    Source: GenRec (arXiv 2604.14878), token merger.
    """

    slots: Tensor
    code_tokens: Tensor
    embed_scale: Tensor | float

    def __init__(self, embeddings: nn.Embedding, vocab: SIDVocab) -> None:
        _check_embeddings(embeddings)
        weight = embeddings.weight
        rows, width = weight.shape
        self.ids = MergedIds(vocab, rows)
        super().__init__(rows, width, embeddings.padding_idx, device="meta")
        self.weight = weight
        # Of the codes: see MergedIds. Not saved, as they follow from the vocab.
        self.register_buffer("slots", self.ids.places.to(weight.device), persistent=False)
        self.register_buffer("code_tokens", self.ids.tokens.to(weight.device), persistent=False)
        # The embeddings' constant, under the name and of the type that transformers gives it.
        scale = getattr(embeddings, "embed_scale", None)
        if isinstance(scale, Tensor):
            self.register_buffer("embed_scale", scale.clone(), persistent=False)
        else:
            self.embed_scale = 1.0 if scale is None else scale
        self._check_rows(embeddings)
        # The mean over the levels.
        levels = vocab.levels
        self.sid_projection = nn.Linear(levels * width, width, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            self.sid_projection.weight.copy_(torch.eye(width).repeat(1, levels) / levels)
            self.sid_projection.bias.zero_()
        self.train(embeddings.training)
        self._kept: _Kept | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The embeddings ``[..., H]`` of tokens and merged ids, int64 ``[...]``.

        Raises:
            ValueError: on the CPU, an id is neither a token nor the merged id of a SID. On other devices such an id
                fails as a token that ``nn.Embedding`` lacks does.
        """
        if self.weight.shape[0] != self.ids.vocab_size:
            raise ValueError(
                f"the embeddings must have {self.ids.vocab_size} rows, as when the TokenMerger was made, got "
                f"{self.weight.shape[0]}: merged ids begin there. Resize them before, and shard them only by FSDP2"
            )
        ids = input.flatten().long()
        merged = ids >= self.ids.vocab_size
        # Beside a GPU and in a graph no choice may depend on values: reading them synchronises.
        reads = input.device.type == "cpu" and not torch.compiler.is_compiling()
        if reads and not bool(merged.any()):
            return self._scaled(super().forward(input))
        if reads:
            self._check_ids(input)
        # The tokens and the SIDs, and the rank of each id among them.
        places = self.ids.places_of(ids, self.slots)
        if reads:
            tokens, sids = ids[~merged], places[merged]
            token_rank, sid_rank = (~merged).cumsum(0) - 1, merged.cumsum(0) - 1
        else:
            tokens, sids = ids.masked_fill(merged, 0), places
            token_rank = sid_rank = torch.arange(len(ids), device=ids.device)
        # PEFT and quantization replace the layer: only the layer itself can then tell its output.
        plain = is_linear(self.sid_projection)
        keeps = reads and not torch.is_grad_enabled()
        by_table = plain and (keeps or sids.numel() >= len(self.code_tokens))
        codes = self.code_tokens[1:] if by_table else self.code_tokens[sids].flatten()
        # One look-up for all, as each has a gradient as large as the weight.
        rows = self._scaled(super().forward(torch.cat((tokens, codes))))
        token_rows, code_rows = rows.split((len(tokens), len(codes)))
        with torch.autocast(input.device.type, enabled=False):
            if by_table:
                # A token is the sum of one row, behind those of the codes.
                table = self._kept_table(code_rows) if keeps else self._table(code_rows)
                first = torch.where(merged, places[:, 0], len(table) + token_rank)
                places = torch.cat((first[:, None], places[:, 1:]), 1)
                output = F.embedding_bag(places, torch.cat((table, token_rows)), mode="sum", padding_idx=0)
            else:
                sid_rows = self._concatenated(code_rows, sids)
                order = torch.where(merged, len(tokens) + sid_rank, token_rank)
                output = torch.cat((token_rows, sid_rows)).index_select(0, order)
        return output.view(*input.shape, -1)

    def merge(self, prompt_ids: Any) -> list[int]:
        """Replace each SID of a prompt by its merged id.

        A SID is a token of the first level and as many tokens of the next levels as follow it. All other tokens stay:
        text, end tokens, and the rest of a SID whose begin was cut off. Merged ids stay, too.

        Args:
            prompt_ids: integers ``[T]``: a list, an array or a tensor.
        """
        return self.ids.merge(prompt_ids)

    def split(self, ids: Any) -> list[int]:
        """Replace each merged id by its tokens: the inverse of :meth:`merge`.

        Raises:
            ValueError: an id is neither a token nor the merged id of a SID; names it and its position.
        """
        return self.ids.split(ids)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read ``sid_projection`` from a folder that ``save_pretrained`` or a trainer wrote with the model.

        ``from_pretrained`` makes a model without a merger, and reports the layer's weights as unexpected ones.

        Raises:
            ValueError: the folder's safetensors files do not hold the layer, or one of another shape; names the folder.
            ImportError: ``safetensors`` is not installed.
        """
        from safetensors import safe_open

        state = self.sid_projection.state_dict()
        for name in state:
            end = f"{_PROJECTION}.{name}"
            for path in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    keys = [key for key in file.keys() if key == end or key.endswith(f".{end}")]  # noqa: SIM118
                    found = [file.get_tensor(key) for key in keys]
                if found:
                    break
            else:
                raise ValueError(f"{os.fspath(folder)} must hold safetensors files with {end} of a TokenMerger")
            if found[0].shape != state[name].shape:
                raise ValueError(
                    f"{os.fspath(folder)}: {end} must have shape {tuple(state[name].shape)}, got "
                    f"{tuple(found[0].shape)}: it is that of another model or another number of levels"
                )
            state[name] = found[0]
        self.sid_projection.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": None}

    def _scaled(self, rows: Tensor) -> Tensor:
        """Rows of the weight as the model's own embeddings return them."""
        if isinstance(self.embed_scale, Tensor):
            return rows * self.embed_scale.to(rows.dtype)
        return rows if self.embed_scale == 1.0 else rows * self.embed_scale

    def _concatenated(self, rows: Tensor, sids: Tensor) -> Tensor:
        """The projection ``[M, H]`` of SIDs, from the rows of their codes ``[M * L, H]``; ``sids`` are their places."""
        parts = rows.view(*sids.shape, -1).masked_fill(sids[..., None] == 0, 0).flatten(1)
        output: Tensor = self.sid_projection(parts.to(self.sid_projection.weight.dtype))
        return output.to(rows.dtype)

    def _table(self, rows: Tensor) -> Tensor:
        """Zeros, then each code's row times its level's block of the projection, ``[U + 1, H]``.

        The first level's have the bias: each SID has one of them.
        """
        layer = self.sid_projection
        parts = rows.to(layer.weight.dtype).split(self.ids.counts)
        blocks = zip(parts, layer.weight.split(self.embedding_dim, 1), strict=True)
        tables = [F.linear(part, block, None if level else layer.bias) for level, (part, block) in enumerate(blocks)]
        return torch.cat([tables[0].new_zeros(1, self.embedding_dim), *tables]).to(rows.dtype)

    def _kept_table(self, rows: Tensor) -> Tensor:
        """:meth:`_table`, kept while what it is made of stays the same.

        The values themselves are compared: optimizers that write through ``.data`` or pointers, and sharding that
        gathers weights anew, change neither a tensor's version nor, always, its address.
        """
        sources = (rows, self.sid_projection.weight, self.sid_projection.bias)
        if self._kept is None or not all(map(_same, self._kept.sources, sources)):
            self._kept = _Kept(tuple(source.clone() for source in sources), self._table(rows))
        return self._kept.table

    def _check_ids(self, ids: Tensor) -> None:
        """Raise ValueError for an id that is neither a token nor the merged id of a SID."""
        wrong = self.ids.wrong(ids)
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            number = int(ids[tuple(place)])
            raise ValueError(f"input{place} = {number} {self.ids.why_not(number)}")

    @torch.no_grad()
    def _check_rows(self, embeddings: nn.Embedding) -> None:
        """Raise ValueError if the embeddings of the SIDs' tokens are not a constant times their rows."""
        tokens = self.code_tokens[1:]
        if not torch.equal(embeddings(tokens), self._scaled(F.embedding(tokens, self.weight))):
            raise ValueError(
                f"embeddings must give embed_scale times the rows of their weight, {type(embeddings).__name__} gives "
                "something else"
            )


class _Kept(NamedTuple):
    """The projected tables, and copies of the codes' rows and of the layer that they are made of."""

    sources: tuple[Tensor, ...]
    table: Tensor


def _same(kept: Tensor, found: Tensor) -> bool:
    """Whether two tensors are equal, bit for bit where 8 bytes can be compared at once."""
    if kept.dtype != found.dtype or kept.device != found.device or kept.shape != found.shape:
        return False
    if found.shape[-1] * found.itemsize % 8 == 0 and found.is_contiguous():
        kept, found = kept.view(torch.int64), found.view(torch.int64)
    return torch.equal(kept, found)


def _check_embeddings(embeddings: Any) -> None:
    """Raise an error for embeddings that a TokenMerger cannot stand for."""
    kind = f"{type(embeddings).__module__}.{type(embeddings).__name__}"
    if not isinstance(embeddings, nn.Embedding) or isinstance(embeddings, TokenMerger):
        raise TypeError(f"embeddings must be a torch.nn.Embedding, as the model was made with, got {kind}")
    parameters = [name for name, _ in embeddings.named_parameters()]
    if parameters != ["weight"]:
        raise ValueError(f"embeddings must have one parameter, weight, {kind} has {parameters}")
    for name, neutral in _OPTIONS.items():
        if getattr(embeddings, name) != neutral:
            raise ValueError(f"embeddings must have {name} = {neutral}, got {getattr(embeddings, name)}")
    weight = embeddings.weight
    _check.float_tensor(weight, "embeddings.weight")
    if weight.device.type == "meta" or hasattr(weight, "placements"):
        what = "on the meta device" if weight.device.type == "meta" else "sharded"
        raise ValueError(f"embeddings must hold their weight, it is {what}: make the TokenMerger before sharding")
    if weight.dim() != 2:
        raise ValueError(f"embeddings.weight must have 2 dimensions, got shape {tuple(weight.shape)}")
    if embeddings._forward_hooks or embeddings._forward_pre_hooks:
        raise ValueError("embeddings have hooks, which the TokenMerger would drop: make it before adding them")
