"""AdamW and Muon: whose weights are whose, and how they go on from a state."""

import copy

import pytest
import torch
from arguments import TrainingArguments
from conftest import tiny_model
from optimizers import hidden_weights, optimizers_of, parameter_groups

from nanovlm_hf import InputError


def arguments(**fields):
    return TrainingArguments(dataset="data", output_dir="runs/x", **fields)


def names_of(model, weights):
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {names[id(weight)] for weight in weights}


def test_weight_decay_is_on_matrices_alone():
    model = tiny_model()
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert all(name.endswith("weight") and "norm" not in name for name in names_of(model, decayed["params"]))
    others = names_of(model, others["params"])
    assert {"model.vision_tower.cls_token", "model.vision_tower.position_embedding"} <= others


def test_adamw_has_all_weights_unless_muon_is_wanted():
    model = tiny_model()
    (adamw,) = optimizers_of(model, arguments())
    assert isinstance(adamw, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(model.parameters()))


def test_muon_has_the_matrices_between_embedding_and_head():
    model = tiny_model()
    hidden = names_of(model, hidden_weights(model))
    assert "model.vision_tower.patch_embedding.conv1.weight" in hidden
    assert "model.multi_modal_projector.fc1.weight" in hidden
    assert "model.language_model.blocks.0.self_attn.q_proj.weight" in hidden
    assert not [name for name in hidden if "embed_tokens" in name or "position" in name or "norm" in name]
    adamw, muon = optimizers_of(model, arguments(muon_learning_rate=3e-3))
    rest = names_of(model, [weight for group in adamw.param_groups for weight in group["params"]])
    assert rest == {name for name, _ in model.named_parameters()} - hidden
    assert "model.language_model.embed_tokens.weight" in rest
    assert (adamw.param_groups[0]["lr"], muon.param_groups[0]["lr"]) == (1e-3, 3e-3)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def step(model, optimizers, seed):
    gradients(model, seed)
    for optimizer in optimizers:
        optimizer.step()


def test_muon_makes_steps_of_one_size_in_every_direction():
    """Of AdamW's size, 0.2 for each learning rate and weight; in matrices, and in convolutions as matrices."""
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    step(model, optimizers_of(model, arguments(muon_learning_rate=1e-3, weight_decay=0.0)), seed=0)
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before[name]), name
    for layer in ("vision_tower.patch_embedding.conv2", "vision_tower.blocks.0.mlp.fc1"):
        name = f"model.{layer}.weight"
        moved = (model.get_parameter(name).detach() - before[name]).flatten(1)
        assert moved.square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.2), name
        sizes = torch.linalg.svdvals(moved)
        assert sizes.max() / sizes.min() < 2.5, name  # of a matrix of random numbers: far more


def test_both_go_on_from_their_states():
    one, other = tiny_model(), tiny_model()
    other.load_state_dict(one.state_dict())
    of_one, of_other = (optimizers_of(model, arguments(muon_learning_rate=3e-3)) for model in (one, other))
    step(one, of_one, seed=0)
    other.load_state_dict(one.state_dict())
    for optimizer, whole in zip(of_other, of_one, strict=True):
        optimizer.load_state_dict(copy.deepcopy(whole.state_dict()))
    for model, optimizers in ((one, of_one), (other, of_other)):
        step(model, optimizers, seed=1)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name


def test_a_pytorch_without_muon(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError, match=r"muon_learning_rate: PyTorch .* has no Muon: install 2.9 or newer"):
        optimizers_of(tiny_model(), arguments(muon_learning_rate=3e-3))
