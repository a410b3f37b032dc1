"""TSception (Ding et al., IEEE Transactions on Affective Computing 2023): an EEG encoder.

Multi-scale temporal and spatial convolutions, written from the published description. It takes any
set of windows and spatial kernels: the assistants' simplified encoders are this class with fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycdgkd.ops  # noqa: F401  registers torch.ops.pycdgkd
from pycdgkd.errors import InputError

_SLOPE = 0.01  # of every LeakyReLU
_FUSION_POOL = 4
_SPATIAL = ("global", "hemisphere")


class TemporalConv(nn.Module):
    """Convolution along time, LeakyReLU and mean pooling: (B, 1, C, L) -> (B, T, C, M).

    On a CPU the three are one op, which never stores the activations before pooling. Elsewhere, and
    where an op of ours could not be followed, they run as one matrix product: segments of
    k + pool - 1 samples, a pool apart, against every kernel at each of the ``pool`` offsets, and a
    mean over the offsets. That takes half the time of a convolution of one input channel with a
    long kernel.
    """

    def __init__(self, num_kernels: int, length: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.weight = nn.Parameter(torch.empty(num_kernels, 1, 1, length))
        self.bias = nn.Parameter(torch.empty(num_kernels))
        bound = length**-0.5  # as nn.Conv2d initialises itself
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, eeg: Tensor) -> Tensor:
        """(B, 1, C, L) -> (B, T, C, M) with M = (L - k + 1) // pool."""
        if not eeg.is_cpu or _needs_torch_alone():
            return self._matrix_product(eeg)
        out: Tensor = torch.ops.pycdgkd.temporal_conv(
            eeg.squeeze(1), self.weight.flatten(1), self.bias, self.pool, _SLOPE
        )
        return out

    def _matrix_product(self, eeg: Tensor) -> Tensor:
        batch, _, chans, times = eeg.shape
        kernels, _, _, length = self.weight.shape
        pool = self.pool
        steps = (times - length + 1) // pool
        flat = self.weight.view(kernels, length)
        shifted = torch.cat([F.pad(flat, (p, pool - 1 - p)) for p in range(pool)])
        segments = eeg.reshape(batch * chans, times).unfold(1, length + pool - 1, pool)
        out = F.linear(segments[:, :steps], shifted, self.bias.repeat(pool))  # (B*C, M, pool*T)
        out = F.leaky_relu(out, _SLOPE, inplace=True)
        # Not mean(): its gradient would be a copy of the size of out, that of sum() is a view.
        out = out.view(batch * chans * steps, pool, kernels).sum(dim=1) / pool
        return out.view(batch, chans, steps, kernels).permute(0, 3, 1, 2).contiguous()


def _needs_torch_alone() -> bool:
    """Exported graphs must run without this package; function transforms need rules for its ops."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    traced = torch._C._get_tracing_state() is not None
    return traced or torch._C._are_functorch_transforms_active()


class TSceptionEncoder(nn.Module):
    """EEG windows (B, 1, n_chans, n_times) -> (B, num_spatial).

    Temporal convolutions of ``windows`` seconds (kernels of floor(window*sfreq) samples), spatial
    convolutions over all channels ("global") and over each half of them ("hemisphere": the first
    half of the channels must be the left side, in the order of the right), a fusion convolution
    over their rows; each followed by LeakyReLU and mean pooling over time (by ``pool``,
    ``pool // 4`` and 4), each group by batch normalisation. The result is the mean over time. With
    ``spatial=()`` the mean over channels takes the place of the spatial convolutions.

    ``InputError`` for an odd channel count with "hemisphere", and for windows that do not fit.
    """

    def __init__(
        self,
        n_chans: int,
        n_times: int,
        sfreq: float,
        *,
        windows: Sequence[float] = (0.5, 0.25, 0.125),
        spatial: Sequence[str] = _SPATIAL,
        num_temporal: int = 15,
        num_spatial: int = 15,
        pool: int = 8,
    ) -> None:
        super().__init__()
        self.n_chans = n_chans
        self.n_times = n_times
        self.num_features = num_spatial
        self.pool = pool
        self.spatial_pool = max(1, pool // 4)
        kernels = [int(window * sfreq) for window in windows]
        _check_sizes(n_chans, spatial, num_temporal, num_spatial, pool)
        self.num_steps = self._count_steps(windows, kernels)

        self.temporal = nn.ModuleList(TemporalConv(num_temporal, k, pool) for k in kernels)
        self.norm_temporal = nn.BatchNorm2d(num_temporal)
        heights = {"global": n_chans, "hemisphere": n_chans // 2}
        self.spatial = nn.ModuleDict(
            {
                name: nn.Conv2d(num_temporal, num_spatial, (heights[name], 1), (heights[name], 1))
                for name in _SPATIAL
                if name in spatial
            }
        )
        rows = sum(n_chans // heights[name] for name in self.spatial) or 1
        width = num_spatial if spatial else num_temporal
        self.norm_spatial = nn.BatchNorm2d(width)
        self.fusion = nn.Conv2d(width, num_spatial, (rows, 1))
        self.norm_fusion = nn.BatchNorm2d(num_spatial)

    def _count_steps(self, windows: Sequence[float], kernels: Sequence[int]) -> int:
        """How many time steps the three poolings leave of a segment."""
        if not kernels or min(kernels) < 1:
            raise InputError(
                f"TSception: every window must last at least one sample; "
                f"got windows of {tuple(windows)} s = {tuple(kernels)} samples"
            )
        widths = [max(0, self.n_times - k + 1) // self.pool for k in kernels]
        steps = sum(widths) // self.spatial_pool // _FUSION_POOL
        if min(widths) < 1 or steps < 1:
            raise InputError(
                f"TSception: a segment of {self.n_times} samples is too short for windows of "
                f"{tuple(kernels)} samples pooled by {self.pool}, {self.spatial_pool} and "
                f"{_FUSION_POOL}; remedy: longer segments, shorter windows or a smaller pool"
            )
        return steps

    def forward(self, eeg: Tensor) -> Tensor:
        """(B, 1, n_chans, n_times), any unit -> (B, num_spatial)."""
        return self.time_steps(eeg).mean(dim=2)

    def time_steps(self, eeg: Tensor) -> Tensor:
        """What ``forward`` takes the mean of: (B, num_spatial, num_steps)."""
        if eeg.dim() != 4 or eeg.shape[1:] != (1, self.n_chans, self.n_times):
            raise ValueError(
                f"TSceptionEncoder: eeg: expected (B, 1, {self.n_chans}, {self.n_times}); "
                f"got {tuple(eeg.shape)}"
            )
        scales = [conv(eeg) for conv in self.temporal]
        x = self.norm_temporal(torch.cat(scales, dim=3))  # (B, T, n_chans, W)
        if len(self.spatial):
            rows = [F.leaky_relu(conv(x), _SLOPE) for conv in self.spatial.values()]
            x = torch.cat(rows, dim=2)  # (B, S, 1 and/or 2, W)
        else:
            x = x.mean(dim=2, keepdim=True)  # (B, T, 1, W)
        x = self.norm_spatial(F.avg_pool2d(x, (1, self.spatial_pool)))
        x = F.avg_pool2d(F.leaky_relu(self.fusion(x), _SLOPE), (1, _FUSION_POOL))
        steps: Tensor = self.norm_fusion(x).squeeze(2)
        return steps


def _check_sizes(
    n_chans: int, spatial: Sequence[str], num_temporal: int, num_spatial: int, pool: int
) -> None:
    sizes = {
        "n_chans": n_chans,
        "num_temporal": num_temporal,
        "num_spatial": num_spatial,
        "pool": pool,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected 1 or more; got {size}")
    if isinstance(spatial, str) or len(set(spatial)) != len(spatial) or set(spatial) - {*_SPATIAL}:
        raise ValueError(f"spatial: expected distinct names out of {_SPATIAL}; got {spatial!r}")
    if "hemisphere" in spatial and n_chans % 2:
        raise InputError(
            f"TSception's hemisphere kernel needs as many left as right channels; got {n_chans} "
            f'channels; remedy: leave a midline channel out or use spatial=("global",)'
        )


_OFFICIAL = {
    "Tception1.0": "temporal.0",
    "Tception2.0": "temporal.1",
    "Tception3.0": "temporal.2",
    "Sception1.0": "spatial.global",
    "Sception2.0": "spatial.hemisphere",
    "fusion_layer.0": "fusion",
    "BN_t": "norm_temporal",
    "BN_s": "norm_spatial",
    "BN_fusion": "norm_fusion",
}


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the original authors' TSception as a state dict of ``TSceptionEncoder``.

    The classifier (``fc.*``) is left out; any other unknown name raises ``InputError``.
    """
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        layer, _, leaf = name.rpartition(".")
        if layer in _OFFICIAL:
            converted[f"{_OFFICIAL[layer]}.{leaf}"] = value
        elif not name.startswith("fc."):
            raise InputError(
                f"'{name}' is no parameter of the original TSception; expected layers "
                f"{', '.join(_OFFICIAL)} and fc; remedy: pass the state dict of that model"
            )
    return converted
