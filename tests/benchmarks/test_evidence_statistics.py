"""Intervals, verdicts and phi against arithmetic by hand and by other means."""

import math

import pytest

from evidence_statistics import T_975, Estimate, estimate, paired, phi, size_of_equal, verdict


def test_an_interval_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    # mean 2, standard deviation 1, t of two degrees of freedom 4.3027
    assert found == Estimate(mean=2.0, low=pytest.approx(-0.484165), high=pytest.approx(4.484165), count=3)
    assert estimate([1.0]) == Estimate(mean=1.0, low=-math.inf, high=math.inf, count=1)
    assert estimate([]) is None


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 15, 30])
def test_the_quantiles_of_t_by_integration(degrees: int) -> None:
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    steps, end = 20_000, T_975[degrees - 1]
    middles = [(i + 0.5) * end / steps for i in range(steps)]
    above = sum(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in middles) * end / steps
    assert above == pytest.approx(0.475, abs=5e-6)


def test_more_values_than_the_table_of_t_has() -> None:
    found = estimate([0.0, 1.0] * 50)
    assert found is not None
    # the interval of 99 degrees of freedom is narrower by 3%
    assert (found.high - found.mean) / (1.9842 * math.sqrt(0.25 / 99)) == pytest.approx(1.03, abs=0.005)


def test_differences_are_of_equal_seeds() -> None:
    found = paired({0: 2.0, 1: 3.1, 5: 99.0}, {1: 3.0, 0: 2.0, 7: 0.0})
    assert found is not None
    assert (found.mean, found.count) == (pytest.approx(0.05), 2)
    # standard deviation 0.1 / sqrt(2), t of one degree of freedom 12.7062
    assert found.high - found.mean == pytest.approx(12.7062 * 0.05)
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "not tested yet"),
        ([-0.03], "undecided"),
        ([-0.03, -0.031, -0.032], "holds"),
        ([0.03, 0.031, 0.032], "does not hold"),
        ([-0.03, 0.01, -0.02], "undecided"),
    ],
)
def test_verdicts(values: list[float], said: str) -> None:
    assert verdict(estimate(values)) == said


@pytest.mark.parametrize("exponent", [-0.3, 0.0, 0.46, 1.0, 1.2])
@pytest.mark.parametrize(("once", "shared", "copies"), [(100, 100, 3), (0, 400, 2), (1000, 10, 8)])
def test_phi_is_found_where_it_was_put_in(exponent: float, once: int, shared: int, copies: int) -> None:
    def loss(worth: float) -> float:
        return 3.0 - 0.1 * math.log(once + worth * shared)

    found = phi(
        loss=loss(copies**exponent), vanilla=loss(1), unshared=loss(copies), copies=copies, once=once, shared=shared
    )
    assert found == pytest.approx(exponent)


def test_no_phi_where_nothing_can_be_read_off() -> None:
    sizes = {"copies": 3, "once": 100, "shared": 100}
    assert phi(loss=2.5, vanilla=2.6, unshared=2.6, **sizes) is None, "stored copies did not help"
    assert phi(loss=9.0, vanilla=2.6, unshared=2.5, **sizes) is None, "worth no copy"
    huge = phi(loss=2.0, vanilla=2.6, unshared=2.6 - 1e-12, **sizes)
    assert huge is not None
    assert 10 < huge < math.inf


def test_the_size_of_a_model_with_equal_loss() -> None:
    sizes = {400: 3.0, 100: 3.4, 1600: 2.8}
    assert size_of_equal(3.2, sizes) == pytest.approx(200)
    assert size_of_equal(2.9, sizes) == pytest.approx(800)
    assert size_of_equal(3.0, sizes) == pytest.approx(400)
    assert size_of_equal(3.5, sizes) is None
    assert size_of_equal(2.7, sizes) is None
