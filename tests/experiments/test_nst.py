"""NST: the discrepancy, the recorded maps, the mean over frames, and what training does to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_cache import QUICK
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.methods import distilled
from pycdgkd.experiments.methods.nst import (
    KERNELS,
    METHOD,
    NSTSettings,
    SelectivityTransfer,
    frame_weights,
    nst_loss,
    recorded_maps,
    squared_mmd,
    train_nst,
)
from pycdgkd.models.branches import VisualBranch
from pycdgkd.models.networks import MultimodalNet
from pycdgkd.models.pvt import PyramidVisionTransformer

OpenBench = Callable[..., Bench]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    """MMD^2 of one frame, term by term; maps are columns."""
    ours = [column / column.norm() for column in student.T]
    theirs = [column / column.norm() for column in teacher.T]
    with torch.no_grad():
        distances = [(a - b).square().sum() for a in ours for b in theirs]
        width = torch.stack(distances).mean()

    def k(a: Tensor, b: Tensor) -> Tensor:
        if kernel == "polynomial":
            return (a @ b) ** 2
        return torch.exp(-(a - b).square().sum() / (2 * width))

    def mean(first: list[Tensor], second: list[Tensor]) -> Tensor:
        return torch.stack([k(a, b) for a in first for b in second]).mean()

    return mean(theirs, theirs) + mean(ours, ours) - 2 * mean(ours, theirs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees_with_the_definition_in_value_and_gradient(kernel: str) -> None:
    student, teacher = tokens(2, 9, 4).requires_grad_(), tokens(2, 9, 5, seed=1)
    found = squared_mmd(student, teacher, kernel)
    expected = torch.stack([by_definition(student[i], teacher[i], kernel) for i in range(2)])
    torch.testing.assert_close(found, expected)
    factors = torch.tensor([1.0, -3.0], dtype=torch.float64)
    (ours,) = torch.autograd.grad(found @ factors, student)
    (theirs,) = torch.autograd.grad(expected @ factors, student)
    torch.testing.assert_close(ours, theirs)


def test_polynomial_kernel_compares_gram_matrices() -> None:
    """sum (a^T b)^2 = <A A^T, B B^T>: where the maps are, whatever channel they belong to."""
    student, teacher = tokens(3, 16, 6), tokens(3, 16, 4, seed=1)
    grams = [F.normalize(maps, dim=1) for maps in (student, teacher)]
    grams = [maps @ maps.transpose(1, 2) / maps.shape[2] for maps in grams]
    expected = (grams[0] - grams[1]).square().sum((1, 2))
    torch.testing.assert_close(squared_mmd(student, teacher, "polynomial"), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_tells_places_not_channels_or_strengths(kernel: str) -> None:
    student = tokens(2, 9, 5)
    channels, cells = torch.tensor([3, 0, 4, 1, 2]), torch.arange(9).roll(1)
    zero = torch.zeros(2, dtype=torch.float64)
    same = student[:, :, channels] * torch.tensor([1.0, 2.0, 0.1, 7.0, 100.0])
    torch.testing.assert_close(squared_mmd(student, same, kernel), zero)
    doubled = torch.cat([student, student], dim=2)
    torch.testing.assert_close(squared_mmd(student, doubled, kernel), zero)
    assert (squared_mmd(student, student[:, cells], kernel) > 0.01).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_extremes_stay_finite(kernel: str) -> None:
    """Silent channels, huge and tiny responses, a grid of one cell, equal maps in float32."""
    torch.manual_seed(0)
    student = torch.randn(2, 9, 5)
    student[0] = 0.0
    student[1, :, 1], student[1, :, 2] = 1e15, 1e-15
    student.requires_grad_()
    squared_mmd(student, torch.randn(2, 9, 5), kernel).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    one_cell = squared_mmd(torch.rand(2, 1, 3) + 0.1, torch.rand(2, 1, 4) + 0.1, kernel)
    assert one_cell.abs().max() < 1e-6
    equal = torch.randn(4, 49, 32)
    assert squared_mmd(equal, equal.clone(), kernel).abs().max() < 1e-5


def test_frames_are_averaged_within_a_sample_first() -> None:
    video = torch.zeros(3, 4, 3, 2, 2)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]]).bool()
    expected = torch.tensor([1 / 4] * 4 + [1.0] + [1 / 2] * 2) / 3
    torch.testing.assert_close(frame_weights(video, mask), expected)
    torch.testing.assert_close(frame_weights(video, None), torch.full((12,), 1 / 12))


def test_loss_is_cross_entropy_and_half_the_weighted_discrepancy() -> None:
    logits, mmd = tokens(4, 3), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1])
    result = nst_loss(logits, labels, mmd, 50.0)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = -p[torch.arange(4), labels].log().mean()
    assert result.loss.item() == pytest.approx(expected.item() + 25.0 * 0.3)
    assert result.cross_entropy.item() == pytest.approx(expected.item())
    result.loss.backward()
    assert mmd.grad == 25.0


def branch() -> VisualBranch:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dims": (8, 16, 20, 32), "num_heads": (1, 2, 5, 8)}
    return VisualBranch(PyramidVisionTransformer(64, depths=(1, 2, 1, 2), **sizes), 32, 6).eval()


def test_recorded_maps_are_what_the_stages_hand_on() -> None:
    net, video = branch(), torch.rand(2, 2, 3, 64, 96)
    mask = torch.tensor([[True, False], [True, True]])
    with torch.no_grad():
        expected = net(video, mask)
        maps = []
        for stage in (1, 2, 3, 4):
            with recorded_maps(net, stage) as found:
                assert torch.equal(net(video, mask), expected)
            net(video, mask)  # not recorded
            maps += found
        encoder = net.frame_encoder
        frames = net.normalise(video[mask])  # the three valid ones
        grid = (16, 24)
        for i, dim in enumerate((8, 16, 20)):
            stage = i + 1
            grid = grid if i == 0 else (grid[0] // 2, grid[1] // 2)
            out = encoder.get_submodule(f"patch_embed{stage}")(frames)
            native = encoder.get_parameter(f"pos_embed{stage}").view(1, *[16 >> i] * 2, dim)
            native = native.permute(0, 3, 1, 2)
            resized = F.interpolate(native, size=grid, mode="bilinear", align_corners=False)
            out = out + resized.flatten(2).transpose(1, 2)
            for j in range(encoder.depths[i]):
                out = encoder.get_submodule(f"block{stage}.{j}")(out, grid)
            torch.testing.assert_close(maps[i], out)
            frames = out.transpose(1, 2).unflatten(2, grid)
        fourth = []
        last = encoder.get_submodule("block4.1")
        last.register_forward_hook(lambda _module, _inputs, tokens: fourth.append(tokens))
        net(video, mask)
    assert [each.shape[1] for each in maps] == [384, 96, 24, 6]
    assert torch.equal(maps[3], fourth[0][:, 1:])  # without the class token


def test_nothing_is_recorded_after() -> None:
    net = branch()
    with pytest.raises(ValueError, match="video: expected"), recorded_maps(net, 2):
        net(torch.rand(2, 3, 64, 64))
    assert not any(module._forward_hooks for module in net.modules())


def transfer(bench: Bench, settings: NSTSettings) -> SelectivityTransfer:
    teacher = bench.teacher().load("teacher")
    assert isinstance(teacher, MultimodalNet)
    return SelectivityTransfer(settings, teacher.visual)


def test_objective_compares_frame_by_frame_and_leaves_the_teacher(open_bench: OpenBench) -> None:
    bench = open_bench(METHOD, QUICK)
    objective, student = transfer(bench, NSTSettings(weight=8.0, stage=2)), bench.visual_net()
    masked = ~bench.data.cache.frame_mask[bench.split.train].all(1)
    picked = [*masked.nonzero()[0][:2], *(~masked).nonzero()[0][:2]]
    batch = bench.data.batch(bench.split.train[picked])
    assert batch.frame_mask is not None
    student.eval()
    loss, values = objective(student, batch, torch.tensor(picked))
    expected = []
    with torch.no_grad():
        for video, mask in zip(batch.video, batch.frame_mask, strict=True):
            frames = video[mask].unsqueeze(0)
            with recorded_maps(student.visual, 2) as ours:
                student.visual(frames)
            with recorded_maps(objective.teacher, 2) as theirs:
                objective.teacher(frames)
            pairs = zip(ours[0].double(), theirs[0].double(), strict=True)
            found = [by_definition(a, b, "polynomial") for a, b in pairs]
            expected.append(torch.stack(found).mean())
    assert float(values[2]) == pytest.approx(float(sum(expected)) / 4, rel=1e-4)
    assert float(values[0]) == pytest.approx(float(values[1] + 4.0 * values[2]), rel=1e-5)
    padding = batch._replace(video=batch.video.clone())
    padding.video[~batch.frame_mask] = 255
    torch.testing.assert_close(objective(student, padding, torch.tensor(picked))[0], loss)
    loss.backward()
    assert not objective.teacher.training
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert student.visual.frame_encoder.get_submodule("block2.0.mlp.fc2").weight.grad.norm() > 0


def final_mmd(bench: Bench, weight: float) -> float:
    bench.method = f"weight-{weight}"
    net = bench.visual_net()
    objective = transfer(bench, NSTSettings(weight=weight))
    bench.fit("student", net, objective)
    with torch.no_grad():
        _, values = objective(net.eval(), bench.data.batch(bench.split.val), torch.zeros(0))
    return float(values[2])


def test_training_brings_the_maps_together(open_bench: OpenBench) -> None:
    """On validation frames too; cross-entropy alone does not."""
    assert final_mmd(open_bench(METHOD, QUICK), 50.0) < 0.3 * final_mmd(
        open_bench(METHOD, QUICK), 0.0
    )


def test_without_weight_the_maps_change_nothing(open_bench: OpenBench) -> None:
    """Bit for bit the student without distillation: same start, batches and dropout."""
    settings = NSTSettings(weight=0.0)
    alone, bench = open_bench(distilled.ALONE, QUICK), open_bench(METHOD, QUICK)
    distilled.ALONE.train(alone, alone.settings)
    bench.settings = settings
    train_nst(bench, settings)
    ours, theirs = (
        load_file(b.out / b.method / "student/model.safetensors") for b in (bench, alone)
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_other_backbones_are_refused(open_bench: OpenBench) -> None:
    bench = open_bench(METHOD, replace(QUICK, backbone="timm:resnet18"))
    with pytest.raises(InputError, match=r"expected backbone 'pvt'.*got 'timm:resnet18'"):
        train_nst(bench, bench.settings)
    assert not list(bench.out.iterdir())  # before the teacher is trained


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": -1.0}, "nst.weight: expected a finite number of at least 0; got -1.0"),
        ({"weight": float("inf")}, "nst.weight"),
        ({"kernel": "linear"}, "expected one of polynomial, gaussian; got 'linear'"),
        ({"stage": 5}, "nst.stage: expected 1, 2, 3 or 4; got 5"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NSTSettings(**values)
