"""The raw kernels on NumPy arrays: the same numbers as the ops, and their elementary functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import make_features, make_labels, make_logits, make_prototypes

import pycdgkd
from pycdgkd import _C

kernels = _C.kernels
NUMPY_TYPES = [torch.float64, torch.float32, torch.float16]


def same(array: np.ndarray, tensor: torch.Tensor) -> None:
    assert torch.equal(torch.from_numpy(array), tensor.detach())


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_prototype_kernels_equal_the_ops(dtype: torch.dtype) -> None:
    labels = make_labels(37, 4)
    labels[5] = -1
    prototypes = make_prototypes(4, 21, dtype=dtype)
    features = make_features(prototypes, labels)
    z, c, classes = features.numpy(), prototypes.numpy(), labels.int().numpy()

    means, counts = kernels.class_prototypes(z, classes, 4)
    expected = pycdgkd.class_prototypes(features, labels, 4, ignore_index=-1)
    same(means, expected.prototypes)
    same(counts, expected.counts)

    leaf = features.clone().requires_grad_()
    loss, true_prob = pycdgkd.prototype_loss(
        leaf, prototypes, labels, scale=0.5, reduction="sum", ignore_index=-1
    )
    value, prob, residual = kernels.prototype_loss(z, c, classes, scale=0.5)
    assert loss.item() == np.float64(value).astype(prob.dtype)
    same(prob, true_prob)
    (grad,) = torch.autograd.grad(loss, leaf)
    same(kernels.prototype_loss_backward(residual, c, factor=1.0).astype(z.dtype), grad)


@pytest.mark.parametrize("dtype", NUMPY_TYPES[:2])
def test_backward_kernels_equal_the_gradients_of_the_ops(dtype: torch.dtype) -> None:
    labels = make_labels(37, 4)
    labels[5] = -1
    prototypes = make_prototypes(4, 21, dtype=dtype)
    features = make_features(prototypes, labels)
    z, c, classes = features.numpy(), prototypes.numpy(), labels.int().numpy()

    leaf = features.clone().requires_grad_()
    means = pycdgkd.class_prototypes(leaf, labels, 4, ignore_index=-1).prototypes
    (grad,) = torch.autograd.grad(means, leaf, prototypes)
    same(kernels.class_prototypes_backward(c, classes), grad)

    leaf = prototypes.clone().requires_grad_()
    loss = pycdgkd.prototype_loss(features, leaf, labels, reduction="sum", ignore_index=-1).loss
    _, _, residual = kernels.prototype_loss(z, c, classes)
    same(kernels.prototype_grad(residual, z, c, factor=2.0), torch.autograd.grad(loss, leaf)[0])

    logits, source = make_logits(9, 5, dtype=dtype), make_logits(9, 5, dtype=dtype)
    leaf = logits.clone().requires_grad_()
    rows = pycdgkd.multi_source_kl(leaf, [source], temperature=2.0, reduction="none")
    factors = torch.linspace(-1, 1, 9, dtype=dtype)
    _, _, unit = kernels.distillation_loss(
        logits.numpy(), [source.numpy()], None, [1.0], kd_weight=1.0
    )
    scaled = kernels.scale_rows(unit, 9.0 * factors.double().numpy())
    expected = torch.autograd.grad(rows, leaf, factors)[0]
    torch.testing.assert_close(torch.from_numpy(scaled), expected, rtol=1e-5, atol=1e-9)
    assert np.array_equal(kernels.scale_rows(unit, np.array([2.0])), 2 * unit)


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_distillation_kernel_equals_the_op(dtype: torch.dtype, direction: str) -> None:
    logits, labels = make_logits(37, 6, dtype=dtype), make_labels(37, 6)
    sources = [make_logits(37, 6, dtype=dtype) for _ in range(3)]
    weights = torch.tensor([0.5, 0.0, 0.25])
    leaf = logits.clone().requires_grad_()
    result = pycdgkd.distillation_loss(
        leaf, sources, labels, source_weights=weights, kd_weight=0.3, direction=direction
    )
    cross_entropy, kl, grad = kernels.distillation_loss(
        logits.numpy(),
        [t.numpy() for t in sources],
        labels.int().numpy(),
        weights.tolist(),
        kd_weight=0.3,
        reverse=direction == "reverse",
    )
    assert result.cross_entropy.item() == np.float64(cross_entropy).astype(grad.dtype)
    assert result.kl.item() == np.float64(kl).astype(grad.dtype)
    same(grad.astype(logits.numpy().dtype), torch.autograd.grad(result.loss, leaf)[0])


def test_strided_arrays() -> None:
    logits, source = make_logits(9, 8).numpy(), make_logits(9, 8).numpy()
    crossed = np.asfortranarray(logits)[::2, 1:7:2]
    plain = np.ascontiguousarray(crossed)
    other = np.ascontiguousarray(source[::2, 1:7:2])
    first = kernels.distillation_loss(crossed, [source[::2, 1:7:2]], None, [1.0])
    second = kernels.distillation_loss(plain, [other], None, [1.0])
    assert first[:2] == second[:2]
    assert np.array_equal(first[2], second[2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: kernels.class_prototypes(x.astype(np.int64), y, 2), TypeError, "float16"),
        (lambda x, y: kernels.class_prototypes(x.astype(">f4"), y, 2), TypeError, "float16"),
        (lambda x, y: kernels.class_prototypes(x, y, 1), ValueError, "class out of range"),
        (lambda x, y: kernels.class_prototypes(x[0], y, 2), ValueError, "2-D array"),
        (lambda x, y: kernels.class_prototypes(x, y[:2], 2), ValueError, "one class a row"),
        (lambda x, y: kernels.prototype_loss(x, x[:2, :1], y), ValueError, "2-D array"),
        (lambda x, y: kernels.prototype_loss(x, x[0], y), ValueError, "2-D array"),
        (
            lambda x, _: kernels.prototype_loss_backward(x[:, :2].copy().astype(np.float16), x, 1),
            ValueError,
            "2-D array|residual must be contiguous float32 or float64",
        ),
        (
            lambda x, _: kernels.prototype_loss_backward(x.astype(np.float16), x[:3], 1),
            ValueError,
            "contiguous float32 or float64 array",
        ),
        (lambda x, _: kernels.prototype_loss_backward(x.T, x[:3], 1), ValueError, "2-D|contig"),
        (lambda x, _: kernels.distillation_loss(x, [x], None, []), ValueError, "one weight"),
        (lambda x, _: kernels.distillation_loss(x, [x[:1]], None, [1]), ValueError, "2-D array"),
    ],
)
def test_wrong_arrays(call: object, error: type[Exception], message: str) -> None:
    x, y = np.zeros((4, 3), dtype=np.float32), np.array([0, 1, 1, 0], dtype=np.int32)
    with pytest.raises(error, match=message):
        call(x, y)


def ulps(found: np.ndarray, exact: np.ndarray, rounded: np.ndarray) -> float:
    """Largest error in units of the last place of the correctly rounded result."""
    return float((np.abs(found.astype(exact.dtype) - exact) / np.spacing(rounded)).max())


def test_exp_of_float32_over_the_whole_range() -> None:
    x = np.concatenate(
        [
            np.linspace(-104.5, 88.9, 4_000_000),
            np.linspace(-104.2, -87.0, 500_000),  # subnormal results
            np.linspace(-1e-3, 1e-3, 10_001),
        ]
    ).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp(x.astype(np.float64))
        rounded = exact.astype(np.float32)
    found = kernels.exp(x)
    assert np.array_equal(np.isinf(found), np.isinf(rounded))
    finite = np.isfinite(rounded)
    assert ulps(found[finite], exact[finite], rounded[finite]) < 1.5


def test_exp_of_float64_over_the_whole_range() -> None:
    x = np.concatenate([np.linspace(-746.5, 710.0, 1_000_000), np.linspace(-746, -707, 100_000)])
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp(x.astype(np.longdouble))
        rounded = exact.astype(np.float64)
    found = kernels.exp(x)
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("this machine's long double is no wider than double")
    assert np.array_equal(np.isinf(found), np.isinf(rounded))
    finite = np.isfinite(rounded)
    assert ulps(found[finite], exact[finite], rounded[finite]) < 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_of_special_values(dtype: type) -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 1e-40, -1e-300], dtype=dtype)
    expected = np.array([1.0, 1.0, np.inf, 0.0, np.nan, np.inf, 0.0, 1.0, 1.0], dtype=dtype)
    for length in range(1, len(x) + 1):  # in the vector loop and in its remainder
        assert np.array_equal(kernels.exp(x[:length]), expected[:length], equal_nan=True)


def log_arguments(dtype: type) -> np.ndarray:
    """All binades, subnormals and the neighbourhood of 1, where the logarithm is small."""
    info = np.finfo(dtype)
    rng = np.random.default_rng(0)
    lowest, highest = np.log2(float(info.smallest_normal)), np.log2(float(info.max))
    parts = [
        np.exp2(rng.uniform(lowest, highest - 1e-3, 1_000_000)),
        np.exp2(rng.uniform(lowest - info.nmant, lowest, 100_000)),
        rng.uniform(0.5, 2.0, 1_000_000),
        1 + rng.uniform(-1, 1, 100_000) * np.exp2(rng.uniform(-info.nmant, -4, 100_000)),
        np.array([info.smallest_subnormal, info.smallest_normal, info.max, 0.5**0.5, 2.0**0.5]),
    ]
    return np.concatenate(parts).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_over_the_whole_range(dtype: type) -> None:
    wider = np.float64 if dtype is np.float32 else np.longdouble
    if np.finfo(wider).nmant <= np.finfo(dtype).nmant:
        pytest.skip("this machine's long double is no wider than double")
    x = log_arguments(dtype)
    exact = np.log(x.astype(wider))
    assert ulps(kernels.log(x), exact, exact.astype(dtype)) < 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_of_special_values(dtype: type) -> None:
    x = np.array([1.0, 0.0, -0.0, np.inf, -np.inf, np.nan, -1.0, -1e-40, 1.0], dtype=dtype)
    nan = np.nan
    expected = np.array([0.0, -np.inf, -np.inf, np.inf, nan, nan, nan, nan, 0.0], dtype=dtype)
    for length in range(1, len(x) + 1):  # in the vector loop and in its remainder
        assert np.array_equal(kernels.log(x[:length]), expected[:length], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_read_exactly(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    stored = bits.view(dtype)
    means, _ = pycdgkd.class_prototypes(stored[:, None], torch.arange(2**16), 2**16)
    expected = stored.float()
    assert torch.equal(means[:, 0].isnan(), expected.isnan())
    assert torch.equal(means[:, 0].nan_to_num(), expected.nan_to_num())


def test_float16_subnormals_survive_a_program_that_flushes_denormals() -> None:
    stored = torch.arange(1, 1024, dtype=torch.int16).view(torch.float16)
    expected = stored.float()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        means, _ = pycdgkd.class_prototypes(stored[:, None], torch.arange(1023), 1023)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(means[:, 0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_rounding_to_16_bits_is_torchs(dtype: torch.dtype) -> None:
    """All representable values, the points half-way between neighbours, and random bits."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()].sort().values
    middle = exact[:-1] + (exact[1:] - exact[:-1]) / 2
    around = [torch.nextafter(middle, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    random = torch.randint(-(2**31), 2**31, (300_000,)).int().view(torch.float32)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 65519.99, 65520.0, 3.4e38, -0.0])
    values = torch.cat([exact, middle, *around, random, special])[:, None]
    like = torch.zeros(values.shape, dtype=dtype)
    stored = torch.ops.pycdgkd.multi_source_kl_backward(torch.tensor(1.0), values, like)
    expected = values.to(dtype)
    assert torch.equal(stored.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(stored[finite].view(torch.int16), expected[finite].view(torch.int16))


def test_build_info() -> None:
    info = pycdgkd.ops.build_info()
    assert set(info) >= {"compiler", "isa_levels", "isa_active", "cuda", "cuda_archs", "abi_target"}
    assert info["isa_active"] in info["isa_levels"].split(",")
    assert info["abi_target"] == "2.10"
