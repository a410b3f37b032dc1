from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycdgkd.errors import InputError
from pycdgkd.models import (
    EEG_LEVELS,
    PRESETS,
    EEGBranch,
    MultimodalNet,
    VisualBranch,
    VisualNet,
    build_multimodal,
    build_visual,
)

MASK = torch.tensor([[True, False, True, True], [True, True, False, False], [True] * 4])


class ChannelMeans(nn.Module):
    """The mean of each colour channel: an encoder whose values are known."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def identity_branch() -> VisualBranch:
    branch = VisualBranch(ChannelMeans(), 3, 3, temporal_depth=0)
    nn.init.eye_(branch.project.weight)
    nn.init.zeros_(branch.project.bias)
    return branch


def video_batch(batch: int = 3, frames: int = 4) -> Tensor:
    return torch.randint(0, 256, (batch, frames, 3, 48, 48), dtype=torch.uint8)


def eeg_batch(batch: int = 3) -> Tensor:
    return 20.0 * torch.randn(batch, 28, 512)


def noisy_padding(video: Tensor, mask: Tensor) -> Tensor:
    changed = video.clone()
    changed[~mask] = torch.randint(0, 256, changed[~mask].shape).to(video.dtype)
    assert not torch.equal(changed, video)
    return changed


# Frames and their mask


def test_pixels_are_standardised_and_frames_averaged() -> None:
    video = video_batch(2, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((video.float() / 255).mean(dim=(3, 4)) - mean) / std
    z = identity_branch()(video)
    torch.testing.assert_close(z, expected.mean(dim=1), rtol=1e-5, atol=1e-5)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    kept = torch.stack([expected[0, 0], expected[1, :2].mean(dim=0)])
    torch.testing.assert_close(identity_branch()(video, mask), kept, rtol=1e-5, atol=1e-5)


def test_bytes_and_unit_floats_mean_the_same() -> None:
    net = build_visual("nano").eval()
    video = video_batch()
    torch.testing.assert_close(
        net(video).logits, net(video.float() / 255).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("temporal_depth", [0, 1])
def test_masked_frames_have_no_influence_at_all(training: bool, temporal_depth: int) -> None:
    preset = dataclasses.replace(PRESETS["nano"], temporal_depth=temporal_depth)
    net = build_multimodal(preset).train(training)
    video, eeg = video_batch(), eeg_batch()
    outputs = []
    for frames in (video, noisy_padding(video, MASK)):
        torch.manual_seed(5)  # the same dropout twice
        outputs.append(net(frames, MASK, eeg))
    for name, one, two in zip(outputs[0]._fields, *outputs, strict=True):
        assert torch.equal(one, two), name


def test_not_even_nan_in_masked_frames_matters_and_their_gradient_is_zero() -> None:
    net = build_visual("nano").eval()
    video = torch.rand(3, 4, 3, 48, 48)
    video[~MASK] = float("nan")
    video.requires_grad_()
    logits = net(video, MASK).logits
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert video.grad is not None
    assert video.grad[~MASK].abs().max() == 0
    assert (video.grad[MASK].abs().amax(dim=(1, 2, 3)) > 0).all()


def test_masked_frames_do_not_enter_batch_statistics() -> None:
    def encoder() -> nn.Module:
        torch.manual_seed(1)
        layers = (nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*layers)

    video = video_batch()
    branches = [VisualBranch(encoder(), 4, 2).train() for _ in range(2)]
    for branch, frames in zip(branches, (video, noisy_padding(video, MASK)), strict=True):
        branch(frames, MASK)
    one, two = (branch.frame_encoder[1].running_mean for branch in branches)
    assert torch.equal(one, two)
    assert one.abs().max() > 0


def test_padding_at_the_end_equals_a_shorter_sample() -> None:
    net = build_visual("nano").eval()
    video = video_batch(2, 5)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    padded, short = net(video, mask), net(video[:, :3])
    torch.testing.assert_close(padded.video, short.video, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.logits, short.logits, rtol=1e-4, atol=1e-5)


def test_a_full_mask_is_no_mask() -> None:
    net = build_visual("nano").eval()
    video = video_batch()
    full = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(net(video, full).logits, net(video).logits)


def test_order_of_frames_matters_to_the_temporal_layer_only() -> None:
    video = video_batch(2, 5)
    backwards = video.flip(1)
    with_layer = build_visual("nano").eval()
    without = build_visual(dataclasses.replace(PRESETS["nano"], temporal_depth=0)).eval()
    torch.testing.assert_close(without(video).video, without(backwards).video, rtol=1e-4, atol=1e-5)
    difference = with_layer(video).video - with_layer(backwards).video
    assert difference.abs().max() > 1e-4


def test_a_sample_without_frames_is_named() -> None:
    mask = MASK.clone()
    mask[1] = False
    with pytest.raises(InputError, match=r"samples \[1\] of the batch.*have no valid frame"):
        build_visual("nano")(video_batch(), mask)


@pytest.mark.parametrize(
    ("video", "mask", "message"),
    [
        (torch.zeros(2, 3, 48, 48), None, r"video: expected \(B, T, 3, H, W\)"),
        (torch.zeros(2, 0, 3, 48, 48), None, "with T >= 1"),
        (torch.zeros(2, 1, 1, 48, 48), None, r"got \(2, 1, 1, 48, 48\)"),
        (torch.zeros(1, 1, 3, 48, 48, dtype=torch.int32), None, "expected uint8 or floating"),
        (torch.zeros(2, 1, 3, 48, 48), torch.ones(2, 1), r"frame_mask: expected bool \(2, 1\)"),
        (torch.zeros(2, 1, 3, 48, 48), MASK, r"got torch.bool \(3, 4\)"),
        (torch.zeros(2, 1, 3, 50, 50), None, "50x50 images.*multiples of 24 pixels"),
    ],
)
def test_wrong_video(video: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_visual("nano")(video, mask)


# EEG statistics


def test_eeg_is_standardised_by_channel() -> None:
    class Flat(nn.Module):
        def forward(self, eeg: Tensor) -> Tensor:
            assert eeg.shape[1] == 1
            return eeg.flatten(1)

    branch = EEGBranch(Flat(), 6, 6, n_chans=2)
    nn.init.eye_(branch.project.weight)
    nn.init.zeros_(branch.project.bias)
    eeg = torch.tensor([[[1.0, 2.0, 3.0], [10.0, 30.0, 50.0]]])
    assert torch.equal(branch(eeg), eeg.flatten(1))  # before: microvolts as they are
    branch.set_statistics(torch.tensor([2.0, 30.0]), torch.tensor([0.5, 10.0]))
    assert torch.equal(branch(eeg), torch.tensor([[-2.0, 0.0, 2.0, -2.0, 0.0, 2.0]]))


def test_eeg_statistics_are_checked() -> None:
    branch = build_multimodal("nano").eeg
    std = torch.ones(28)
    std[3] = 0.0
    mean = torch.zeros(28)
    mean[7] = float("nan")
    with pytest.raises(InputError, match=r"EEG channels \[3, 7\].*are flat or not finite"):
        branch.set_statistics(mean, std)
    with pytest.raises(ValueError, match=r"std: expected \(28,\); got \(27,\)"):
        branch.set_statistics(torch.zeros(28), torch.ones(27))
    assert torch.equal(branch.eeg_std, torch.ones(28))  # a refused call changes nothing


def test_wrong_eeg() -> None:
    net = build_multimodal("nano")
    with pytest.raises(ValueError, match=r"EEGBranch: eeg: expected \(B, 28, L\); got"):
        net(video_batch(), None, torch.zeros(3, 27, 512))
    with pytest.raises(ValueError, match="as many samples as video, 3; got 2"):
        net(video_batch(), None, eeg_batch(2))


# Whole networks


@pytest.mark.parametrize("level", range(len(EEG_LEVELS)))
def test_every_level_builds_runs_and_uses_every_parameter(level: int) -> None:
    net = build_multimodal("nano", level=level, num_classes=3)
    out = net(video_batch(), MASK, eeg_batch())
    assert out.logits.shape == (3, 3)
    assert out.video.shape == out.eeg.shape == (3, PRESETS["nano"].feature_dim)
    F.cross_entropy(out.logits, torch.tensor([0, 1, 2])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_student_uses_every_parameter() -> None:
    net = build_visual("nano")
    F.cross_entropy(net(video_batch()).logits, torch.tensor([0, 1, 1])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("preset", list(PRESETS))
def test_levels_strictly_lower_the_parameter_count(preset: str) -> None:
    with torch.device("meta"):
        nets = [build_multimodal(preset, level=i) for i in range(len(EEG_LEVELS) + 1)]
        student = build_visual(preset)
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert all(more > fewer for more, fewer in itertools.pairwise(counts[:-1]))
    assert counts[-1] == counts[-2]  # levels beyond the last repeat it
    assert sum(p.numel() for p in student.parameters()) < counts[-1]


def test_paper_preset_runs() -> None:
    net = build_multimodal("paper").eval()
    with torch.no_grad():
        out = net(torch.zeros(1, 1, 3, 224, 224, dtype=torch.uint8), None, eeg_batch(1))
    assert out.video.shape == out.eeg.shape == (1, 768)
    assert sum(p.numel() for p in net.visual.frame_encoder.parameters()) == 12_716_288
    assert sum(p.numel() for p in net.eeg.encoder.parameters()) == 11_985
    assert out.logits.isfinite().all()


def test_another_image_size_and_eeg_layout() -> None:
    net = build_multimodal("nano", n_chans=32, n_times=1024, sfreq=256.0, img_size=72).eval()
    video = torch.randint(0, 256, (2, 2, 3, 72, 72), dtype=torch.uint8)
    assert net(video, None, torch.randn(2, 32, 1024)).logits.shape == (2, 2)
    assert net.visual.frame_encoder.get_parameter("pos_embed1").shape == (1, 24 * 24, 16)


def test_empty_batch() -> None:
    net = build_multimodal("nano").eval()
    out = net(video_batch(0), torch.ones(0, 4, dtype=torch.bool), eeg_batch(0))
    assert out.logits.shape == (0, 2)


def test_logits_come_from_both_features_side_by_side() -> None:
    net = build_multimodal("nano").eval()
    out = net(video_batch(), None, eeg_batch())
    dropout, first, relu, last = net.head
    assert (type(dropout), type(relu)) == (nn.Dropout, nn.ReLU)
    fused = torch.cat([out.video, out.eeg], dim=1)
    torch.testing.assert_close(out.logits, last(first(fused).clamp_min(0)))
    student = build_visual("nano").eval()
    z = student(video_batch())
    torch.testing.assert_close(z.logits, student.head(z.video))


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    net = build_multimodal("nano")
    video, eeg = video_batch(), eeg_batch()
    net.eval()
    assert torch.equal(net(video, MASK, eeg).logits, net(video, MASK, eeg).logits)
    net.train()
    assert not torch.equal(net(video, MASK, eeg).logits, net(video, MASK, eeg).logits)


def test_evaluation_is_the_same_with_and_without_gradients() -> None:
    net = build_multimodal("nano").eval()
    video, eeg = video_batch(), eeg_batch()
    with torch.no_grad():  # torch takes a fused path through transformer layers here
        quick = net(video, MASK, eeg)
    torch.testing.assert_close(net(video, MASK, eeg), quick, rtol=1e-4, atol=1e-5)


def test_weights_follow_the_global_generator() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_visual("nano").state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["visual.project.weight"], states[2]["visual.project.weight"])


def test_state_dict_round_trip(tmp_path: Path) -> None:
    net = build_multimodal("nano", level=1)
    net.eeg.set_statistics(torch.randn(28), torch.rand(28) + 0.5)
    net(video_batch(), None, eeg_batch())  # moves the batch statistics
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.manual_seed(9)
    copy = build_multimodal("nano", level=1)
    copy.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True), strict=True)
    video, eeg = video_batch(), eeg_batch()
    one, two = net.eval()(video, MASK, eeg), copy.eval()(video, MASK, eeg)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["multimodal", "visual"])
def test_nano_fits_random_samples(kind: str) -> None:
    net: MultimodalNet | VisualNet
    video, eeg = video_batch(16, 2), eeg_batch(16)
    labels = torch.arange(16) % 2
    if kind == "multimodal":
        net = build_multimodal("nano")
        inputs: tuple[Tensor | None, ...] = (video, None, eeg)
    else:
        net = build_visual("nano")
        inputs = (video,)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        F.cross_entropy(net(*inputs).logits, labels).backward()
        optimiser.step()
    with torch.no_grad():
        logits = net.eval()(*inputs).logits
    assert torch.equal(logits.argmax(dim=1), labels)
    assert F.cross_entropy(logits, labels) < 0.2


def test_wrong_builds() -> None:
    with pytest.raises(InputError, match="unknown network preset 'tiny'"):
        build_visual("tiny")
    with pytest.raises(InputError, match=r"50x50 images.*multiples of 24"):
        build_visual("nano", img_size=50)
    with pytest.raises(InputError, match=r"unknown backbone 'resnet18'.*'timm:resnet18'"):
        build_visual("nano", backbone="resnet18")
    with pytest.raises(ValueError, match="num_classes: expected 2 or more; got 1"):
        build_visual("nano", num_classes=1)
    with pytest.raises(InputError, match="got 27 channels"):
        build_multimodal("nano", n_chans=27)
    with pytest.raises(InputError, match="level of an EEG encoder must be 0"):
        build_multimodal("nano", level=-1)
