from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.experiments.bands import BandPowers
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.methods import dgc_jca
from pycdgkd.experiments.methods.dgc_jca import (
    BANDS,
    DenseGraph,
    DGCJCANet,
    DGCJCASettings,
    JointCrossAttention,
    NodePool,
    normalised_adjacency,
)


def test_adjacency_is_normalised_by_degrees() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(5, 5))
    edges = np.maximum(weights, 0) + np.eye(5)
    scale = np.diag(edges.sum(1) ** -0.5)
    adjacency = normalised_adjacency(torch.from_numpy(weights))
    np.testing.assert_allclose(adjacency.numpy(), scale @ edges @ scale)


def test_invalid_nodes_have_no_edges_and_change_no_others() -> None:
    weights = torch.randn(4, 4, dtype=torch.float64)
    valid = torch.tensor([[True, True, False, True], [True, True, True, True]])
    adjacency = normalised_adjacency(weights, valid)
    kept = [0, 1, 3]
    alone = normalised_adjacency(weights[kept][:, kept])
    torch.testing.assert_close(adjacency[0][kept][:, kept], alone)
    assert adjacency[0, 2].abs().max() == 0
    assert adjacency[0, :, 2].abs().max() == 0
    torch.testing.assert_close(adjacency[1], normalised_adjacency(weights))


def test_layers_see_all_layers_before_them() -> None:
    torch.manual_seed(0)
    graph = DenseGraph(4, 3, layers=3, growth=2).double()
    torch.nn.init.normal_(graph.adjacency)
    nodes = torch.randn(2, 4, 3, dtype=torch.float64)
    adjacency = normalised_adjacency(graph.adjacency)
    layers = [nodes]
    for layer in graph.layers:
        assert isinstance(layer, torch.nn.Linear)
        before = torch.cat(layers, 2)
        out = torch.einsum("nm,bmf,gf->bng", adjacency, before, layer.weight)
        layers.append(out.clamp(min=0))
    result = graph(nodes)
    assert result.shape == (2, 4, 9)
    torch.testing.assert_close(result, torch.cat(layers, 2))


def test_layers_do_not_see_invalid_nodes() -> None:
    graph = DenseGraph(4, 3, layers=2, growth=2)
    nodes = torch.randn(1, 4, 3)
    valid = torch.tensor([[True, True, False, True]])
    other = nodes.clone()
    other[0, 2] += 5.0
    kept = [0, 1, 3]
    torch.testing.assert_close(graph(nodes, valid)[0, kept], graph(other, valid)[0, kept])


def test_the_topology_is_learned_and_begins_uniform() -> None:
    graph = DenseGraph(4, 3, layers=1, growth=2)
    assert (graph.adjacency == 0.25).all()
    graph(torch.randn(2, 4, 3)).square().sum().backward()
    assert graph.adjacency.grad is not None
    assert graph.adjacency.grad.abs().min() > 0


def test_joint_cross_attention_is_that_of_the_equations() -> None:
    torch.manual_seed(0)
    width, tokens, hidden = 4, 3, 5
    attention = JointCrossAttention(width, tokens, hidden).double()
    features = torch.randn(2, tokens, width, dtype=torch.float64)
    joint = torch.cat([features, torch.randn(2, tokens, width, dtype=torch.float64)], 2)
    w_j, w_m, w_c, w_h = (
        layer.weight.detach().numpy()
        for layer in (attention.joint, attention.features, attention.affinity, attention.out)
    )
    for x_rows, j_rows, result in zip(features, joint, attention(features, joint), strict=True):
        x, j = x_rows.numpy().T, j_rows.numpy().T  # columns are tokens
        c = np.tanh(x.T @ w_j @ j / np.sqrt(2 * width))
        h = np.maximum(w_m @ x + w_c @ c.T, 0)
        np.testing.assert_allclose(result.detach().numpy().T, w_h @ h + x)


def test_pooling_is_a_mean_over_valid_nodes() -> None:
    torch.manual_seed(0)
    pool = NodePool(4, 3).double()
    nodes = torch.randn(1, 4, 2, dtype=torch.float64)
    same = torch.ones_like(nodes)
    torch.testing.assert_close(pool(same), torch.ones(1, 3, 2, dtype=torch.float64))
    valid = torch.tensor([[True, False, True, True]])
    weights = pool.scores[:, [0, 2, 3]].softmax(1)
    torch.testing.assert_close(pool(nodes, valid)[0], weights @ nodes[0, [0, 2, 3]])


def network(bench: Bench) -> DGCJCANet:
    cache = bench.data.cache
    powers = BandPowers(28, cache.sfreq, BANDS, window=1.0, step=1.0)
    visual = bench.visual_net().visual
    bench.seed("test")
    sizes = (cache.video.shape[1], cache.eeg.shape[2], 3)
    return DGCJCANet(visual, powers, sizes, DGCJCASettings()).eval()


def test_the_network_reads_both_modalities_and_no_masked_frame(
    open_bench: Callable[..., Bench],
) -> None:
    bench = open_bench(dgc_jca.METHOD)
    net = network(bench)
    batch = bench.data.batch(bench.split.train[:6])
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[:3, 1] = False

    def logits(video: Tensor, eeg: Tensor, frame_mask: Tensor | None = mask) -> Tensor:
        with torch.no_grad():
            out: Tensor = net(video, frame_mask, eeg).logits
        return out

    base = logits(batch.video, batch.eeg)
    assert base.shape == (6, 3)
    hidden = batch.video.clone()
    hidden[:3, 1] = 255 - hidden[:3, 1]
    torch.testing.assert_close(logits(hidden, batch.eeg), base)
    assert not torch.allclose(logits(batch.video.flip(0), batch.eeg)[3:], base[3:], atol=1e-4)
    assert not torch.allclose(logits(batch.video, batch.eeg.flip(0)), base, atol=1e-4)
    torch.testing.assert_close(
        logits(batch.video, batch.eeg, torch.ones_like(mask)), logits(batch.video, batch.eeg, None)
    )


def test_every_parameter_is_trained(open_bench: Callable[..., Bench]) -> None:
    bench = open_bench(dgc_jca.METHOD)
    net = network(bench)
    batch = bench.data.batch(bench.split.train[:16])
    loss = torch.nn.functional.cross_entropy(
        net(batch.video, batch.frame_mask, batch.eeg).logits, batch.labels
    )
    loss.backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None]
    assert idle == []


def test_the_frame_encoder_starts_from_the_shared_weights(open_bench: Callable[..., Bench]) -> None:
    bench = open_bench(dgc_jca.METHOD)
    net = network(bench)
    shared = bench.visual_net().visual.frame_encoder.state_dict()
    own = net.visual.frame_encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in shared.items())


@pytest.mark.parametrize(
    "change", [{"layers": 0}, {"tokens": 0}, {"window": 0.0}, {"dropout": 1.0}]
)
def test_settings_that_cannot_be_meant(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"dgc-jca: .*: expected .* remedy"):
        replace(DGCJCASettings(), **change)
