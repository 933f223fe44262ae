"""AdamW and Muon: which weights each of them updates, and how they resume from a state."""

import copy
import gc
import weakref

import pytest
import torch

from nanovlm_hf.training.arguments import RunArguments
from nanovlm_hf.training.optimizers import Float32Muon, hidden_weights, optimizers_of, orthogonalise, parameter_groups

from helpers.models import tiny_model


def arguments(**fields):
    return RunArguments(dataset="data", output_dir="runs/x", **fields)


def names_of(model, weights):
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {names[id(weight)] for weight in weights}


def test_only_matrices_have_weight_decay():
    model = tiny_model()
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert all(name.endswith("weight") and "norm" not in name for name in names_of(model, decayed["params"]))
    others = names_of(model, others["params"])
    assert {"model.vision_tower.embeddings.cls_token", "model.vision_tower.embeddings.position_embeddings"} <= others


def test_adamw_updates_all_weights_by_default():
    model = tiny_model()
    (adamw,) = optimizers_of(model, arguments())
    assert isinstance(adamw, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(model.parameters()))


def test_muon_updates_the_hidden_matrices():
    model = tiny_model()
    hidden = names_of(model, hidden_weights(model))
    assert "model.vision_tower.embeddings.patch_embeddings.conv1.weight" in hidden
    assert "model.multi_modal_projector.fc1.weight" in hidden
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in hidden
    assert not [name for name in hidden if "embed_tokens" in name or "position" in name or "norm" in name]
    adamw, muon = optimizers_of(model, arguments(optimizer="muon"))
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


@pytest.mark.parametrize("in_bf16", [True, False])
def test_steps_of_muon_have_the_same_size_in_every_direction(in_bf16):
    """That of AdamW, 0.2 times the learning rate per weight, in matrices and in convolutions as matrices."""
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    step(
        model,
        optimizers_of(model, arguments(optimizer="muon", muon_learning_rate=1e-3, weight_decay=0.0), in_bf16),
        seed=0,
    )
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before[name]), name
    for layer in ("vision_tower.embeddings.patch_embeddings.conv2", "vision_tower.layers.0.mlp.fc1"):
        name = f"model.{layer}.weight"
        moved = (model.get_parameter(name).detach() - before[name]).flatten(1)
        assert moved.square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.2), name
        sizes = torch.linalg.svdvals(moved)
        assert sizes.max() / sizes.min() < 2.5, name  # far more for a random matrix


def test_both_optimizers_resume_from_their_states():
    one, other = tiny_model(), tiny_model()
    other.load_state_dict(one.state_dict())
    of_one, of_other = (optimizers_of(model, arguments(optimizer="muon")) for model in (one, other))
    step(one, of_one, seed=0)
    other.load_state_dict(one.state_dict())
    for optimizer, whole in zip(of_other, of_one, strict=True):
        optimizer.load_state_dict(copy.deepcopy(whole.state_dict()))
    for model, optimizers in ((one, of_one), (other, of_other)):
        step(model, optimizers, seed=1)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name


def test_muon_in_float32_agrees_with_pytorchs_up_to_rounding():
    """Three steps with momentum and decay differ by the rounding of bf16; orthogonalisation agrees with float64."""
    models = [tiny_model() for _ in range(2)]
    steps = [
        optimizers_of(model, arguments(optimizer="muon", muon_learning_rate=1e-2), in_bf16)
        for model, in_bf16 in zip(models, (True, False), strict=True)
    ]
    before = copy.deepcopy(models[0].state_dict())
    for seed in range(3):
        for model, optimizers in zip(models, steps, strict=True):
            step(model, optimizers, seed)
    assert isinstance(steps[1][1], Float32Muon)
    for weight, same in zip(*map(hidden_weights, models), strict=True):
        name = next(name for name, one in models[0].named_parameters() if one is weight)
        moved, also = ((one.detach() - before[name]).flatten() for one in (weight, same))
        assert torch.nn.functional.cosine_similarity(moved, also, dim=0) > 0.999, name
        assert (moved - also).norm() < 0.05 * moved.norm(), name
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 90), (90, 20), (40, 40)):
        matrix = torch.randn(shape, generator=generator)
        found, exact = (
            orthogonalise(one, (3.4445, -4.775, 2.0315), steps=5, eps=1e-7) for one in (matrix, matrix.double())
        )
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


def test_states_of_muon_in_bf16_and_float32_are_interchangeable():
    for saved, loaded in ((True, False), (False, True)):
        one, other = tiny_model(), tiny_model()
        of_one = optimizers_of(one, arguments(optimizer="muon"), muon_in_bf16=saved)
        step(one, of_one, seed=0)
        other.load_state_dict(one.state_dict())
        of_other = optimizers_of(other, arguments(optimizer="muon"), muon_in_bf16=loaded)
        for optimizer, whole in zip(of_other, of_one, strict=True):
            optimizer.load_state_dict(copy.deepcopy(whole.state_dict()))
        for model, optimizers in ((one, of_one), (other, of_other)):
            step(model, optimizers, seed=1)
        for name, weight in one.named_parameters():
            torch.testing.assert_close(weight, other.get_parameter(name), atol=1e-4, rtol=0)


@pytest.mark.parametrize("in_bf16", [True, False])
def test_muon_keeps_no_gradient_after_a_step(in_bf16):
    model = tiny_model()
    optimizers = optimizers_of(model, arguments(optimizer="muon"), in_bf16)
    gradients(model, seed=0)
    freed = [weakref.ref(weight.grad.untyped_storage()) for weight in hidden_weights(model)]
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    gc.collect()
    assert not [one for one in freed if one() is not None]
    assert all(matrix.grad is None for group in optimizers[1].param_groups for matrix in group["params"])


def test_an_unknown_optimizer_is_refused():
    fields = arguments()
    fields.optimizer = "lion"
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        optimizers_of(tiny_model(), fields)
