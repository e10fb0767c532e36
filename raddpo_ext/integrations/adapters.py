"""PEFT adapters in a trainer over packed sessions: refuses unsuitable ones, and runs a model with its start values."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raddpo_ext import _check
from raddpo_ext.data.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.integrations.base_model import base_model, logits_map
from raddpo_ext.integrations.session_states import verify_packing
from raddpo_ext.logps.head import Head
from raddpo_ext.losses.session import SessionBatch

#: Adapters that need more than their layers, which a packed forward does not provide, and what they need.
_REFUSED = {
    "ADALORA": "adds a regularizer to the model's own loss and prunes its ranks by a call after every step",
    "ADAPTION_PROMPT": "puts tokens before the prompt",
    "CARTRIDGE": "puts tokens before the prompt",
    "LILY": "weights its experts by a mean over all tokens of a batch, later tokens and other candidates included",
    "POLY": "needs task_ids in every call",
    "SHADOW": "runs a second network beside the model's layers",
    "XLORA": "runs the model twice, to weigh its adapters by the prompt",
}


def add_adapters(model: Any, config: Any) -> Any:
    """Add the adapters of a ``PeftConfig`` to a model.

    Raises:
        ValueError, TypeError: the config is of another type or cannot be trained here, or the model has adapters.
    """
    from peft import PeftConfig, get_peft_model

    _check.instance(config, "peft_config", PeftConfig)
    if has_adapters(model):
        raise ValueError("peft_config must be None for a model that has adapters: train those, or merge them first")
    refuse_config(config)
    return get_peft_model(model, config)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has replaced layers of a model, whether it wraps the model or not (``add_adapter``)."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = getattr(model, "_orig_mod", model)
    return hasattr(inner, "peft_config") or any(
        isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in inner.modules()
    )


def refuse_adapters(model: Any) -> None:
    """Raise ValueError for a model with adapters that the loss would ignore."""
    configs = getattr(getattr(model, "_orig_mod", model), "peft_config", {})
    for config in configs.values():
        refuse_config(config)
    refuse_head(model)


def refuse_config(config: Any) -> None:
    """Raise ValueError for a ``PeftConfig`` whose adapters cannot be trained on packed sessions."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    why = "puts tokens before the prompt" if config.is_prompt_learning else _REFUSED.get(kind)
    if getattr(config, "alora_invocation_tokens", None) is not None:
        why = "starts where the prompt invokes it (alora_invocation_tokens)"
    if why is not None:
        raise ValueError(
            f"peft_config: adapters of type {kind} cannot be trained on packed sessions: PEFT's {kind} {why}; use "
            "adapters of single layers, such as LoRA"
        )


def refuse_head(model: Any) -> None:
    """Raise ValueError for a model with an adapter on its head: the loss reads only the weight and bias."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    head = base_model(model).get_output_embeddings()
    is_wrapped = isinstance(head, AuxiliaryTrainingWrapper) and not isinstance(head, ModulesToSaveWrapper)
    if isinstance(head, BaseTunerLayer) or is_wrapped:
        raise ValueError(
            f"model has an adapter ({type(head).__module__}.{type(head).__name__}) on its head, which the loss would "
            "ignore: leave the head out of target_modules and of trainable_token_indices, or train it whole with "
            "modules_to_save"
        )


def verify_adapters(model: Any) -> None:
    """Run :func:`verify_packing` and :func:`verify_gradients` with changed adapters, as most new ones add nothing yet.

    Args:
        model: a PEFT model whose forward takes sessions (``accept_sessions``). Its values are restored.

    Raises:
        ValueError: one of the two checks fails.
    """
    generator = torch.Generator().manual_seed(0)
    with StartValues(model)(model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    scale = parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0
                    parameter += (0.1 / scale) * noise.to(parameter)
        verify_packing(model)
        verify_gradients(model)


def verify_gradients(model: Any) -> None:
    """Check that each trainable parameter gets the same gradient from packed sessions as from a plain forward.

    Args:
        model: a PEFT model whose forward takes sessions (``accept_sessions``).

    Raises:
        ValueError: no parameter is trainable, or one gets another gradient; names it.
    """
    # One session of one candidate, packed.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("model has adapters, but no trainable parameter; load them with is_trainable=True")
    inner = base_model(model)
    vocab_size = inner.get_input_embeddings().weight.shape[0]
    prompt, candidate = ([token % vocab_size for token in tokens] for tokens in ((3, 1, 4), (2, 7)))
    one = torch.tensor([1])
    sessions = SessionBatch(torch.tensor([candidate]), 2 * one, torch.tensor([0, 1]), one)
    packed = pack_sessions([prompt], sessions).to(inner.device)
    target = torch.tensor(candidate, device=inner.device)

    def loss(logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1).gather(-1, target[:, None]).sum()

    def packed_loss(states: Any, packed: PackedSessions) -> Tensor:
        logits = Head(states.weight, states.bias, **logits_map(inner)).logits(states.hidden)
        return loss(logits[0] if states.rows is None else logits[states.rows[0]])

    # Both gradients, in evaluation mode, because dropout is random.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            found = _gradients(model(packed=packed, compute=packed_loss), trained)
            ids = torch.tensor([prompt], device=inner.device)
            if inner.config.is_encoder_decoder:
                logits = model(input_ids=ids, labels=target[None]).logits[0]
            else:
                logits = model(input_ids=torch.cat((ids, target[None, :1]), 1)).logits[0, -2:]
            expected = _gradients(loss(logits), trained)
    finally:
        for module, mode in modes.items():
            module.training = mode
    # Half precision rounds much more.
    exact = all(parameter.dtype == torch.float32 for parameter in inner.parameters())
    for name, right in expected.items():
        scale = float(right.abs().max())
        if float((found[name] - right).abs().max()) > (1e-2 if exact else 0.5) * scale:
            raise ValueError(
                f"model's trainable parameter {name} gets a different gradient from packed sessions than from a plain "
                "forward: its adapter changes more than its own layer, and cannot be trained on packed sessions"
            )


def _gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a loss by parameter name; 0 for a parameter that it does not depend on."""
    wanted = list(parameters.values())
    values = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
    return {
        name: torch.zeros_like(parameter) if value is None else value
        for (name, parameter), value in zip(parameters.items(), values, strict=True)
    }


class StartValues:
    """A copy of a model's trainable parameters, to run the model with these values later.

    Args:
        model: the model whose current values are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model (without its wrappers) has the copied values. Restores its own at the end."""
        own = {name: parameter for name, parameter in model.named_parameters() if name in self.values}
        kept = {name: parameter.detach().clone() for name, parameter in own.items()}
        _reshard(model)
        self._set(own, self.values)
        try:
            yield
        finally:
            _reshard(model)
            self._set(own, kept)

    @torch.no_grad()
    def _set(self, parameters: Mapping[str, Tensor], values: dict[str, Tensor]) -> None:
        """Write values into parameters. Values from before sharding are distributed as their parameters are."""
        for name, parameter in parameters.items():
            if hasattr(parameter, "placements") and not hasattr(values[name], "placements"):
                from torch.distributed.tensor import DTensor, distribute_tensor

                assert isinstance(parameter, DTensor)
                values[name] = distribute_tensor(
                    values[name].to(parameter.device), parameter.device_mesh, parameter.placements
                )
            parameter.copy_(values[name])


def _reshard(model: nn.Module) -> None:
    """Make FSDP2 read the shards again: it keeps the parameters that it gathered last."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()
