"""Pyramid Vision Transformer v1 (Wang et al., ICCV 2021), written from the paper's description.

Four stages; each cuts its input into patches, adds learned positions and runs pre-norm transformer
blocks whose keys and values come from a spatially reduced map (spatial-reduction attention, SRA).
Parameters bear the names of the original release, so its weights load after dropping ``head.*``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycdgkd.errors import InputError

_EPS = 1e-6  # of the blocks' and the last normalisation; the others have torch's default, 1e-5


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, C, H, W) -> (B, (H/p)*(W/p), dim)."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens in row-major order of the patches."""
        tokens: Tensor = self.norm(self.proj(images).flatten(2).transpose(1, 2))
        return tokens


class Attention(nn.Module):
    """Spatial-reduction attention: queries from all tokens, keys and values from a coarser map."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, C) tokens of a ``grid`` of height x width -> (B, n, C)."""
        batch, n, dim = tokens.shape
        heads = (self.num_heads, dim // self.num_heads)
        query = self.q(tokens).view(batch, n, *heads).transpose(1, 2)
        if self.sr_ratio > 1:
            coarse = self.sr(_to_map(tokens, grid))
            tokens = self.norm(coarse.flatten(2).transpose(1, 2))
        key, value = self.kv(tokens).view(batch, tokens.shape[1], 2, *heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, n, dim))
        return out


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block with spatial-reduction attention and stochastic depth."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: int, sr_ratio: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, dim * mlp_ratio)
        self.drop_path = drop_path

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, C) tokens of a ``grid`` of height x width -> (B, n, C)."""
        tokens = tokens + self._drop(self.attn(self.norm1(tokens), grid))
        return tokens + self._drop(self.mlp(self.norm2(tokens)))

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth: in training, drop this branch for whole samples, scale up the rest."""
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep)
        return branch * (kept / keep)


class PyramidVisionTransformer(nn.Module):
    """PVT v1 without classification head: (B, in_chans, H, W) -> (B, embed_dims[-1]).

    The result is the normalised class token, which joins the patches in the fourth stage. Learned
    positions belong to the native ``img_size`` (pixels, square); for other heights and widths,
    square or not, they are resized bilinearly. Each side must be a multiple of ``size_multiple``
    (32 for the default sizes), so that no stage drops a border: else ``InputError``.

    Four values each: widths ``embed_dims``, attention heads, hidden-layer ratios, numbers of
    blocks, spatial-reduction ratios (the last must be 1: the class token has no place in a map).
    ``drop_path_rate`` is the last block's stochastic depth; the first has 0, between them linear.
    """

    def __init__(
        self,
        img_size: int = 224,
        *,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_stages(embed_dims, num_heads, mlp_ratios, depths, sr_ratios)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate: expected a number in [0, 1); got {drop_path_rate}")
        self.in_chans = in_chans
        self.num_features = embed_dims[-1]
        self.depths = tuple(depths)
        self.patch_sizes = (patch_size, 2, 2, 2)
        cell = [math.prod(self.patch_sizes[: i + 1]) * sr for i, sr in enumerate(sr_ratios)]
        self.size_multiple = math.lcm(*cell)
        self._check_size(img_size, img_size)

        rates = torch.linspace(0.0, drop_path_rate, sum(depths), device="cpu").tolist()
        channels = (in_chans, *embed_dims)
        side = img_size
        for i in range(4):
            dim = embed_dims[i]
            side //= self.patch_sizes[i]
            tokens = side * side + (1 if i == 3 else 0)
            blocks = [
                Block(dim, num_heads[i], mlp_ratios[i], sr_ratios[i], rates.pop(0))
                for _ in range(depths[i])
            ]
            embed = PatchEmbed(self.patch_sizes[i], channels[i], dim)
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(torch.zeros(1, tokens, dim)))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.num_features))
        self.norm = nn.LayerNorm(self.num_features, eps=_EPS)
        self._initialise()

    def _initialise(self) -> None:
        """As published: truncated normals of 0.02 for positions, class token, Linear weights."""
        for name, parameter in self.named_parameters():
            if name.startswith(("pos_embed", "cls_token")):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _check_size(self, height: int, width: int) -> None:
        step = self.size_multiple
        if height < step or width < step or height % step or width % step:
            raise InputError(
                f"PyramidVisionTransformer cannot cut {height}x{width} images into its patches; "
                f"expected sides that are multiples of {step} pixels; "
                f"remedy: crop or resize to such a size"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, in_chans, H, W) -> class-token features (B, embed_dims[-1])."""
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"PyramidVisionTransformer: images: expected (B, {self.in_chans}, H, W); "
                f"got {tuple(images.shape)}"
            )
        self._check_size(images.shape[2], images.shape[3])
        grid = (images.shape[2], images.shape[3])
        for i, patch in enumerate(self.patch_sizes):
            grid = (grid[0] // patch, grid[1] // patch)
            tokens = self.get_submodule(f"patch_embed{i + 1}")(images)
            # Not get_parameter(): in a functional call a tensor stands in for the parameter.
            positions: Tensor = getattr(self, f"pos_embed{i + 1}")
            if i == 3:
                tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            tokens = tokens + resize_positions(positions, grid, extra=int(i == 3))
            for j in range(self.depths[i]):
                tokens = self.get_submodule(f"block{i + 1}.{j}")(tokens, grid)
            if i < 3:
                images = _to_map(tokens, grid)
        features: Tensor = self.norm(tokens[:, 0])
        return features


def resize_positions(positions: Tensor, grid: tuple[int, int], *, extra: int) -> Tensor:
    """Position embeddings (1, extra + side*side, C) of a square grid, for another ``grid``.

    ``grid`` is (height, width). Bilinear, corners not aligned; the first ``extra`` positions (class
    token) are kept. Returns (1, extra + height*width, C); ``positions`` itself on its own grid.
    """
    side = math.isqrt(positions.shape[1] - extra)
    if side * side != positions.shape[1] - extra:
        raise InputError(
            f"position embeddings of {positions.shape[1] - extra} patches do not form a square grid"
        )
    if grid == (side, side):
        return positions
    native = _to_map(positions[:, extra:], (side, side))
    resized = F.interpolate(native, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([positions[:, :extra], resized.flatten(2).transpose(1, 2)], dim=1)


def _to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, height*width, C) -> (B, C, height, width)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def _check_stages(
    embed_dims: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratios: Sequence[int],
    depths: Sequence[int],
    sr_ratios: Sequence[int],
) -> None:
    stages = {
        "embed_dims": embed_dims,
        "num_heads": num_heads,
        "mlp_ratios": mlp_ratios,
        "depths": depths,
        "sr_ratios": sr_ratios,
    }
    for name, values in stages.items():
        if len(values) != 4 or min(values) < 1:
            raise ValueError(f"{name}: expected four positive numbers; got {tuple(values)}")
    for dim, heads in zip(embed_dims, num_heads, strict=True):
        if dim % heads:
            raise ValueError(f"embed_dims: {dim} is not divisible by its {heads} attention heads")
    if sr_ratios[3] != 1:
        raise ValueError(
            f"sr_ratios: the last must be 1, because the class token has no place in a map; "
            f"got {sr_ratios[3]}"
        )


def pvt_tiny(img_size: int = 224, *, drop_path_rate: float = 0.0) -> PyramidVisionTransformer:
    """PVT-Tiny: 12 716 288 parameters at 224 pixels, 512 features."""
    return PyramidVisionTransformer(img_size, drop_path_rate=drop_path_rate)


def pvt_small(img_size: int = 224, *, drop_path_rate: float = 0.0) -> PyramidVisionTransformer:
    """PVT-Small: 23 972 864 parameters at 224 pixels, 512 features."""
    return PyramidVisionTransformer(img_size, depths=(3, 4, 6, 3), drop_path_rate=drop_path_rate)
