"""session_states(accumulate_grad=True): the embeddings' gradient is autograd's, without a dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
import transformers
from support.tiny_models import SHAPE, gpt2, llama, qwen3, seeded, session_rows, t5
from support.trainer_runs import assert_same, run, trainer_for

import raddpo_ext as rx
from raddpo_ext.integrations import embedding_gradient
from raddpo_ext.integrations.transformers import SessionCollator, accept_sessions, session_states

ROWS = session_rows(12)


def gemma(**options: Any) -> Any:
    """Its embeddings scale the rows that they look up."""
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**SHAPE, "head_dim": 4, **options}))


def padded(**options: Any) -> Any:
    """Its prompts hold the id of the padding, whose row learns nothing."""
    model = qwen3(pad_token_id=3, **options)
    assert model.get_input_embeddings().padding_idx == 3
    return model


def gradients(model: Any, accumulate: bool, batches: int = 1, **options: Any) -> dict[str, Tensor]:
    """Of the sum of the losses of several batches."""
    loss = rx.RADDPOLoss(accumulate_grad=accumulate, **options)
    model.zero_grad()
    size = len(ROWS) // batches
    for i in range(batches):
        packed = SessionCollator(embeddings=False)(ROWS[size * i : size * (i + 1)])["packed"]
        states = session_states(model, packed, accumulate_grad=accumulate)
        loss(sessions=packed.sessions, **states._asdict()).loss.backward()
    assert not model.get_input_embeddings()._forward_hooks
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("make", [qwen3, llama, gpt2, t5, gemma, padded])
def test_gradients_are_those_of_autograd(make: Any, batches: int) -> None:
    model = seeded(make)
    expected, found = (gradients(model, accumulate, batches) for accumulate in (False, True))
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_no_dense_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tied head one gradient is made, in which both add; autograd's is not asked for."""
    made: list[tuple[int, ...]] = []
    empty = torch.Tensor.new_empty

    def watched(self: Tensor, shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        made.append(tuple(shape))
        return empty(self, shape, *args, **kwargs)

    model = seeded(llama)
    table = model.get_input_embeddings().weight
    monkeypatch.setattr(torch.Tensor, "new_empty", watched)
    seen: list[Tensor | None] = []
    table.register_hook(seen.append)
    gradients(model, True)
    assert made.count(tuple(table.shape)) == 1
    assert seen == [None]
    kept = table.grad
    packed = SessionCollator(embeddings=False)(ROWS)["packed"]
    states = session_states(model, packed, accumulate_grad=True)
    states.hidden.sum().backward()
    assert table.grad is kept


def test_a_token_that_comes_often_in_bfloat16() -> None:
    """A sum of many small terms, which one by one would not change a large one."""
    embeddings = nn.Embedding(4, 8, dtype=torch.bfloat16)
    model = type("Model", (), {"get_input_embeddings": lambda self: embeddings})()
    with embedding_gradient.adding_rows(model):
        output = embeddings(torch.tensor([[1] * 1000]))
    output.backward(torch.full_like(output, 2**-6))
    assert embeddings.weight.grad[1].tolist() == [1000 / 64] * 8
    assert not embeddings.weight.grad[0].any()


def test_what_keeps_the_gradient_of_autograd() -> None:
    def through(embeddings: nn.Module) -> bool:
        """Whether the gradient reaches a hook of the weight."""
        seen: list[Tensor | None] = []
        embeddings.weight.register_hook(seen.append)
        model = type("Model", (), {"get_input_embeddings": lambda self: embeddings})()
        with embedding_gradient.adding_rows(model):
            embeddings(torch.tensor([0, 1])).sum().backward()
        return seen[0] is not None

    assert not through(nn.Embedding(4, 2))
    assert through(nn.Embedding(4, 2, max_norm=1.0))
    assert through(nn.Embedding(4, 2, scale_grad_by_freq=True))
    assert through(nn.Embedding(4, 2, sparse=True))
    assert through(type("Scaled", (nn.Embedding,), {})(4, 2))


def test_hooks_that_change_the_output() -> None:
    embeddings = nn.Embedding(4, 2)
    embeddings.register_forward_hook(lambda module, args, output: 2 * output)
    model = type("Model", (), {"get_input_embeddings": lambda self: embeddings})()
    with embedding_gradient.adding_rows(model):
        embeddings(torch.tensor([0, 1])).sum().backward()
    assert embeddings.weight.grad.tolist() == [[2, 2], [2, 2], [0, 0], [0, 0]]
    assert len(embeddings._forward_hooks) == 1


def test_frozen_embeddings_and_a_second_derivative() -> None:
    model = seeded(qwen3)
    model.get_input_embeddings().requires_grad_(False)
    assert "model.embed_tokens.weight" not in gradients(model, True)
    model.get_input_embeddings().requires_grad_(True)
    packed = SessionCollator(embeddings=False)(ROWS)["packed"]
    loss = session_states(model, packed, accumulate_grad=True).hidden.sum()
    with pytest.raises(RuntimeError, match="session_states with accumulate_grad has no second derivative"):
        loss.backward(create_graph=True)


def test_by_a_keyword_of_the_forward() -> None:
    model = accept_sessions(seeded(qwen3))
    packed = SessionCollator(embeddings=False)(ROWS)["packed"]
    seen: list[Tensor | None] = []
    model.get_input_embeddings().weight.register_hook(seen.append)
    for accumulate in (True, False):
        model(packed=packed, accumulate_grad=accumulate).hidden.sum().backward()
        assert (seen.pop() is None) == accumulate


@pytest.mark.parametrize("make", [qwen3, llama])
def test_the_trainer_does_so_unless_something_watches(make: Any, tmp_path: Any) -> None:
    """It learns the same, and an optimizer that lives in hooks on the parameters gets every gradient."""
    options: dict[str, Any] = {"accumulate": 2, "batch": 6, "max_steps": 3, "train_sampling_strategy": "sequential"}
    plain = run(seeded(make), ROWS, **options)
    assert plain.trainer._accumulate_grad()
    assert plain.trainer.objective.loss.head_options["accumulate_grad"]
    watched, seen = seeded(make), []
    watched.get_input_embeddings().weight.register_post_accumulate_grad_hook(lambda weight: seen.append(1))
    found = run(watched, ROWS, **options)
    assert not found.trainer._accumulate_grad()
    assert len(seen) == 6
    assert_same(found.parameters, plain.parameters)
    adapted = trainer_for(
        seeded(make), ROWS, output_dir=str(tmp_path), extra={"peft_config": _lora()}, learning_rate=0.1
    )
    assert not adapted._accumulate_grad()


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj"], r=2)
