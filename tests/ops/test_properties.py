"""Laws that hold for any input, tried on inputs that hypothesis chooses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pycdgkd

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


class Batch(NamedTuple):
    logits: Tensor
    features: list[Tensor]
    prototypes: list[Tensor]
    sources: list[Tensor]
    labels: Tensor
    generator: torch.Generator


FEW_CLASSES, ALSO_MANY = st.integers(1, 9), st.integers(1, 9) | st.integers(31, 45)


@st.composite
def batches(draw: st.DrawFn, classes: st.SearchStrategy[int] = FEW_CLASSES) -> Batch:
    """Any small sizes, any magnitude of logits and distances, some rows ignored."""
    N, K = draw(st.integers(1, 40)), draw(classes)
    widths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    S = draw(st.integers(1, 4))
    size = 10.0 ** draw(st.floats(-3, 3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))

    def rows(*shape: int) -> Tensor:
        return (size * torch.randn(*shape, generator=generator)).to(dtype)

    labels = torch.randint(K, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < draw(st.sampled_from([0.0, 0.2]))] = -100
    return Batch(
        rows(N, K),
        [rows(N, D) for D in widths],
        [rows(K, D) for D in widths],
        [rows(N, K) for _ in range(S)],
        labels,
        generator,
    )


DIRECTIONS = st.sampled_from(["reverse", "forward"])
TEMPERATURES = st.floats(0.05, 20.0)


@SETTINGS
@given(batches(ALSO_MANY), st.booleans())
def test_probabilities_rates_and_weights_keep_their_ranges(batch: Batch, own_means: bool) -> None:
    taking_part = int((batch.labels >= 0).sum())
    for z, c in zip(batch.features, batch.prototypes, strict=True):
        loss, true_prob = pycdgkd.prototype_loss(z, c, batch.labels, reduction="none")
        assert (loss >= 0).all()
        assert ((true_prob >= 0) & (true_prob <= 1)).all()
    prototypes = None if own_means else batch.prototypes
    result = pycdgkd.teacher_loss(batch.logits, batch.features, batch.labels, prototypes)
    rates, weights = result.convergence_rates, result.modality_weights
    assert ((rates >= 0) & (rates <= taking_part)).all()
    assert ((weights >= 0) & (weights <= 1)).all()
    assert int((weights > 0).sum()) <= len(weights) - 1
    assert weights[rates.argmax()] == 0
    if taking_part:
        assert result.loss >= 0
        torch.testing.assert_close(pycdgkd.modality_weights(rates), weights, rtol=1e-4, atol=1e-4)


@SETTINGS
@given(batches(), DIRECTIONS, TEMPERATURES)
def test_divergences_are_never_negative(batch: Batch, direction: str, temperature: float) -> None:
    rows = pycdgkd.multi_source_kl(
        batch.logits,
        batch.sources,
        temperature=temperature,
        direction=direction,
        reduction="none",
    )
    assert (rows >= 0).all()
    own = pycdgkd.multi_source_kl(
        batch.logits, [batch.logits] * 2, temperature=temperature, direction=direction
    )
    assert own.item() == 0.0


@SETTINGS
@given(batches(), DIRECTIONS, TEMPERATURES)
def test_row_order_means_nothing(batch: Batch, direction: str, temperature: float) -> None:
    """Row by row the same bits; sums to rounding."""
    order = torch.randperm(len(batch.labels), generator=batch.generator)
    kl = [
        pycdgkd.multi_source_kl(
            s, t, temperature=temperature, direction=direction, reduction="none"
        )
        for s, t in (
            (batch.logits, batch.sources),
            (batch.logits[order], [t[order] for t in batch.sources]),
        )
    ]
    assert torch.equal(kl[0][order], kl[1])
    z, c = batch.features[0], batch.prototypes[0]
    first = pycdgkd.prototype_loss(z, c, batch.labels, reduction="none")
    second = pycdgkd.prototype_loss(z[order], c, batch.labels[order], reduction="none")
    assert torch.equal(first.loss[order], second.loss)
    assert torch.equal(first.true_prob[order], second.true_prob)
    whole = pycdgkd.teacher_loss(batch.logits, [z], batch.labels, [c])
    again = pycdgkd.teacher_loss(batch.logits[order], [z[order]], batch.labels[order], [c])
    for a, b in zip(whole, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-30, equal_nan=True)


@SETTINGS
@given(batches(), DIRECTIONS, st.data())
def test_source_order_means_nothing(batch: Batch, direction: str, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(batch.sources))))
    weights = torch.rand(len(batch.sources), generator=batch.generator)
    first = pycdgkd.multi_source_kl(
        batch.logits, batch.sources, source_weights=weights, direction=direction
    )
    second = pycdgkd.multi_source_kl(
        batch.logits,
        [batch.sources[j] for j in order],
        source_weights=weights[list(order)],
        direction=direction,
    )
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


@SETTINGS
@given(batches(), DIRECTIONS, st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_constants_added_to_logits_mean_nothing(
    batch: Batch, direction: str, of_student: float, of_sources: float
) -> None:
    """In float64, where adding them rounds least; each row by its own constant."""
    logits = batch.logits.double()
    sources = [t.double() for t in batch.sources]
    row = 1 + torch.rand(len(logits), 1, generator=batch.generator).double()
    moved = logits + of_student * row
    first, second = (
        pycdgkd.distillation_loss(s, t, batch.labels, direction=direction)
        for s, t in ((logits, sources), (moved, [t + of_sources * row for t in sources]))
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, equal_nan=True)


@SETTINGS
@given(batches(), st.floats(-100, 100))
def test_features_and_prototypes_move_together(batch: Batch, shift: float) -> None:
    z, c = batch.features[0].double(), batch.prototypes[0].double()
    first = pycdgkd.prototype_loss(z, c, batch.labels, reduction="none")
    second = pycdgkd.prototype_loss(z + shift, c + shift, batch.labels, reduction="none")
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-7, atol=1e-7)


@SETTINGS
@given(batches())
def test_class_means_lie_among_their_rows(batch: Batch) -> None:
    K = batch.logits.shape[1]
    z = batch.features[0]
    prototypes, counts = pycdgkd.class_prototypes(z, batch.labels, K)
    assert int(counts.sum()) == int((batch.labels >= 0).sum())
    for k in range(K):
        rows = z[batch.labels == k].to(prototypes.dtype)
        if len(rows) == 0:
            assert not prototypes[k].any()
            continue
        slack = 1e-6 * rows.abs().amax(0)
        assert (prototypes[k] >= rows.amin(0) - slack).all()
        assert (prototypes[k] <= rows.amax(0) + slack).all()


@SETTINGS
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=6), st.floats(1e-3, 1e3))
def test_modality_weights_depend_on_ratios_alone(rates: list[float], factor: float) -> None:
    given_rates = torch.tensor(rates, dtype=torch.float64)
    weights = pycdgkd.modality_weights(given_rates)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert weights[given_rates.argmax()] == 0
    scaled = pycdgkd.modality_weights(given_rates * factor)
    torch.testing.assert_close(weights, scaled, rtol=1e-6, atol=1e-9)
    order = given_rates.argsort()
    assert (weights[order].diff() <= 0).all()  # the slower a modality, the more it weighs
