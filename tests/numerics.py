"""How tests compare tensors: exactly in float64, or by the error that a baseline of the same dtype makes itself.

`oracle` is always float64. A result is a dict of named tensors; `assert_each` compares results name by name.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


EXACT = 1e-10  # of the largest entry: rounding in float64, and far below any wrong formula


def assert_exact(actual: Tensor, oracle: Tensor, name: str = "tensor") -> None:
    """Both are float64, finite and of one shape, and differ by at most `EXACT` of max(1, largest oracle entry)."""
    _assert_comparable(actual, oracle, torch.float64, name)
    error = (actual - oracle).abs()
    bound = EXACT * max(1.0, oracle.abs().max().item())
    assert error.max() <= bound, f"{_worst(name, actual, oracle)}, more than {bound:.3g}"


def assert_matches(actual: Tensor, oracle: Tensor, baseline: Tensor, name: str = "tensor") -> None:
    """`actual` has the shape and dtype of `baseline`, is finite, and errs at most 4x as much at worst, 2x in the mean.

    Errors are differences from `oracle`, the float64 result on the same rounded inputs; means are root mean squares.
    Both bounds are needed: the first passes a small error everywhere, the second a large one somewhere.
    """
    _assert_comparable(baseline, oracle, baseline.dtype, f"baseline of {name}")
    _assert_comparable(actual, oracle, baseline.dtype, name)
    error, allowed = ((x.double() - oracle).abs() for x in (actual, baseline))
    worst = f"{_worst(name, actual, oracle)}; {_worst('the baseline', baseline, oracle)}"
    assert error.max() <= 4 * allowed.max(), f"{worst}; more than 4 times as far"
    rms, allowed_rms = (x.square().mean().sqrt() for x in (error, allowed))
    assert rms <= 2 * allowed_rms, f"{worst}; rms error {rms:.3g}, more than twice the baseline's {allowed_rms:.3g}"


def assert_each(check: Callable[..., None], *results: dict[str, Tensor]) -> None:
    """`check` on every tensor of results that hold the same names."""
    for result in results:
        assert result.keys() == results[0].keys()
    for name in results[0]:
        check(*(result[name] for result in results), name)


def least_exact(oracle: dict[str, Tensor], *baselines: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each tensor the baseline that is furthest from the oracle in the mean. Where gradients cancel, any one may be
    exact by the order of its sums."""

    def furthest(name: str) -> Tensor:
        return max((baseline[name] for baseline in baselines), key=lambda x: (x.double() - oracle[name]).norm().item())

    return {name: furthest(name) for name in oracle}


def _assert_comparable(actual: Tensor, oracle: Tensor, dtype: torch.dtype, name: str) -> None:
    assert oracle.dtype == torch.float64, f"the oracle of {name} must be float64, got {oracle.dtype}"
    assert actual.shape == oracle.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == dtype, f"{name} is {actual.dtype}, expected {dtype}"
    assert oracle.isfinite().all(), f"the oracle of {name} is not finite"
    bad = (~actual.isfinite()).nonzero()
    assert len(bad) == 0, f"{name} is not finite at {len(bad)} places, first at {tuple(bad[0].tolist())}"


def _worst(name: str, actual: Tensor, oracle: Tensor) -> str:
    error = (actual.double() - oracle).abs()
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return f"{name} is off by {error[at]:.3g} at {at}, {actual[at]:.6g} instead of {oracle[at]:.6g}"


ORACLE = torch.linspace(-2, 2, 35, dtype=torch.float64).view(5, 7)


def test_exact_passes_rounding_and_scales_with_the_oracle():
    assert_exact(ORACLE + 0.9e-10, ORACLE)
    assert_exact(1e6 * ORACLE + 1e-5, 1e6 * ORACLE)


@pytest.mark.parametrize("wrong", [2.1e-10, float("nan"), float("inf")])
def test_exact_fails_on_one_element_and_says_where(wrong):
    actual = ORACLE.clone()
    actual[3, 4] += wrong
    with pytest.raises(AssertionError, match=r"^thing is .* at \(3, 4\)"):
        assert_exact(actual, ORACLE, "thing")


def test_exact_fails_on_another_dtype_or_shape():
    with pytest.raises(AssertionError, match="is torch.float32, expected torch.float64"):
        assert_exact(torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(AssertionError, match="must be float64"):
        assert_exact(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError, match=r"shape \(7, 5\), expected \(5, 7\)"):
        assert_exact(ORACLE.T, ORACLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_passes_an_error_like_the_baseline(dtype):
    baseline = ORACLE.to(dtype)
    assert_matches(baseline, ORACLE, baseline)
    assert_matches(baseline.flip(0).flip(0), ORACLE, baseline)
    assert_matches(baseline, baseline.double(), baseline)


@pytest.mark.parametrize("wrong", [0.1, float("nan"), float("-inf")])
def test_matches_fails_on_one_element_and_says_where(wrong):
    baseline = ORACLE.bfloat16()
    actual = baseline.clone()
    actual[2, 6] += wrong
    with pytest.raises(AssertionError, match=r"^thing is .* at \(2, 6\)"):
        assert_matches(actual, ORACLE, baseline, "thing")


def test_matches_fails_on_a_small_error_everywhere():
    baseline = (ORACLE + 1e-3 * ORACLE.sin()).float()
    assert_matches((ORACLE - 1e-3 * ORACLE.sin()).float(), ORACLE, baseline)
    with pytest.raises(AssertionError, match="rms"):
        assert_matches((ORACLE + 2e-3).float(), ORACLE, baseline)


def test_matches_fails_where_the_baseline_is_exact_and_the_result_is_not():
    baseline = torch.ones(3)
    with pytest.raises(AssertionError, match="more than 4 times as far"):
        assert_matches(baseline + torch.tensor([0, 1e-6, 0]), baseline.double(), baseline)


def test_matches_fails_on_another_dtype_or_shape():
    with pytest.raises(AssertionError, match="is torch.float32, expected torch.bfloat16"):
        assert_matches(ORACLE.float(), ORACLE, ORACLE.bfloat16())
    with pytest.raises(AssertionError, match=r"shape \(5,\), expected \(5, 7\)"):
        assert_matches(ORACLE[:, 0].float(), ORACLE, ORACLE.float())
    with pytest.raises(AssertionError, match="must be float64"):
        assert_matches(ORACLE.float(), ORACLE.float(), ORACLE.float())


def test_each_compares_all_names():
    result = {"a": ORACLE, "b": ORACLE + 1}
    assert_each(assert_exact, result, dict(result))
    with pytest.raises(AssertionError, match="^b is off"):
        assert_each(assert_exact, result, {"a": ORACLE, "b": ORACLE})
    with pytest.raises(AssertionError):
        assert_each(assert_exact, result, {"a": ORACLE})


def difference(actual: Tensor, expected: Tensor) -> float:
    """Of the largest value expected."""
    assert actual.shape == expected.shape and torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
