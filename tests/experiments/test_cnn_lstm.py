from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pycdgkd.errors import InputError
from pycdgkd.experiments.bands import BandPowers
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.methods import cnn_lstm
from pycdgkd.experiments.methods.cnn_lstm import BANDS, EEGLSTM, CNNLSTMSettings, FaceNet3D
from pycdgkd.training.recordings import Recordings


def face_net(classes: int = 3) -> FaceNet3D:
    torch.manual_seed(0)
    net = FaceNet3D(classes, 16, 0.5)
    net(torch.rand(8, 3, 3, 16, 16))  # statistics of their own, so that zeros do not stay zeros
    return net.eval()


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_any_number_and_size_of_frames(frames: int) -> None:
    net = face_net()
    video = torch.randint(0, 256, (2, frames, 3, 40, 40), dtype=torch.uint8)
    assert net(video).logits.shape == (2, 3)
    torch.testing.assert_close(net(video).logits, net(video.float() / 255).logits)


def test_a_masked_end_gives_what_the_shorter_stack_gives() -> None:
    net = face_net()
    video = torch.rand(2, 4, 3, 20, 20)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    logits = net(video, mask).logits
    torch.testing.assert_close(logits[0], net(video[:1]).logits[0])
    torch.testing.assert_close(logits[1], net(video[1:, :2]).logits[0])


def test_what_a_masked_frame_holds_does_not_matter() -> None:
    net = face_net()
    video = torch.rand(1, 3, 3, 20, 20)
    mask = torch.tensor([[True, False, True]])
    other = video.clone()
    other[:, 1] = 1.0
    torch.testing.assert_close(net(video, mask).logits, net(other, mask).logits)
    with pytest.raises(InputError, match=r"samples \[0\] of the batch .* no valid frame"):
        net(video, torch.zeros(1, 3, dtype=torch.bool))


def test_convolutions_see_the_order_of_frames() -> None:
    net = face_net()
    video = torch.rand(1, 3, 3, 16, 16)
    swapped = video[:, [1, 0, 2]]
    assert not torch.allclose(net(video).logits, net(swapped).logits, atol=1e-4)


def test_the_lstms_see_the_windows_in_order() -> None:
    torch.manual_seed(0)
    powers = BandPowers(4, 96.0, BANDS, window=0.5, step=0.5)
    net = EEGLSTM(powers, 3)
    eeg = 10 * torch.randn(2, 4, 96 * 2)
    sequence = powers(eeg).flatten(2)
    assert sequence.shape == (2, 4, 20)
    first, second = net.first, net.second
    assert (first.hidden_size, second.hidden_size) == (80, 30)

    def run(cell: torch.nn.LSTM, inputs: torch.Tensor) -> torch.Tensor:
        """The LSTM's equations, window by window."""
        h = c = torch.zeros(len(inputs), cell.hidden_size)
        states = []
        for x in inputs.unbind(1):
            gates = x @ cell.weight_ih_l0.T + cell.bias_ih_l0 + h @ cell.weight_hh_l0.T
            i, f, g, o = (gates + cell.bias_hh_l0).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states, 1)

    expected = net.head(run(second, run(first, sequence))[:, -1])
    torch.testing.assert_close(net(eeg).logits, expected)


def test_both_networks_are_trained_and_fused(
    open_bench: Callable[..., Bench], data: Recordings
) -> None:
    settings = CNNLSTMSettings(size=12)
    bench = open_bench(cnn_lstm.METHOD)
    bench.settings = settings
    classifier = cnn_lstm.train(bench, settings)
    assert {path.name for path in (bench.out / "cnn-lstm").iterdir()} == {"face", "eeg"}
    test = np.setdiff1d(np.arange(len(data.labels)), [*bench.split.train, *bench.split.val])
    logits = classifier.logits(data, test)
    assert (logits.argmax(1).numpy() == data.labels[test]).mean() > 0.7
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(len(test)))
    again = cnn_lstm.train(bench, settings)  # from what is trained
    torch.testing.assert_close(again.logits(data, test), logits)


def test_the_eeg_alone_learns(open_bench: Callable[..., Bench], data: Recordings) -> None:
    bench = open_bench(cnn_lstm.METHOD)
    settings = CNNLSTMSettings(size=8)
    bench.settings = settings
    # Black faces tell nothing.
    cache = replace(data.cache, video=np.zeros_like(data.cache.video))
    bench.data = type(bench.data)(cache, bench.data.labels, data.classes, data.device)
    classifier = cnn_lstm.train(bench, settings)
    assert classifier.val_accuracy > 0.8


@pytest.mark.parametrize(
    "change",
    [{"window": 0.0}, {"step": -1.0}, {"size": 7}, {"dropout": 1.0}, {"window": -math.inf}],
)
def test_settings_that_cannot_be_meant(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"cnn-lstm: .*: expected .* remedy"):
        replace(CNNLSTMSettings(), **change)
