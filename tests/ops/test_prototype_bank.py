from __future__ import annotations

import copy

import pytest
import torch
from cases import make_features, make_labels, make_prototypes

import pycdgkd
from pycdgkd import PrototypeBank


def a_pass(N: int = 64, K: int = 3, D: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    labels = make_labels(N, K)
    labels[:K] = torch.arange(K)
    return make_features(make_prototypes(K, D), labels), labels


def test_first_pass_takes_the_means() -> None:
    features, labels = a_pass()
    bank = PrototypeBank(3, 5, momentum=0.9)
    assert torch.equal(bank.prototypes, torch.zeros(3, 5))
    bank.update(features, labels)
    assert torch.equal(bank.prototypes, torch.zeros(3, 5))  # only a refresh shows the new means
    bank.refresh()
    expected, counts = pycdgkd.class_prototypes(features, labels, 3)
    torch.testing.assert_close(bank.prototypes, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(bank.counts, counts)


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.75])
def test_later_passes_are_smoothed(momentum: float) -> None:
    passes = [a_pass() for _ in range(3)]
    bank = PrototypeBank(3, 5, momentum=momentum)
    expected = None
    for features, labels in passes:
        bank.update(features, labels)
        bank.refresh()
        means, _ = pycdgkd.class_prototypes(features.double(), labels, 3)
        expected = means if expected is None else momentum * expected + (1 - momentum) * means
        torch.testing.assert_close(bank.prototypes.double(), expected, rtol=1e-5, atol=1e-6)


def test_several_updates_are_one_pass() -> None:
    features, labels = a_pass(100)
    labels[50] = -100
    whole, pieces = PrototypeBank(3, 5), PrototypeBank(3, 5)
    whole.update(features, labels)
    for part in torch.arange(100).split([1, 40, 0, 59]):
        pieces.update(features[part], labels[part])
    whole.refresh()
    pieces.refresh()
    torch.testing.assert_close(whole.prototypes, pieces.prototypes, rtol=1e-6, atol=1e-7)
    assert torch.equal(whole.counts, pieces.counts)
    assert int(whole.counts.sum()) == 99


def test_class_missing_in_a_pass_keeps_its_prototype() -> None:
    bank = PrototypeBank(3, 2, momentum=0.5)
    bank.update(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 1]))
    bank.refresh()
    assert bank.counts.tolist() == [1, 1, 0]
    bank.update(torch.tensor([[4.0, 0.0], [8.0, 8.0], [8.0, 8.0]]), torch.tensor([0, 2, 2]))
    bank.refresh()
    # smoothed, kept, and seen for the first time: not blended with the zero it started from
    assert bank.prototypes.tolist() == [[3.0, 0.0], [0.0, 4.0], [8.0, 8.0]]
    assert bank.counts.tolist() == [1, 1, 2]


def test_empty_pass_changes_nothing() -> None:
    features, labels = a_pass()
    bank = PrototypeBank(3, 5)
    bank.update(features, labels)
    bank.refresh()
    before = copy.deepcopy(bank.state_dict())
    bank.refresh()
    bank.update(features[:0], labels[:0])
    bank.update(features, torch.full_like(labels, -100))
    bank.refresh()
    assert all(torch.equal(before[key], value) for key, value in bank.state_dict().items())


def test_state_goes_with_the_model_even_within_a_pass() -> None:
    features, labels = a_pass()
    bank, copied = PrototypeBank(3, 5), PrototypeBank(3, 5)
    bank.update(features, labels)
    bank.refresh()
    bank.update(features[:20] + 1, labels[:20])
    copied.load_state_dict(bank.state_dict())
    for each in (bank, copied):
        each.update(features[20:] - 1, labels[20:])
        each.refresh()
    assert torch.equal(bank.prototypes, copied.prototypes)
    assert torch.equal(bank.counts, copied.counts)
    assert not list(bank.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_of_any_type_and_no_graph(dtype: torch.dtype) -> None:
    features, labels = a_pass()
    stored = features.to(dtype)
    bank = PrototypeBank(3, 5)
    bank.update(stored.requires_grad_(), labels)
    bank.refresh()
    assert bank.prototypes.dtype == torch.float32
    assert not bank.prototypes.requires_grad
    expected, _ = pycdgkd.class_prototypes(stored.detach().double(), labels, 3)
    torch.testing.assert_close(bank.prototypes.double(), expected, rtol=1e-6, atol=1e-7)


def test_many_small_batches_far_from_the_origin() -> None:
    features, labels = a_pass(4096)
    features += 100.0
    bank = PrototypeBank(3, 5)
    for z, y in zip(features.split(8), labels.split(8), strict=True):
        bank.update(z, y)
    bank.refresh()
    expected, _ = pycdgkd.class_prototypes(features.double(), labels, 3)
    torch.testing.assert_close(bank.prototypes.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_stay_exact_in_a_model_of_low_precision(dtype: torch.dtype) -> None:
    """4096 rows summed in bfloat16 would stop growing after 256."""
    features, labels = a_pass(4096)
    bank = torch.nn.Sequential(PrototypeBank(3, 5)).to(dtype)[0]
    for z, y in zip((features + 10).split(8), labels.split(8), strict=True):
        bank.update(z, y)
    bank.refresh()
    expected, counts = pycdgkd.class_prototypes(features.double() + 10, labels, 3)
    assert bank.prototypes.dtype == dtype
    assert torch.equal(bank.counts, counts)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(bank.prototypes.double(), expected, rtol=tolerance, atol=0)


def test_serves_the_teacher_loss() -> None:
    features, labels = a_pass()
    bank = PrototypeBank(3, 5)
    bank.update(features, labels)
    bank.refresh()
    logits = torch.randn(64, 3)
    given = pycdgkd.teacher_loss(
        logits, [features], labels, [bank.prototypes], class_counts=bank.counts
    )
    own = pycdgkd.teacher_loss(logits, [features], labels)
    torch.testing.assert_close(given.convergence_rates, own.convergence_rates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum: expected a number in \[0, 1\), got -0.1"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
    ],
)
def test_wrong_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=rf"pycdgkd\.PrototypeBank: {message}"):
        PrototypeBank(**{"num_classes": 3, "dim": 2, **options})


def test_wrong_tensors_leave_the_bank_as_it_was() -> None:
    bank = PrototypeBank(3, 2)
    with pytest.raises(ValueError, match=r"PrototypeBank: features: expected shape \(N, 2\)"):
        bank.update(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"labels\[1\]: expected a class from 0 to 2 .* got 3"):
        bank.update(torch.zeros(2, 2), torch.tensor([0, 3]))
    bank.refresh()
    assert bank.counts.tolist() == [0, 0, 0]
