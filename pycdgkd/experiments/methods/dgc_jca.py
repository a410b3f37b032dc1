"""DGC+JCA: Cheng et al. 2024, re-implemented from the abstract: no code is public.

"Dense Graph Convolutional With Joint Cross-Attention Network for Multimodal Emotion Recognition".

Dense graph convolution: X_{l+1} = ReLU(A^ [X_0 | ... | X_l] W_l) over a learned topology
A^ = D^-1/2 (ReLU(A) + I) D^-1/2, the result is [X_0 | ... | X_L]. Joint cross-attention as
Praveen et al. (2022) define it, for modalities X_m with L columns of width d and J = [X_v; X_e]:

    C_m = tanh(X_m^T W_jm J / sqrt(2d)),  H_m = ReLU(W_m X_m + W_cm C_m^T),  X^_m = W_hm H_m + X_m

Nodes of EEG are its electrodes, nodes of the video its frames (in place of the eye movements and
peripheral signals of the original's data sets).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pycdgkd.errors import InputError
from pycdgkd.experiments.bands import BandPowers
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.models.branches import VisualBranch
from pycdgkd.models.networks import Network
from pycdgkd.training.objective import CrossEntropy

BANDS = ((4.0, 8.0), (8.0, 13.0), (13.0, 30.0), (30.0, 45.0))  # theta, alpha, beta, gamma


@dataclass(frozen=True)
class DGCJCASettings:
    """Sizes; the abstract gives none, all are choices.

    window: seconds of the EEG windows whose band powers are a node's features. layers, growth: of
    the graph convolutions. width: d. tokens: columns that the nodes of both modalities are pooled
    to (as many as a DEAP sample has frames). attention: rows of H. hidden, dropout: of the head.
    """

    window: float = 1.0
    layers: int = 3
    growth: int = 32
    width: int = 64
    tokens: int = 5
    attention: int = 32
    hidden: int = 128
    dropout: float = 0.5

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        for name in ("layers", "growth", "width", "tokens", "attention", "hidden"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"dgc-jca: {name}: expected 1 or more; got {getattr(self, name)}; "
                    "remedy: the default"
                )
        if self.window <= 0.0 or not 0.0 <= self.dropout < 1.0:
            raise InputError(
                "dgc-jca: window and dropout: expected seconds above 0 and a number from 0 to "
                f"below 1; got {self.window} and {self.dropout}; remedy: 1 and 0.5"
            )


def normalised_adjacency(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """D^-1/2 (ReLU(A) + I) D^-1/2 for A (N, N), with D the row sums.

    valid: (B, N) bool; nodes that are not have no edge in their sample, the result is (B, N, N).
    """
    edges = weights.relu() + torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
    if valid is not None:
        edges = edges * (valid.unsqueeze(1) & valid.unsqueeze(2))
    degrees = edges.sum(-1)
    # A node without edges keeps none.
    scale = torch.where(degrees > 0, degrees, 1.0).rsqrt()
    return scale.unsqueeze(-1) * edges * scale.unsqueeze(-2)


class DenseGraph(nn.Module):
    """Nodes (B, N, features) -> (B, N, features + layers * growth).

    The learned A begins uniform, 1/N everywhere: electrode positions are not asked for, and no
    topology is assumed.
    """

    def __init__(self, nodes: int, features: int, layers: int, growth: int) -> None:
        super().__init__()
        self.adjacency = nn.Parameter(torch.full((nodes, nodes), 1 / nodes))
        self.layers = nn.ModuleList(
            nn.Linear(features + layer * growth, growth, bias=False) for layer in range(layers)
        )

    def forward(self, nodes: Tensor, valid: Tensor | None = None) -> Tensor:
        """valid: (B, N) bool, or None for all."""
        adjacency = normalised_adjacency(self.adjacency, valid)
        for layer in self.layers:
            nodes = torch.cat([nodes, layer(adjacency @ nodes).relu()], dim=2)
        return nodes


class NodePool(nn.Module):
    """Nodes (B, N, D) -> (B, tokens, D): each a mean over the nodes with learned weights."""

    def __init__(self, nodes: int, tokens: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(tokens, nodes))

    def forward(self, nodes: Tensor, valid: Tensor | None = None) -> Tensor:
        """valid: (B, N) bool, or None for all; other nodes take no part."""
        scores: Tensor = self.scores
        if valid is not None:
            scores = scores.masked_fill(~valid.unsqueeze(1), -math.inf)
        return scores.softmax(-1) @ nodes


class JointCrossAttention(nn.Module):
    """One modality's share: X (B, L, d) and J (B, L, 2d) -> X^ (B, L, d); columns are rows here."""

    def __init__(self, width: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.joint = nn.Linear(2 * width, width, bias=False)  # W_j
        self.features = nn.Linear(width, hidden, bias=False)  # W_m
        self.affinity = nn.Linear(tokens, hidden, bias=False)  # W_c
        self.out = nn.Linear(hidden, width, bias=False)  # W_h

    def forward(self, features: Tensor, joint: Tensor) -> Tensor:
        """The three equations above."""
        scores = features @ self.joint(joint).transpose(1, 2) / math.sqrt(joint.shape[2])
        hidden = (self.features(features) + self.affinity(scores.tanh())).relu()
        attended: Tensor = self.out(hidden) + features
        return attended


class Encoder(nn.Module):
    """One modality: its nodes (B, N, features) -> tokens (B, L, d)."""

    def __init__(self, nodes: int, features: int, settings: DGCJCASettings) -> None:
        super().__init__()
        self.graph = DenseGraph(nodes, features, settings.layers, settings.growth)
        self.project = nn.Linear(features + settings.layers * settings.growth, settings.width)
        self.pool = NodePool(nodes, settings.tokens)

    def forward(self, nodes: Tensor, valid: Tensor | None = None) -> Tensor:
        """valid: (B, N) bool, or None for all."""
        tokens: Tensor = self.pool(self.project(self.graph(nodes, valid)), valid)
        return tokens


class DGCJCAOutput(NamedTuple):
    """Logits (B, K)."""

    logits: Tensor


class DGCJCANet(Network):
    """Graphs of both modalities, joint cross-attention, mean over the tokens, a classifier.

    visual: gives its frame encoder and pixel statistics; its temporal layers are not used.
    """

    inputs = ("video", "frame_mask", "eeg")

    def __init__(
        self,
        visual: VisualBranch,
        powers: BandPowers,
        sizes: tuple[int, int, int],
        settings: DGCJCASettings,
    ) -> None:
        """Sizes: frames T, samples L of an EEG segment, classes K."""
        super().__init__()
        frames, n_times, num_classes = sizes
        width = settings.width
        self.visual = VisualBranch(
            visual.frame_encoder,
            visual.project.in_features,
            width,
            temporal_depth=0,
            pixel_mean=visual.pixel_mean.flatten().tolist(),
            pixel_std=visual.pixel_std.flatten().tolist(),
        )
        self.powers = powers
        n_chans, bands = powers.mean.shape
        self.video_encoder = Encoder(frames, width, settings)
        self.eeg_encoder = Encoder(n_chans, powers.count(n_times) * bands, settings)
        sizes_of_attention = (width, settings.tokens, settings.attention)
        self.video_attention = JointCrossAttention(*sizes_of_attention)
        self.eeg_attention = JointCrossAttention(*sizes_of_attention)
        self.head = nn.Sequential(
            nn.Dropout(settings.dropout),
            nn.Linear(2 * width, settings.hidden),
            nn.ReLU(),
            nn.Linear(settings.hidden, num_classes),
        )

    def forward(self, video: Tensor, frame_mask: Tensor | None, eeg: Tensor) -> DGCJCAOutput:
        """Frames (B, T, 3, H, W), mask (B, T) or None, EEG (B, C, L) microvolts."""
        frames = self.visual.project(self.visual.frame_features(video, frame_mask))
        electrodes = self.powers(eeg).transpose(1, 2).flatten(2)  # (B, C, W * F)
        x_v = self.video_encoder(frames, frame_mask)
        x_e = self.eeg_encoder(electrodes)
        joint = torch.cat([x_v, x_e], dim=2)
        attended = [self.video_attention(x_v, joint), self.eeg_attention(x_e, joint)]
        return DGCJCAOutput(self.head(torch.cat(attended, dim=2).mean(1)))


def train(bench: Bench, settings: DGCJCASettings) -> Classifier:
    """The network by cross-entropy and the shared schedule."""
    data = bench.data
    cache = data.cache
    visual = bench.visual_net().visual
    powers = BandPowers(
        cache.eeg.shape[1], cache.sfreq, BANDS, window=settings.window, step=settings.window
    )
    bench.seed("dgc-jca")
    sizes = (cache.video.shape[1], cache.eeg.shape[2], bench.num_classes)
    net = DGCJCANet(visual, powers, sizes, settings).to(data.device)
    powers.set_statistics(data, bench.split.train, bench.config.optim.part_size)
    state = bench.fit("fusion", net, CrossEntropy(), seed_role="teacher")
    return bench.classifier(net, state, "re-implemented from the abstract")


METHOD = Method(
    "dgc-jca",
    "DGC+JCA (re-implemented from the abstract)",
    ("video", "eeg"),
    DGCJCASettings(),
    train,
    "re-implemented from the abstract: sizes and details are ours; EEG as band powers",
)
