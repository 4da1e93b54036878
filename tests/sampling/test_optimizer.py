"""SGLD as an optimizer: what sample() does, in a loop of one's own."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import basinscope
from basinscope import SGLD
from basinscope.sampling.losses import next_token_loss
from tests.conftest import token_rows
from tests.models_small import tiny_model

DATA = token_rows(24, 9, seed=1)
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"localization": 10.0},
    "decay and box": {"llc_weight_decay": 2.0, "bounding_box_size": 0.004, "noise_level": 0.5},
    "rmsprop": {
        "sampling_method": "rmsprop_sgld",
        "sampling_method_kwargs": {"alpha": 0.9, "eps": 0.2},
        "localization": 5.0,
    },
}


def fresh(kind: str = "gpt_neox") -> nn.Module:
    return tiny_model(kind).eval()


def steps(model: nn.Module, optimizer: SGLD, batches: Any) -> np.ndarray:
    losses = []
    for ids in batches:
        optimizer.zero_grad()
        loss = next_token_loss(model, ids)
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.detach().numpy())
    return np.stack(losses)


def some_batches(count: int = 6) -> list[Tensor]:
    return list(torch.randint(40, (count, 4, 9)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("restriction", [None, "l1h0"])
def test_a_loop_with_it_is_a_chain_of_sample(
    tmp_path: Path, method: str, restriction: str | None
) -> None:
    settings = {"lr": 1e-3, "n_beta": 30.0, **METHODS[method]}
    masks = restriction and basinscope.create_param_masks(fresh(), restriction)
    tree = basinscope.sample(
        fresh(), DATA, {}, **settings, param_masks=masks, num_chains=2, num_draws=8, batch_size=4,
        num_init_loss_batches=1, init_seed=7, output_path=tmp_path / "s.zarr", device="cpu",
        progress=False, save_sampling_input_ids=True,
    )  # fmt: skip
    for chain in (0, 1):
        model = fresh()
        sgld = SGLD(
            model.named_parameters(), **settings, param_masks=masks, init_seed=7, chain=chain
        )
        of_chain = tree.isel(chain=chain)
        ids = torch.from_numpy(of_chain["sampling_input_ids_micro"].values.astype(np.int64))
        losses = steps(model, sgld, ids.reshape(8, 4, 9))
        stored = of_chain["sampling_loss_micro"].values.reshape(losses.shape)
        np.testing.assert_allclose(losses, stored, rtol=2e-5, atol=2e-5)
        again = steps(fresh(), sgld, ids.reshape(8, 4, 9))
        assert np.abs(again - stored).max() > 1e-3, "the weights have moved"


def test_a_mask_names_all_that_moves() -> None:
    model = fresh()
    masks = basinscope.create_param_masks(model, "l1h0")
    before = copy.deepcopy(model.state_dict())
    steps(model, SGLD(model.named_parameters(), lr=1e-3, n_beta=1.0, param_masks=masks),
          some_batches())  # fmt: skip
    for name, parameter in model.named_parameters():
        changed = parameter != before[name]
        mask = masks[name] if name in masks else torch.zeros_like(changed)
        assert torch.equal(changed, torch.ones_like(changed) if mask is None else mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_a_run_that_was_saved_goes_on_as_if_it_had_not_been(method: str, way: str) -> None:
    settings = {"lr": 1e-3, "n_beta": 30.0, **METHODS[method]}
    batches = some_batches(10)
    whole = fresh()
    expected = steps(whole, SGLD(whole.parameters(), **settings), batches)

    model = fresh()
    sgld = SGLD(model.parameters(), **settings)
    first = steps(model, sgld, batches[:5])
    file = io.BytesIO()
    if way == "pickle":
        torch.save((model, sgld), file)
        file.seek(0)
        model, sgld = torch.load(file, weights_only=False)
    else:
        torch.save((model.state_dict(), sgld.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file)
        model = fresh()
        model.load_state_dict(weights)
        sgld = SGLD(model.parameters(), lr=1.0, n_beta=1.0)  # what was saved counts
        sgld.load_state_dict(state)
    rest = steps(model, sgld, batches[5:])
    np.testing.assert_array_equal(np.concatenate([first, rest]), expected)


def test_rmsprop_s_averages_keep_their_digits_beside_16_bit_weights() -> None:
    weight = nn.Parameter(torch.randn(50).bfloat16())
    settings: dict[str, Any] = {"lr": 1e-3, "n_beta": 3.0, "sampling_method": "rmsprop_sgld"}
    sgld = SGLD([weight], **settings)
    weight.grad = torch.randn(50).bfloat16()
    sgld.step()
    average = sgld.state_dict()["state"][0]["square_avg"]
    assert average.dtype == torch.float32
    assert not torch.equal(average, average.bfloat16().float())
    other = SGLD([weight], **settings)
    other.load_state_dict(copy.deepcopy(sgld.state_dict()))
    other.step()  # its kernel's averages are the loaded ones
    sgld_average = sgld.state[weight]["square_avg"]
    expected = 0.99 * sgld_average + 0.01 * weight.grad.float() ** 2
    torch.testing.assert_close(other.state[weight]["square_avg"], expected)


def test_a_scheduler_changes_the_step() -> None:
    weight = nn.Parameter(torch.zeros(4))
    sgld = SGLD([weight], lr=0.5, n_beta=2.0, noise_level=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(sgld, step_size=1, gamma=0.1)
    expected = 0.0
    for lr in (0.5, 0.05, 0.005):
        weight.grad = torch.ones(4)
        sgld.step()
        schedule.step()
        expected -= lr / 2 * 2.0
        torch.testing.assert_close(weight.detach(), torch.full((4,), expected))


def test_rmsprop_goes_on_under_a_scheduler() -> None:
    weight = nn.Parameter(torch.zeros(3))
    sgld = SGLD([weight], lr=0.1, n_beta=1.0, sampling_method="rmsprop_sgld",
                sampling_method_kwargs={"alpha": 0.5})  # fmt: skip
    for lr in (0.1, 0.2, 0.3):
        sgld.param_groups[0]["lr"] = lr
        weight.grad = torch.ones(3)
        sgld.step()
    torch.testing.assert_close(sgld.state[weight]["square_avg"], torch.full((3,), 0.875))


def test_groups_have_settings_of_their_own_and_noise_of_their_own() -> None:
    first, second = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(1000))
    groups = [{"params": [first], "lr": 1e-2}, {"params": [second], "noise_level": 0.0}]
    sgld = SGLD(groups, lr=1e-4, n_beta=1.0, localization=1.0)
    for weight in (first, second):
        weight.grad = torch.ones(1000)
    sgld.step()
    torch.testing.assert_close(second.detach(), torch.full((1000,), -0.5e-4))
    assert float(first.detach().std()) == pytest.approx(0.1, rel=0.15)  # 6 of its standard errors

    third = nn.Parameter(torch.zeros(1000))
    third.grad = torch.ones(1000)
    sgld.add_param_group({"params": [third], "lr": 1e-2})
    sgld.step()
    both = torch.stack([first.detach() - first.detach().mean(), third.detach()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.2, "6 standard errors of independent noise"


def test_a_parameter_without_a_gradient_stays() -> None:
    moved, still = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    sgld = SGLD([moved, still], lr=0.1, n_beta=1.0)
    moved.grad = torch.zeros(5)
    sgld.step()
    assert moved.detach().abs().min() > 0
    assert not still.detach().any()


def test_a_closure_has_gradients_and_its_value_comes_back() -> None:
    weight = nn.Parameter(torch.ones(3))
    sgld = SGLD([weight], lr=0.1, n_beta=1.0, noise_level=0.0)

    def closure() -> Tensor:
        sgld.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert sgld.step(closure).item() == 3.0
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 0.1 / 2 * 2))


def test_weights_that_were_put_elsewhere_still_move() -> None:
    model = nn.Linear(4, 3)
    sgld = SGLD(model.parameters(), lr=0.1, n_beta=1.0, noise_level=0.0)
    for value in (1.0, 2.0):
        nn.utils.vector_to_parameters(torch.full((15,), value), model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        sgld.step()
        for parameter in model.parameters():
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, value - 0.05))
    model.double()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"torch.float32 .* its parameter torch.float64 .* agree"):
        sgld.step()


def test_a_compiled_step_is_the_same_step() -> None:
    weights = [nn.Parameter(torch.zeros(50)) for _ in range(2)]
    settings = {"lr": 0.1, "n_beta": 1.0, "localization": 3.0}
    plain, compiled = (SGLD([weight], **settings) for weight in weights)
    compiled_step = torch.compile(compiled.step, backend="eager")
    for i in range(3):
        for weight in weights:
            weight.grad = torch.full((50,), float(i))  # at another address each time
        plain.step()
        compiled_step()
    assert weights[0].detach().abs().min() > 0
    assert torch.equal(*weights)


def test_frozen_parameters_may_be_of_any_kind_until_they_are_thawed() -> None:
    moved, later = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5), requires_grad=False)
    packed = nn.Parameter(torch.zeros(5, dtype=torch.int8), requires_grad=False)
    sgld = SGLD([packed, moved, later], lr=0.1, n_beta=1.0)
    moved.grad = torch.zeros(5)
    sgld.step()
    assert moved.detach().abs().min() > 0
    assert not later.detach().any()
    later.requires_grad_(True).grad = torch.zeros(5)
    sgld.step()
    assert later.detach().abs().min() > 0


def test_nothing_moves_while_a_schedule_is_at_zero() -> None:
    weight = nn.Parameter(torch.zeros(5))
    sgld = SGLD([weight], lr=0.1, n_beta=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgld, lambda step: step / 10)
    weight.grad = torch.ones(5)
    sgld.step()
    assert not weight.detach().any()
    schedule.step()
    sgld.step()
    assert weight.detach().abs().min() > 0
    assert sgld.param_groups[0]["steps"] == 2


def test_numbers_of_numpy_are_numbers() -> None:
    weight = nn.Parameter(torch.zeros(5))
    sgld = SGLD([weight], lr=np.geomspace(1e-3, 1e-1, 3)[1], n_beta=np.float32(2.0),
                init_seed=np.int64(7), chain=np.int32(1))  # type: ignore[arg-type]  # fmt: skip
    file = io.BytesIO()
    torch.save(sgld.state_dict(), file)
    file.seek(0)
    (group,) = torch.load(file)["param_groups"]  # which takes plain numbers alone
    assert (group["n_beta"], group["seed"], group["chain"]) == (2.0, 8, 1)


def test_a_group_that_does_not_fit_is_refused_when_it_is_added() -> None:
    sgld = SGLD([nn.Parameter(torch.zeros(5))], lr=0.1, n_beta=1.0)
    with pytest.raises(ValueError, match=r"lr .* got -1"):
        sgld.add_param_group({"params": [nn.Parameter(torch.zeros(5))], "lr": -1.0})
    assert len(sgld.param_groups) == 1


def test_the_state_of_another_optimizer_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(5))
    sgld = SGLD([weight], lr=0.1, n_beta=1.0)
    with pytest.raises(ValueError, match=r"has no n_beta, .* what state_dict\(\) of an SGLD gave"):
        sgld.load_state_dict(torch.optim.Adam([weight]).state_dict())


def test_a_state_may_go_by_names() -> None:
    """As ``torch.distributed.checkpoint`` writes it."""
    weight = nn.Parameter(torch.zeros(5).bfloat16())
    settings: dict[str, Any] = {"lr": 1e-3, "n_beta": 3.0, "sampling_method": "rmsprop_sgld"}
    sgld, other = SGLD([weight], **settings), SGLD([weight], **settings)
    weight.grad = torch.randn(5).bfloat16()
    sgld.step()
    saved = sgld.state_dict()
    (group,) = saved["param_groups"]
    other.load_state_dict(
        {"state": {"w": saved["state"][0]}, "param_groups": [{**group, "params": ["w"]}]}
    )
    assert torch.equal(other.state[weight]["square_avg"], sgld.state[weight]["square_avg"])


def test_a_sparse_gradient_is_refused() -> None:
    layer = nn.Embedding(5, 3, sparse=True)
    sgld = SGLD(layer.parameters(), lr=0.1, n_beta=1.0)
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient 0 is sparse, .* sparse=False"):
        sgld.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr .* must be a finite number above 0; got 0.0"),
        ({"n_beta": -1.0}, "n_beta .* got -1.0"),
        ({"localization": float("nan")}, "localization .* got nan"),
        ({"sampling_method": "sgnht"}, "sampling_method .* one of sgmcmc_sgld, rmsprop_sgld"),
        ({"sampling_method_kwargs": {"alpha": 0.9}}, "which takes none"),
        ({"init_seed": -3}, "init_seed .* got -3"),
        ({"chain": -1}, "chain must be a whole number, 0 or more; got -1"),
        ({"chain": 2**24}, "chain must be at least 0 and below 16777216, got 16777216"),
        ({"param_masks": {}}, "param_masks selects no weight at all"),
        ({"param_masks": {"weight": None}}, r"give model.named_parameters\(\)"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SGLD(nn.Linear(2, 2).parameters(), **{"lr": 1e-3, "n_beta": 1.0, **changes})


def test_masks_name_parameters_that_are_there() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"names 'wieght', and no such parameter .* bias, weight"):
        SGLD(layer.named_parameters(), lr=1e-3, n_beta=1.0, param_masks={"wieght": None})
    with pytest.raises(ValueError, match=r"a mask is torch.bool of its parameter's shape"):
        SGLD(layer.named_parameters(), lr=1e-3, n_beta=1.0,
             param_masks={"weight": torch.ones(3, dtype=torch.bool)})  # fmt: skip
    with pytest.raises(TypeError, match=r"must be a dict of parameter name .* got list"):
        SGLD(layer.named_parameters(), lr=1e-3, n_beta=1.0, param_masks=["weight"])  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"the mask of 'weight' must be a bool tensor .* got ndarray"
    ):
        SGLD(layer.named_parameters(), lr=1e-3, n_beta=1.0,
             param_masks={"weight": np.ones((2, 2), bool)})  # type: ignore[dict-item]  # fmt: skip
