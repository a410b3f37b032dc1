from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.models import EEG_LEVELS, TSceptionEncoder, tsception
from pycdgkd.models.tsception import TemporalConv, convert_official

Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]
DEAP28 = ("tsception_deap28.npz", (28, 512, 128.0), {})
C32 = ("tsception_c32_fs256.npz", (32, 1024, 256.0), {"num_temporal": 9, "num_spatial": 6})


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max())


def plain(encoder: TSceptionEncoder, eeg: Tensor) -> Tensor:
    """The encoder stated with ordinary convolutions and poolings, from its own parameters."""

    def block(x: Tensor, weight: Tensor, bias: Tensor, stride: int, pool: int) -> Tensor:
        y = F.leaky_relu(F.conv2d(x, weight, bias, stride=(stride, 1)), 0.01)
        return F.avg_pool2d(y, (1, pool))

    def norm(x: Tensor, layer: Any) -> Tensor:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    pool = encoder.pool
    scales = [block(eeg, conv.weight, conv.bias, 1, pool) for conv in encoder.temporal]
    x = norm(torch.cat(scales, dim=3), encoder.norm_temporal)
    if len(encoder.spatial):
        layers = encoder.spatial.values()
        rows = [block(x, c.weight, c.bias, c.weight.shape[2], pool // 4) for c in layers]
        x = torch.cat(rows, dim=2)
    else:
        x = F.avg_pool2d(x.mean(dim=2, keepdim=True), (1, pool // 4))
    x = norm(x, encoder.norm_spatial)
    x = norm(block(x, encoder.fusion.weight, encoder.fusion.bias, 1, 4), encoder.norm_fusion)
    assert x.shape[2] == 1
    return x.squeeze(2).mean(dim=2)


def randomise_norms(encoder: TSceptionEncoder) -> None:
    for layer in (encoder.norm_temporal, encoder.norm_spatial, encoder.norm_fusion):
        for value in (layer.running_mean, layer.weight, layer.bias):
            torch.nn.init.normal_(value)
        torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)


@pytest.mark.parametrize(("name", "sizes", "options"), [DEAP28, C32], ids=["deap28", "c32"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_agrees_with_the_original(
    golden: Golden,
    name: str,
    sizes: tuple[int, int, float],
    options: dict[str, int],
    dtype: torch.dtype,
    bound: float,
) -> None:
    weights, values = golden(name)
    encoder = TSceptionEncoder(*sizes, **options)
    encoder.load_state_dict(convert_official(weights), strict=True)
    features = encoder.to(dtype).eval()(values["input"].to(dtype))
    assert features.dtype == dtype
    assert relative_error(features, values["features"]) < bound
    # The original classifier on top gives the original logits.
    head = {k: v.double() for k, v in weights.items() if k.startswith("fc.")}
    hidden = F.relu(F.linear(features.double(), head["fc.0.weight"], head["fc.0.bias"]))
    logits = F.linear(hidden, head["fc.3.weight"], head["fc.3.bias"])
    assert relative_error(logits, values["logits"]) < bound


@pytest.mark.parametrize("spatial", [("global", "hemisphere"), ("hemisphere",), ("global",), ()])
@pytest.mark.parametrize("windows", [(0.5, 0.25, 0.125), (0.3,)])
def test_every_combination_is_the_plain_network(
    windows: tuple[float, ...], spatial: tuple[str, ...]
) -> None:
    encoder = TSceptionEncoder(
        6, 400, 100.0, windows=windows, spatial=spatial, num_temporal=5, num_spatial=3
    )
    randomise_norms(encoder)
    encoder = encoder.double().eval()
    eeg = torch.randn(2, 1, 6, 400, dtype=torch.float64)
    features = encoder(eeg)
    assert features.shape == (2, 3)
    torch.testing.assert_close(features, plain(encoder, eeg), rtol=1e-12, atol=1e-12)


def test_order_of_spatial_names_does_not_matter() -> None:
    one = TSceptionEncoder(4, 256, 64.0, spatial=("hemisphere", "global")).eval()
    two = TSceptionEncoder(4, 256, 64.0, spatial=("global", "hemisphere")).eval()
    two.load_state_dict(one.state_dict())
    eeg = torch.randn(2, 1, 4, 256)
    assert torch.equal(one(eeg), two(eeg))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("length", "pool", "times"), [(16, 8, 100), (7, 3, 40), (1, 4, 9)])
def test_temporal_convolution_is_convolution_leaky_relu_pooling(
    length: int, pool: int, times: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tsception, "_needs_torch_alone", lambda: not fused)
    layer = TemporalConv(5, length, pool).double()
    eeg = torch.randn(2, 1, 3, times, dtype=torch.float64, requires_grad=True)
    pieces = (eeg, layer.weight, layer.bias)
    ours = layer(eeg)
    assert ("TemporalConv" in type(ours.grad_fn).__name__) == fused
    plain_out = F.avg_pool2d(F.leaky_relu(F.conv2d(eeg, layer.weight, layer.bias), 0.01), (1, pool))
    torch.testing.assert_close(ours, plain_out, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, pieces, weight)
    expected = torch.autograd.grad(plain_out, pieces, weight)
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_transforms_and_exported_graphs_get_the_matrix_product() -> None:
    layer = TemporalConv(5, 16, 8)
    eeg = torch.randn(3, 2, 1, 4, 100)
    want = torch.stack([layer(x) for x in eeg])
    torch.testing.assert_close(torch.func.vmap(layer)(eeg), want)
    program = torch.export.export(layer, (eeg[0],))
    assert not [n for n in program.graph.nodes if "pycdgkd" in str(n.target)]
    torch.testing.assert_close(program.module()(eeg[0]), want[0])
    torch.testing.assert_close(torch.jit.trace(layer, (eeg[0],))(eeg[0]), want[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_temporal_convolution_compiles() -> None:
    layer, eeg = TemporalConv(5, 16, 8), torch.randn(2, 1, 4, 100)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        out = function(eeg)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_temporal_convolution_keeps_its_precision_under_autocast() -> None:
    layer, eeg = TemporalConv(5, 16, 8), torch.randn(2, 1, 4, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(eeg)
    assert out.dtype == torch.float32
    assert torch.equal(out, layer(eeg))


def test_kernel_lengths_are_floored_and_sizes_are_the_published_ones() -> None:
    encoder = TSceptionEncoder(28, 512, 128.0)
    assert sum(p.numel() for p in encoder.parameters()) == 11_985
    assert [conv.weight.shape[3] for conv in encoder.temporal] == [64, 32, 16]
    uneven = TSceptionEncoder(28, 512, 128.0, windows=(0.3,))
    assert [conv.weight.shape[3] for conv in uneven.temporal] == [38]


def test_levels_strictly_lower_the_parameter_count() -> None:
    counts = [
        sum(
            p.numel()
            for p in TSceptionEncoder(28, 512, 128.0, windows=windows, spatial=spatial).parameters()
        )
        for windows, spatial in EEG_LEVELS
    ]
    assert counts[0] == 11_985
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)


def test_hemisphere_kernel_treats_both_halves_alike() -> None:
    encoder = TSceptionEncoder(8, 256, 64.0, spatial=("hemisphere",)).eval()
    with torch.no_grad():  # a fusion that sums its two rows cannot tell left from right
        encoder.fusion.weight[:, :, 1] = encoder.fusion.weight[:, :, 0]
    eeg = torch.randn(2, 1, 8, 256)
    swapped = torch.cat([eeg[:, :, 4:], eeg[:, :, :4]], dim=2)
    torch.testing.assert_close(encoder(eeg), encoder(swapped))
    mixed = eeg[:, :, [4, 1, 2, 3, 0, 5, 6, 7]]
    assert not torch.allclose(encoder(eeg), encoder(mixed), atol=1e-4)


def test_gradients_reach_every_parameter_at_every_level() -> None:
    for windows, spatial in EEG_LEVELS:
        encoder = TSceptionEncoder(4, 256, 64.0, windows=windows, spatial=spatial)
        target = torch.randn(4, 15)
        (encoder(torch.randn(4, 1, 4, 256)) - target).square().sum().backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, (spatial, name)
            assert parameter.grad.abs().max() > 0, (spatial, name)


def test_odd_channel_count_is_refused_with_hemispheres_only() -> None:
    with pytest.raises(InputError, match="as many left as right channels; got 27 channels"):
        TSceptionEncoder(27, 512, 128.0)
    encoder = TSceptionEncoder(27, 512, 128.0, spatial=("global",))
    assert encoder(torch.randn(2, 1, 27, 512)).shape == (2, 15)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((4, 60, 128.0), {}, "segment of 60 samples is too short"),
        ((4, 80, 128.0), {"windows": (0.5,)}, "pooled by 8, 2 and 4; remedy: longer segments"),
        ((4, 512, 128.0), {"windows": (0.005,)}, "at least one sample; got windows of .0.005,. s"),
        ((4, 512, 128.0), {"windows": ()}, "at least one sample"),
        ((4, 512, 128.0), {"spatial": ("left",)}, r"spatial: expected distinct names.*'left'"),
        ((4, 512, 128.0), {"spatial": ("global", "global")}, "spatial: expected distinct names"),
        ((4, 512, 128.0), {"spatial": "global"}, "spatial: expected distinct names"),
        ((0, 512, 128.0), {}, "n_chans: expected 1 or more; got 0"),
        ((4, 512, 128.0), {"pool": 0}, "pool: expected 1 or more; got 0"),
    ],
)
def test_wrong_options(
    sizes: tuple[int, int, float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TSceptionEncoder(*sizes, **options)


@pytest.mark.parametrize("shape", [(2, 4, 256), (2, 1, 5, 256), (2, 1, 4, 255), (2, 2, 4, 256)])
def test_wrong_input_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"eeg: expected \(B, 1, 4, 256\); got"):
        TSceptionEncoder(4, 256, 64.0)(torch.zeros(shape))


def test_conversion_renames_everything_but_the_classifier(golden: Golden) -> None:
    weights, _ = golden("tsception_deap28.npz")
    converted = convert_official(weights)
    assert set(converted) == set(TSceptionEncoder(28, 512, 128.0).state_dict())
    assert converted["temporal.2.weight"] is weights["Tception3.0.weight"]
    assert converted["spatial.hemisphere.bias"] is weights["Sception2.0.bias"]


def test_conversion_refuses_unknown_names() -> None:
    with pytest.raises(InputError, match=r"'Sception3\.0\.weight' is no parameter of the original"):
        convert_official({"Sception3.0.weight": torch.zeros(1)})
