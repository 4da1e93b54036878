"""The SGLD update on every path against the update in float64."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from basinscope.kernels import paths, pointers
from basinscope.kernels.noise import ROUNDING
from basinscope.kernels.pointers import cut
from basinscope.kernels.sgld import METRIC_NAMES, SgldUpdate
from tests.reference import philox
from tests.reference import sgld as oracle

PATHS = ["cpu", "reference", "triton"]
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(3, 5), (0,), (1030,), (7, 1, 2), ()]
ADDRESS = {"seed": 2**40 + 3, "chain": 2}

PLAIN: dict[str, Any] = {"lr": 1e-2, "n_beta": 30.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "localized": {"localization": 5.0, "weight_decay": 3.0},
    "no noise": {"noise_level": 0.0, "localization": 5.0},
    "loud": {"noise_level": 2.5},
    "boxed": {"bounding_box_size": 0.05, "localization": 5.0},
    "rmsprop": {"alpha": 0.9, "eps": 0.1, "localization": 5.0, "weight_decay": 3.0},
    "rmsprop of one step": {"alpha": 0.0, "eps": 0.1},
    "everything": {
        "alpha": 0.99,
        "eps": 0.01,
        "localization": 5.0,
        "weight_decay": 3.0,
        "noise_level": 0.5,
        "bounding_box_size": 0.4,
    },
}


class Problem:
    """Tensors of odd sizes, and the same problem for the oracle."""

    def __init__(
        self,
        settings: dict[str, Any],
        dtype: torch.dtype = torch.float32,
        masked: bool = False,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
    ) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(scale: float) -> list[Tensor]:
            return [(scale * torch.randn(s, generator=generator)).to(dtype) for s in shapes]

        self.settings = oracle.Settings(**{**PLAIN, **settings})
        self.anchors, noise = draw(1.0), draw(0.05)
        self.weights = [a + n for a, n in zip(self.anchors, noise, strict=True)]
        self.steps: list[list[Tensor | None]] = [list(draw(1.0)) for _ in range(2)]
        self.masks: list[Tensor | None] = [None] * len(shapes)
        if masked:
            self.masks = [torch.rand(s, generator=generator) < 0.6 for s in shapes]
            self.masks[-1] = None

    def update(self, path: str, metrics: bool = True, **more: Any) -> SgldUpdate:
        return SgldUpdate(
            [w.clone() for w in self.weights],
            anchors=self.anchors,
            masks=self.masks,
            metrics=metrics,
            path=path,
            **asdict(self.settings),
            **more,
        )

    def run(self, update: SgldUpdate) -> list[Tensor | None]:
        return [update.step(g, step=i, **ADDRESS) for i, g in enumerate(self.steps)]

    def expected_step(
        self, weights: list[Tensor], squares: list[np.ndarray], step: int
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Weights, second moments and metrics of one float64 step from the given weights."""
        new_weights, new_squares, terms = [], [], []
        for i, gradient in enumerate(self.steps[step]):
            w, w0 = wide(weights[i]), wide(self.anchors[i])
            if gradient is None:
                new_weights.append(w)
                new_squares.append(squares[i])
                continue
            mask = self.masks[i]
            m = np.ones(w.shape) if mask is None else mask.numpy().astype(np.float64)
            xi = philox.normals(w.size, step=step, param_index=i, **ADDRESS).reshape(w.shape)
            w, v, t = oracle.update(w, wide(gradient), w0, m, squares[i], xi, self.settings)
            new_weights.append(w)
            new_squares.append(v)
            terms.append(t)
        return new_weights, new_squares, oracle.metrics(terms)


def check_against_oracle(problem: Problem, path: str, dtype: torch.dtype) -> None:
    """Each step starts from the weights the kernel has reached, so that roundings do not add up."""
    update = problem.update(path)
    squares = [np.zeros(w.shape) for w in problem.weights]
    for i, gradients in enumerate(problem.steps):
        expected, squares, metrics = problem.expected_step(update.params, squares, i)
        found = update.step(gradients, step=i, **ADDRESS)
        for ours, truth in zip(update.params, expected, strict=True):
            np.testing.assert_allclose(wide(ours), truth, atol=2e-6, rtol=rounding(dtype, path))
        for ours, truth, mask in zip(
            update.square_avgs or [], squares, problem.masks, strict=False
        ):
            moved = ... if mask is None else mask.numpy()
            np.testing.assert_allclose(wide(ours)[moved], truth[moved], rtol=1e-5)
        assert found is not None
        assert found.dtype == torch.float32
        assert found.shape == (len(METRIC_NAMES),)
        # a dot product of nearly orthogonal terms is judged against the product of their norms
        slack = 1e-5 * (metrics[0] + metrics[4]) * (metrics[0] + metrics[2] + metrics[3])
        np.testing.assert_allclose(found[:6].numpy(), metrics[:6], rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(found[6:].numpy(), metrics[6:], rtol=2e-5, atol=slack)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def rounding(dtype: torch.dtype, path: str) -> float:
    """Half a unit in the last place; Triton's interpreter (alone) truncates to bfloat16."""
    whole = path == "triton" and dtype == torch.bfloat16
    return torch.finfo(dtype).eps * (1.01 if whole else 0.505) if dtype in HALVES else 2e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_float32(path: str, masked: bool, case: str) -> None:
    check_against_oracle(Problem(CASES[case], masked=masked), path, torch.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", ["localized", "everything"])
def test_16_bits(path: str, dtype: torch.dtype, case: str) -> None:
    check_against_oracle(Problem(CASES[case], dtype, masked=True), path, dtype)


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_float64(path: str, case: str) -> None:
    """The noise is that of the float32 stream, the arithmetic float64."""
    problem = Problem({**CASES[case], "noise_level": 0.0}, torch.float64, masked=True)
    update = problem.update(path)
    squares = [np.zeros(w.shape) for w in problem.weights]
    expected, _, _ = problem.expected_step(update.params, squares, 0)
    update.step(problem.steps[0], step=0, **ADDRESS)
    # the constants are float64 as well
    for ours, truth in zip(update.params, expected, strict=True):
        np.testing.assert_allclose(wide(ours), truth, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
def test_metrics_do_not_change_the_step(path: str) -> None:
    problem = Problem(CASES["everything"], masked=True)
    with_metrics, without = problem.update(path), problem.update(path, metrics=False)
    problem.run(with_metrics)
    assert problem.run(without) == [None, None]
    for ours, theirs in zip(with_metrics.params, without.params, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_anchors_are_not_needed_for_a_plain_step(path: str) -> None:
    problem = Problem(CASES["plain"])
    bare = SgldUpdate([w.clone() for w in problem.weights], path=path, **PLAIN)
    anchored = problem.update(path, metrics=False)
    problem.run(bare)
    problem.run(anchored)
    for ours, theirs in zip(bare.params, anchored.params, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("path", PATHS)
def test_a_parameter_without_gradient_is_left_alone(path: str) -> None:
    """And the parameters after it keep their own noise."""
    problem = Problem(CASES["everything"])
    problem.steps[0][2] = None
    update = problem.update(path)
    squares = [np.zeros(w.shape) for w in problem.weights]
    expected, _, metrics = problem.expected_step(update.params, squares, 0)
    found = update.step(problem.steps[0], step=0, **ADDRESS)
    assert torch.equal(update.params[2], problem.weights[2])
    assert update.square_avgs is not None
    assert not update.square_avgs[2].any()
    for ours, truth in zip(update.params, expected, strict=True):
        np.testing.assert_allclose(wide(ours), truth, atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(found.numpy()[:6], metrics[:6], rtol=2e-5)
    frozen = problem.update(path)
    assert not frozen.step([None] * len(SHAPES), step=0, **ADDRESS).any()


@pytest.mark.parametrize("path", PATHS)
def test_masked_elements_stay_bit_for_bit(path: str) -> None:
    """Even where their gradient is NaN."""
    problem = Problem(CASES["rmsprop"], masked=True)
    mask, gradient = problem.masks[2], problem.steps[0][2]
    assert mask is not None
    assert gradient is not None
    gradient[~mask] = torch.nan
    update = problem.update(path, metrics=False)
    update.step(problem.steps[0], step=0, **ADDRESS)
    assert torch.equal(update.params[2][~mask], problem.weights[2][~mask])
    assert (update.params[2][mask] != problem.weights[2][mask]).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, inside Triton's interpreter
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", ["plain", "boxed", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bad_gradient_is_not_silent(path: str, bad: float, case: str, dtype: torch.dtype) -> None:
    """NaN stays NaN; an infinite gradient moves its weight to infinity, or to the box."""
    problem = Problem(CASES[case], dtype, shapes=[(9,)])
    gradient = problem.steps[0][0]
    assert gradient is not None
    gradient[4] = bad
    update = problem.update(path)
    metrics = update.step(problem.steps[0], step=0, **ADDRESS)
    moved = update.params[0]
    if case == "boxed" and not np.isnan(bad):
        assert abs(float(moved[4] - problem.anchors[0][4])) == pytest.approx(0.05, rel=0.1)
    else:
        assert not moved[4].isfinite()
    others = torch.arange(9) != 4
    assert moved[others].isfinite().all()
    assert metrics is not None
    assert not metrics[1].isfinite()


@pytest.mark.parametrize("path", PATHS)
def test_mixed_dtypes_and_strided_gradients(path: str) -> None:
    """Each parameter takes the step it would take alone, under its own index."""
    shapes, dtypes = [(4, 6), (5,), (3, 2)], [torch.float32, torch.bfloat16, torch.float32]
    weights = [torch.randn(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    gradients = [torch.randn(s[::-1]).to(d).mT if len(s) > 1 else torch.randn(s).to(d)
                 for s, d in zip(shapes, dtypes, strict=True)]  # fmt: skip
    together = [w.clone() for w in weights]
    SgldUpdate(together, param_indices=[7, 0, 9], path=path, **PLAIN).step(
        gradients, step=3, **ADDRESS
    )
    for i, index in enumerate([7, 0, 9]):
        alone = weights[i].clone()
        SgldUpdate([alone], param_indices=[index], path=path, **PLAIN).step(
            [gradients[i].contiguous()], step=3, **ADDRESS
        )
        assert torch.equal(alone, together[i])


@pytest.mark.parametrize("path", PATHS)
def test_parameters_of_two_dtypes_are_measured_together_and_remember_their_own(path: str) -> None:
    dtypes = [torch.float32, torch.bfloat16]
    problem = Problem(CASES["rmsprop"], shapes=[(6,), (4,)])
    of_each = [problem.weights, problem.anchors, *problem.steps]
    tensors = [
        [t.to(d) for t, d in zip(of, dtypes, strict=True) if t is not None] for of in of_each
    ]

    def run(members: list[int]) -> tuple[SgldUpdate, np.ndarray]:
        weights, anchors, *steps = ([of[i].clone() for i in members] for of in tensors)
        update = SgldUpdate(
            weights, anchors=anchors, param_indices=members, metrics=True, path=path,
            **asdict(problem.settings),
        )  # fmt: skip
        found = [update.step(gradients, step=i, **ADDRESS) for i, gradients in enumerate(steps)]
        return update, np.array([wide(metrics) for metrics in found if metrics is not None])

    together, measured = run([0, 1])
    alone, parts = zip(run([0]), run([1]), strict=True)
    for i, update in enumerate(alone):
        assert torch.equal(together.params[i], update.params[0])
        assert together.square_avgs is not None
        assert update.square_avgs is not None
        assert torch.equal(together.square_avgs[i], update.square_avgs[0])
    norms, dots = np.s_[:, :6], np.s_[:, 6:]
    np.testing.assert_allclose(measured[norms], np.hypot(*(p[norms] for p in parts)), rtol=1e-5)
    np.testing.assert_allclose(measured[dots], sum(p[dots] for p in parts), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_a_box_without_room_holds_weights_at_their_anchors(path: str) -> None:
    problem = Problem({"bounding_box_size": 0.0}, masked=True)
    update = problem.update(path, metrics=False)
    problem.run(update)
    for ours, anchor, old, mask in zip(
        update.params, problem.anchors, problem.weights, problem.masks, strict=True
    ):
        assert torch.equal(ours, anchor if mask is None else torch.where(mask, anchor, old))


@pytest.mark.parametrize("path", PATHS)
def test_anchors_may_lie_in_any_order(path: str) -> None:
    problem = Problem(CASES["localized"], shapes=[(4, 6)])
    usual = problem.update(path)
    problem.anchors = [anchor.mT.contiguous().mT for anchor in problem.anchors]
    strided = problem.update(path)
    for ours, theirs in zip(problem.run(strided), problem.run(usual), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    assert torch.equal(strided.params[0], usual.params[0])


@pytest.mark.parametrize("path", PATHS)
def test_a_run_continues_from_its_weights_and_second_moments(path: str) -> None:
    problem = Problem(CASES["everything"])
    whole = problem.update(path)
    problem.run(whole)
    first = problem.update(path)
    first.step(problem.steps[0], step=0, **ADDRESS)
    second = problem.update(path)
    for target, source in zip(second.params, first.params, strict=True):
        target.copy_(source)
    assert second.square_avgs is not None
    assert first.square_avgs is not None
    for target, source in zip(second.square_avgs, first.square_avgs, strict=True):
        target.copy_(source)
    second.step(problem.steps[1], step=1, **ADDRESS)
    for ours, theirs in zip(second.params, whole.params, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ["localized", "everything"])
def test_masks_of_whole_rows_and_columns(path: str, case: str) -> None:
    """Stretches that are chosen whole, in part and not at all, in several tensors."""
    problem = Problem(CASES[case], shapes=[(70, 64), (64, 70), (5000,), (9,)])
    rows, columns, few, none = (torch.zeros(s.shape, dtype=torch.bool) for s in problem.weights)
    rows[10:60], columns[:, 3:20], few[4999] = True, True, True
    problem.masks = [rows, columns, few, none]
    for metrics in (False, True):
        update = problem.update(path, metrics=metrics)
        squares = [np.zeros(w.shape) for w in problem.weights]
        expected, _, truth = problem.expected_step(update.params, squares, 0)
        found = update.step(problem.steps[0], step=0, **ADDRESS)
        for ours, new, old, mask in zip(
            update.params, expected, problem.weights, problem.masks, strict=True
        ):
            np.testing.assert_allclose(wide(ours), new, atol=2e-6, rtol=2e-6)
            assert torch.equal(ours[~mask], old[~mask])
        if found is not None:
            np.testing.assert_allclose(found[:6].numpy(), truth[:6], rtol=2e-5)


def test_stretches_outside_of_a_mask_are_not_visited() -> None:
    """One row of a thousand costs one block of the CPU path, not all."""
    mask = torch.zeros(1000, 4096, dtype=torch.bool)
    mask[500] = True
    mask[501, :7] = True
    blocks = cut([mask.numel()], [mask], 2048, keep_empty=False)
    assert blocks.start_of.tolist() == [500 * 4096, 500 * 4096 + 2048, 501 * 4096]
    assert blocks.bits_of.tolist() == [-1, -1, 0]
    assert blocks.bits.tolist() == [0b1111111] + [0] * 255
    assert len(cut([mask.numel()], [mask], 2048, keep_empty=True)) == 2000


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_stochastic_rounding_follows_its_stream(path: str, masked: bool, case: str) -> None:
    """Up where the bits cut off and the upper half of the element's word carry over."""
    problem = Problem(CASES[case], torch.bfloat16, masked=masked)
    update = problem.update(path, rounding="stochastic")
    before = [w.clone() for w in update.params]
    squares = [np.zeros(w.shape) for w in problem.weights]
    expected, _, _ = problem.expected_step(update.params, squares, 0)
    update.step(problem.steps[0], step=0, **ADDRESS)
    unsure = 0
    for i, (ours, truth, old) in enumerate(zip(update.params, expected, before, strict=True)):
        words = philox.words(truth.size, step=0, param_index=i, stream=ROUNDING, **ADDRESS)
        bits = truth.astype(np.float32).view(np.uint32).reshape(-1).astype(np.uint64)
        carried = (bits + (words >> 16)) >> 16
        found = ours.view(torch.int16).numpy().view(np.uint16).reshape(-1)
        mask = problem.masks[i]
        moved = np.ones(truth.size, np.bool_) if mask is None else mask.numpy().reshape(-1)
        # a weight within float32's rounding of the carry may fall on either side
        near = np.abs((bits & 0xFFFF) + (words >> 16).astype(np.float64) - 0x10000) < 64
        unsure += int((near & moved).sum())
        assert (found == carried)[moved & ~near].all()
        assert torch.equal(ours.reshape(-1)[~moved], old.reshape(-1)[~moved])
    assert unsure < 10


@pytest.mark.parametrize("path", PATHS)
def test_stochastic_rounding_keeps_small_steps(path: str) -> None:
    """A drift of 1e-4 per step at weights of 1, whose lower bfloat16 neighbour is 2^-8 away.

    An element steps down with a probability of 0.0256, so that 20 steps of n elements have a mean
    with a standard deviation of 20^0.5 * 2^-8 * 0.16 / n^0.5, 2.8e-5 for n = 10,000. Six of them:
    a false alarm in five hundred million runs.
    """
    settings: dict[str, Any] = {"lr": 2e-4, "n_beta": 1.0, "noise_level": 0.0, "path": path}
    drifts = {"nearest": 0.0, "stochastic": -2e-3}
    if path == "triton":
        del drifts["nearest"]  # Triton's interpreter (alone) truncates to bfloat16
    for rounding, drift in drifts.items():
        weight = torch.ones(10_000, dtype=torch.bfloat16)
        update = SgldUpdate([weight], rounding=rounding, **settings)
        for step in range(20):
            update.step([torch.ones_like(weight)], step=step, **ADDRESS)
        assert float(weight.double().mean()) - 1 == pytest.approx(drift, abs=1.7e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_zeroed_in_the_same_pass(path: str, dtype: torch.dtype) -> None:
    """All of them, masked or not; the step is the one that leaves them alone."""
    problem = Problem(CASES["everything"], dtype, masked=True)
    leaving, zeroing = problem.update(path), problem.update(path, zero_grads=True)
    gradients = [None if g is None else g.clone() for g in problem.steps[0]]
    metrics = zeroing.step(gradients, step=0, **ADDRESS)
    expected = leaving.step(problem.steps[0], step=0, **ADDRESS)
    assert all(map(torch.equal, zeroing.params, leaving.params))
    assert torch.equal(metrics, expected)
    assert not any(g.any() for g in gradients if g is not None)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_that_no_chosen_weight_has_are_zeroed_too(path: str) -> None:
    problem = Problem(CASES["plain"], shapes=[(5000,)])
    mask = torch.zeros(5000, dtype=torch.bool)
    mask[4999] = True
    problem.masks = [mask]
    update = problem.update(path, metrics=False, zero_grads=True)
    (gradient,) = problem.steps[0]
    assert gradient is not None
    update.step([gradient], step=0, **ADDRESS)
    assert not gradient.any()


def test_gradients_that_would_be_copied_cannot_be_zeroed() -> None:
    update = SgldUpdate([torch.zeros(3, 2)], zero_grads=True, **PLAIN)
    with pytest.raises(ValueError, match=r"strides \(1, 3\).*contiguous"):
        update.step([torch.zeros(2, 3).t()], seed=0, chain=0, step=0)


@pytest.mark.parametrize("path", PATHS)
def test_a_step_can_be_counted_on_the_device(path: str) -> None:
    problem = Problem(CASES["localized"])
    told, counted = problem.update(path), problem.update(path)
    for number in (0, 1, 2**31 + 5):
        told.step(problem.steps[0], step=number, **ADDRESS)
        counted.step(problem.steps[0], step=torch.tensor([number]), **ADDRESS)
        assert all(map(torch.equal, told.params, counted.params))


@pytest.mark.parametrize("path", ["cpu", "triton"])
def test_elements_beyond_2_to_the_31(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last 5000 elements of a tensor of 2^33 + 7, whose first elements do not exist.

    Addresses are those of its beginning, so that only offsets of more than 32 bits reach memory.
    """
    first, count = 2**33 + 7 - 4999 - (2**33 + 7 - 4999) % 2048, 5000
    module = importlib.import_module(f"basinscope.kernels.sgld_{path}")
    problem = Problem(CASES["everything"], shapes=[(count,)])
    problem.masks = [torch.rand(count) < 0.5]

    def early(tensors: Sequence[Tensor | None]) -> np.ndarray:
        places = pointers.addresses(tensors)
        return np.where(places == 0, 0, places - 4 * first)

    def late(sizes: Sequence[int], *others: Any, **options: Any) -> pointers.Blocks:
        blocks = pointers.cut(sizes, *others, **options)
        return replace(blocks, start_of=blocks.start_of + first)

    monkeypatch.setattr(module, "addresses", early)
    monkeypatch.setattr(module, "cut", late)
    update = problem.update(path, metrics=False)
    (run,) = update._passes
    if path == "cpu":
        run._sizes += first  # type: ignore[attr-defined]
    else:
        run._fixed[2] += first  # type: ignore[attr-defined]
    update.step(problem.steps[0], step=0, **ADDRESS)

    xi = philox.normals(count, step=0, param_index=0, first_quad=first // 4, **ADDRESS)
    w, w0, g = (wide(t[0]) for t in (problem.weights, problem.anchors, problem.steps[0]))
    mask = problem.masks[0].numpy().astype(np.float64)
    truth, _, _ = oracle.update(w, g, w0, mask, np.zeros(count), xi, problem.settings)
    np.testing.assert_allclose(wide(update.params[0]), truth, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_stochastic_rounding_leaves_wider_weights_alone(path: str) -> None:
    problem = Problem(CASES["everything"])
    random, nearest = problem.update(path, rounding="stochastic"), problem.update(path)
    problem.run(random)
    problem.run(nearest)
    assert all(map(torch.equal, random.params, nearest.params))


@pytest.mark.parametrize("case", ["plain", "everything"])
def test_the_number_of_threads_changes_no_bit(case: str) -> None:
    problem = Problem(CASES[case], shapes=[(300_001,), (7,), (90_000,)])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            update = problem.update("cpu")
            results.append((problem.run(update), update.params))
    finally:
        torch.set_num_threads(threads)
    for metrics, weights in results[1:]:
        assert all(map(torch.equal, metrics, results[0][0]))
        assert all(map(torch.equal, weights, results[0][1]))


def test_float64_on_a_gpu_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_automatic", lambda device: "triton")
    wide, narrow = torch.zeros(5, dtype=torch.float64), torch.zeros(5)
    settings: dict[str, Any] = {"lr": 1e-3, "n_beta": 1.0}
    assert SgldUpdate([narrow], **settings).path == "triton"
    assert SgldUpdate([narrow, wide], **settings).path == "reference"
    with pytest.raises(ValueError, match="use path='reference'"):
        SgldUpdate([wide], path="triton", **settings)


def test_a_gpu_s_table_of_addresses_is_uploaded_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy from pageable memory would wait for all that was queued before."""
    update = SgldUpdate([torch.zeros(5)], lr=1e-3, n_beta=1.0, path="triton")
    launch: Any = update._passes[0]
    launch._device = torch.device("cuda")
    copies: list[tuple[bool, Any]] = []
    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.data_ptr())
        return tensor

    def to(tensor: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        copies.append((tensor.data_ptr() in pinned, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    gradients = [torch.ones(5)]
    for _ in range(2):  # the second has nothing new
        launch._renew_table(gradients)
    assert copies == [(True, True)]


def test_a_graph_over_moved_weights_is_noticed() -> None:
    """Writing through an address must count as an in-place change for autograd."""
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight**2).sum()
    SgldUpdate([weight], **PLAIN).step([torch.ones(3)], step=0, **ADDRESS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_auto_takes_the_compiled_path_on_a_cpu() -> None:
    update = SgldUpdate([torch.zeros(3)], **PLAIN)
    assert update.path == "cpu"
    assert update.square_avgs is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"noise_level": -1.0}, "noise_level must not be negative"),
        ({"bounding_box_size": -1.0}, "bounding_box_size must not be negative"),
        ({"alpha": 0.9}, "alpha and eps together, got alpha=0.9, eps=None"),
        ({"alpha": 1.5, "eps": 0.1}, "alpha must lie between 0 and 1, got 1.5"),
        ({"alpha": 0.9, "eps": 0.0}, "eps must be positive"),
        ({"localization": 1.0}, r"pass anchors=\[w0 of each parameter\]"),
        ({"metrics": True}, "anchors"),
        ({"bounding_box_size": 1.0}, "anchors"),
        ({"params": []}, "no parameters"),
        ({"params": [torch.zeros(3, dtype=torch.int64)]}, r"parameter 0 is torch\.int64"),
        ({"params": [torch.zeros(4, 3).t()]}, r"strides \(1, 3\) for shape \(3, 4\)"),
        ({"anchors": []}, "got 0 anchors for 1 parameters"),
        ({"anchors": [torch.zeros(4)]}, r"anchor 0 is torch\.float32 \(4,\) on cpu, its param"),
        ({"masks": [torch.zeros(3)]}, r"a mask is torch\.bool"),
        ({"masks": [None, None]}, "got 2 masks for 1 parameters"),
        ({"param_indices": [1, 1]}, "1 different numbers"),
        ({"param_indices": [2**32]}, r"0 \.\. 2\*\*32 - 1"),
        ({"path": "fast"}, "unknown kernel path"),
        ({"rounding": "up"}, "'nearest' or 'stochastic', got 'up'"),
        (
            {"rounding": "stochastic", "params": [torch.zeros(3, dtype=torch.float16)]},
            r"parameter 0 is torch\.float16: stochastic rounding is for bfloat16",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"params": [torch.zeros(3)], **PLAIN, **changes}
    with pytest.raises(ValueError, match=message):
        SgldUpdate(arguments.pop("params"), **arguments)


@pytest.mark.parametrize(
    ("gradients", "address", "message"),
    [
        ([torch.zeros(4)], {}, r"gradient 0 is torch\.float32 \(4,\)"),
        ([torch.zeros(3, dtype=torch.float64)], {}, r"gradient 0 is torch\.float64"),
        ([], {}, "got 0 gradients for 1 parameters"),
        ([torch.zeros(3)], {"chain": 2**24}, "chain must be"),
        ([torch.zeros(3)], {"step": -1}, "step must be"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(
    gradients: list[Tensor], address: dict[str, int], message: str
) -> None:
    update = SgldUpdate([torch.zeros(3)], **PLAIN)
    with pytest.raises(ValueError, match=message):
        update.step(gradients, **{"seed": 0, "chain": 0, "step": 0, **address})


def test_triton_refuses_float64() -> None:
    with pytest.raises(ValueError, match="use path='reference'"):
        SgldUpdate([torch.zeros(3, dtype=torch.float64)], path="triton", **PLAIN)
