from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.models import PyramidVisionTransformer, pvt_small, pvt_tiny
from pycdgkd.models.pvt import Block, resize_positions

Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]
SMALL: dict[str, Any] = {"embed_dims": (16, 32, 40, 64), "depths": (1, 2, 1, 1)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", ["square", "tall"])
def test_agrees_with_the_original(
    golden: Golden, dtype: torch.dtype, bound: float, shape: str
) -> None:
    weights, values = golden("pvt_v1_small_config.npz")
    net = PyramidVisionTransformer(64, **SMALL)
    net.load_state_dict(weights, strict=True)
    features = net.to(dtype).eval()(values[f"input_{shape}"].to(dtype))
    assert features.dtype == dtype
    assert relative_error(features, values[f"features_{shape}"]) < bound


@pytest.mark.parametrize(
    ("build", "count", "depths"),
    [(pvt_tiny, 12_716_288, (2, 2, 2, 2)), (pvt_small, 23_972_864, (3, 4, 6, 3))],
)
def test_official_sizes_and_names(
    build: Callable[[], PyramidVisionTransformer], count: int, depths: tuple[int, ...]
) -> None:
    net = build()
    assert sum(p.numel() for p in net.parameters()) == count
    state = net.state_dict()
    grids = [(1, 3136, 64), (1, 784, 128), (1, 196, 320), (1, 50, 512)]
    assert [tuple(state[f"pos_embed{i}"].shape) for i in (1, 2, 3, 4)] == grids
    assert state["cls_token"].shape == (1, 1, 512)
    assert set(state) == set(official_names(depths))


def official_names(depths: tuple[int, ...]) -> list[str]:
    names = ["cls_token", "norm.weight", "norm.bias"]
    for i, depth in enumerate(depths, start=1):
        layers = [f"patch_embed{i}.{part}" for part in ("proj", "norm")]
        for j in range(depth):
            parts = ["norm1", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
            parts += ["attn.sr", "attn.norm"] if i < 4 else []
            layers += [f"block{i}.{j}.{part}" for part in parts]
        names += [f"pos_embed{i}"]
        names += [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    return names


def test_positions_stay_themselves_on_their_own_grid() -> None:
    positions = torch.randn(1, 17, 3)
    assert resize_positions(positions, (4, 4), extra=1) is positions


def test_positions_are_resized_bilinearly_and_the_class_token_is_kept() -> None:
    # On a ramp, pixel centres map by (i + 1/2)/2 - 1/2, and clamp at the border.
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    ramp = torch.stack([10 * rows + columns, columns], dim=2).view(1, 16, 2)
    token = torch.tensor([[[-7.0, 5.0]]])
    resized = resize_positions(torch.cat([token, ramp], dim=1), (8, 4), extra=1)
    assert resized.shape == (1, 33, 2)
    assert torch.equal(resized[:, :1], token)
    centres = ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3)
    expected = 10 * centres[:, None] + torch.arange(4.0)
    torch.testing.assert_close(resized[0, 1:, 0].view(8, 4), expected)
    torch.testing.assert_close(resized[0, 1:, 1].view(8, 4), columns[:1].expand(8, 4))


def test_positions_of_no_square_grid_are_refused() -> None:
    with pytest.raises(InputError, match="15 patches do not form a square grid"):
        resize_positions(torch.zeros(1, 16, 2), (4, 4), extra=1)


def test_another_size_equals_a_network_built_for_it_with_resized_positions() -> None:
    native = PyramidVisionTransformer(64, **SMALL).eval()
    larger = PyramidVisionTransformer(96, **SMALL).eval()
    state = native.state_dict()
    for i, side in enumerate((24, 12, 6, 3), start=1):
        name = f"pos_embed{i}"
        state[name] = resize_positions(state[name], (side, side), extra=int(i == 4))
    larger.load_state_dict(state)
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(native(images), larger(images), rtol=1e-5, atol=1e-5)


def test_positions_matter() -> None:
    net = PyramidVisionTransformer(32, **SMALL).eval()
    images = torch.randn(1, 3, 32, 32)
    before = net(images)
    with torch.no_grad():
        net.pos_embed1[:, 5] += 1.0
    assert not torch.allclose(before, net(images), atol=1e-4)


def test_gradients_reach_every_parameter() -> None:
    net = PyramidVisionTransformer(64, **SMALL)
    net(torch.randn(2, 3, 64, 64)).square().mul(torch.arange(64.0)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_empty_batch() -> None:
    assert PyramidVisionTransformer(32, **SMALL)(torch.zeros(0, 3, 32, 32)).shape == (0, 64)


@pytest.mark.parametrize("size", [(112, 112), (64, 48), (16, 32), (0, 32)])
def test_sizes_that_would_lose_a_border_are_refused(size: tuple[int, int]) -> None:
    net = PyramidVisionTransformer(32, **SMALL)
    with pytest.raises(InputError, match=f"cut {size[0]}x{size[1]} images.*multiples of 32 pixels"):
        net(torch.zeros(1, 3, *size))


def test_size_multiple_follows_patches_and_reductions() -> None:
    assert PyramidVisionTransformer(32, **SMALL).size_multiple == 32
    assert PyramidVisionTransformer(48, patch_size=3, **SMALL).size_multiple == 24
    assert PyramidVisionTransformer(96, sr_ratios=(3, 1, 1, 1), **SMALL).size_multiple == 96
    with pytest.raises(InputError, match=r"cut 50x50 images.*multiples of 32"):
        PyramidVisionTransformer(50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dims": (64, 128, 320)}, "embed_dims: expected four positive numbers"),
        ({"depths": (2, 2, 0, 2)}, r"depths: expected four positive numbers; got \(2, 2, 0, 2\)"),
        ({"num_heads": (1, 2, 5, 7)}, "512 is not divisible by its 7 attention heads"),
        ({"sr_ratios": (8, 4, 2, 2)}, "the last must be 1.*got 2"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate: expected a number in \[0, 1\); got 1.0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyramidVisionTransformer(**options)


def test_wrong_input_shape() -> None:
    net = PyramidVisionTransformer(32, **SMALL)
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\); got \(1, 1, 32, 32\)"):
        net(torch.zeros(1, 1, 32, 32))


def test_drop_path_rates_rise_linearly() -> None:
    net = PyramidVisionTransformer(32, drop_path_rate=0.4, **SMALL)
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    assert [block.drop_path for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_drops_whole_samples_in_training_only() -> None:
    block = Block(16, 2, 2, 1, drop_path=0.25)
    torch.nn.init.zeros_(block.mlp.fc2.weight)  # only the attention branch adds anything
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    tokens = torch.randn(1, 9, 16).expand(4000, -1, -1)
    branch = block.eval()(tokens, (3, 3)) - tokens
    torch.testing.assert_close(branch, block.attn(block.norm1(tokens), (3, 3)), atol=1e-5, rtol=0)
    dropped = block.train()(tokens, (3, 3)) - tokens
    scale = (dropped * branch).sum((1, 2)) / branch.square().sum((1, 2))
    kept = scale > 0.5
    torch.testing.assert_close(scale[kept], torch.full_like(scale[kept], 4 / 3), atol=1e-3, rtol=0)
    assert scale[~kept].abs().max() < 1e-3
    assert kept.float().mean() == pytest.approx(0.75, abs=0.03)
