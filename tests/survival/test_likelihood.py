from __future__ import annotations

from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cropkt.survival.likelihood import discrete_nll, log_survival, risk

logits = st.lists(st.floats(-8, 8), min_size=1, max_size=8)


def hazards(z: list[float]) -> list[float]:
    return [1 / (1 + exp(-value)) for value in z]


def alive_after(h: list[float], k: int) -> float:
    """S(k); S(-1) = 1."""
    value = 1.0
    for i in range(k + 1):
        value *= 1 - h[i]
    return value


def by_definition(z: list[float], k: int, died: bool, alpha: float, floor: float) -> float:
    """The published loss, term by term."""
    h = hazards(z)
    c = 1 - int(died)
    uncensored = -(1 - c) * (log(max(alive_after(h, k - 1), floor)) + log(max(h[k], floor)))
    censored = -c * log(max(alive_after(h, k), floor))
    return (1 - alpha) * (censored + uncensored) + alpha * uncensored


@given(z=logits, died=st.booleans(), alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9]), data=st.data())
@pytest.mark.parametrize(("loss", "floor"), [("log_space", 0.0), ("clamped", 1e-7)])
def test_equals_the_definition(z, died, alpha, data, loss, floor) -> None:
    k = data.draw(st.integers(0, len(z) - 1))
    got = discrete_nll(
        torch.tensor([z], dtype=torch.float64),
        torch.tensor([k]),
        torch.tensor([died]),
        alpha=alpha,
        loss=loss,
    )
    assert got.shape == (1,)
    assert got.item() == pytest.approx(by_definition(z, k, died, alpha, floor), rel=1e-8, abs=1e-9)


@given(z=logits, data=st.data())
def test_the_losses_agree_where_nothing_is_clamped(z, data) -> None:
    k = data.draw(st.integers(0, min(1, len(z) - 1)))
    arguments = (torch.tensor([z, z]).double(), torch.tensor([k, k]), torch.tensor([True, False]))
    assert torch.allclose(
        discrete_nll(*arguments, loss="log_space"), discrete_nll(*arguments, loss="clamped")
    )


@pytest.mark.parametrize("died", [True, False])
def test_a_late_patient_teaches_in_log_space_and_not_where_clamped(died: bool) -> None:
    def gradient(loss):
        z = torch.full((1, 32), 2.0, requires_grad=True)
        discrete_nll(z, torch.tensor([31]), torch.tensor([died]), loss=loss).sum().backward()
        return z.grad[0, :31]

    assert torch.count_nonzero(gradient("clamped")) == 0
    # d/dz of -sum log(1 - h) is h, for each year lived through.
    assert torch.allclose(gradient("log_space"), torch.full((31,), 2.0).sigmoid())


def test_extreme_logits_stay_finite_with_a_gradient() -> None:
    z = torch.tensor([[-80.0, 80.0, -80.0], [80.0, 80.0, 80.0]], requires_grad=True)
    value = discrete_nll(z, torch.tensor([1, 2]), torch.tensor([True, False]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("loss", ["log_space", "clamped"])
def test_models_and_patients_are_separable(loss) -> None:
    z = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    bins, event = torch.tensor([0, 6, 3, 2, 2]), torch.tensor([True, False, True, False, True])
    whole = discrete_nll(z, bins, event, alpha=0.5, loss=loss)
    assert whole.shape == (3, 5)
    for f in range(3):
        for i in range(5):
            alone = discrete_nll(
                z[f, i : i + 1], bins[i : i + 1], event[i : i + 1], alpha=0.5, loss=loss
            )
            assert whole[f, i].item() == pytest.approx(alone.item())


@given(z=logits)
def test_risk_is_minus_the_years_expected(z: list[float]) -> None:
    h = hazards(z)
    survival = [alive_after(h, j) for j in range(len(z))]
    tensor = torch.tensor(z, dtype=torch.float64)
    assert log_survival(tensor).exp().tolist() == pytest.approx(survival)
    assert risk(tensor).item() == pytest.approx(-sum(survival))


@given(
    z=st.lists(st.floats(-4, 2), min_size=1, max_size=8),
    rise=st.floats(0.01, 3),
    data=st.data(),
)
def test_a_higher_hazard_is_a_higher_risk(z, rise, data) -> None:
    higher = list(z)
    higher[data.draw(st.integers(0, len(z) - 1))] += rise
    assert risk(torch.tensor(higher).double()) > risk(torch.tensor(z).double())


def test_risk_is_float64_whatever_the_logits() -> None:
    assert risk(torch.zeros(2, 3, 4)).dtype == torch.float64
    assert risk(torch.zeros(2, 3, 4)).shape == (2, 3)
