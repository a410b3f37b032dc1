"""EmotionKD: the fusion, the student's lesson, and the feedback's way back to the teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.methods import emotionkd
from pycdgkd.experiments.methods.emotionkd import (
    FEEDBACKS,
    AdaptiveFeedback,
    EmotionKDSettings,
    look_ahead,
    pair_net,
    student_loss,
    teacher_net,
    through,
)
from pycdgkd.experiments.methods.emotionkd_nets import (
    TOKEN,
    EmotionKDPair,
    InteractiveFusion,
    TeacherOutput,
)
from pycdgkd.training.recordings import Batch

from .breaking import check_resumes
from .conftest import QUICK

# Without CE_T, so that the teacher's gradient is the feedback's.
FEEDBACK_ALONE = EmotionKDSettings(teacher_weight=0.0, inner_lr=1.0)


@pytest.fixture
def bench(open_bench: Callable[..., Bench]) -> Bench:
    return open_bench(emotionkd.STUDENT)


def a_batch(bench: Bench, size: int = 24) -> Batch:
    """Some of them with padded frames."""
    batch = bench.data.batch(bench.split.train[:size])
    assert batch.frame_mask is not None
    return batch


def exact(bench: Bench) -> tuple[EmotionKDPair, Batch]:
    """A pair in float64 and evaluation mode: without dropout, a function of its weights."""
    batch = a_batch(bench)
    return pair_net(bench).double().eval(), batch._replace(eeg=batch.eeg.double())


def step(pair: EmotionKDPair, batch: Batch, settings: EmotionKDSettings) -> dict[str, float]:
    """The columns of a first step, whose gradients are left in ``pair``."""
    objective = AdaptiveFeedback(settings)
    objective.begin_step()
    pair.zero_grad()
    loss, values = objective(pair, batch, torch.arange(len(batch.labels)))
    loss.backward()
    return dict(zip(objective.columns, values.tolist(), strict=True))


def gradients(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_student_loss_is_the_equation() -> None:
    torch.manual_seed(0)
    logits, wanted, features, target = (
        torch.randn(5, n, dtype=torch.float64, requires_grad=True) for n in (3, 3, 4, 4)
    )
    labels = torch.tensor([0, 2, 1, 1, 0])
    settings = EmotionKDSettings(kl_weight=0.3, match_weight=0.7)
    loss = student_loss(logits, features, TeacherOutput(wanted, target), labels, settings)
    student, teacher = logits.softmax(1), wanted.softmax(1)
    cross_entropy = -student[torch.arange(5), labels].log().mean()
    kl = (teacher * (teacher / student).log()).sum(1).mean()
    match = (features - target).square().sum() / 20
    torch.testing.assert_close(
        loss, (cross_entropy + 0.3 * kl + 0.7 * match, cross_entropy, kl, match)
    )

    def of_all(*tensors: Tensor) -> Tensor:
        own, mapped, taught, hidden = tensors
        return student_loss(own, mapped, TeacherOutput(taught, hidden), labels, settings).loss

    assert torch.autograd.gradgradcheck(of_all, (logits, features, wanted, target))


def test_fusion_is_the_equation() -> None:
    torch.manual_seed(0)
    fusion = InteractiveFusion().double()
    depths = [torch.randn(7, TOKEN, dtype=torch.float64) for _ in range(2)]
    expected = torch.zeros(7, TOKEN, dtype=torch.float64)
    for score, tokens in zip(fusion.scores, depths, strict=True):
        assert isinstance(score, nn.Sequential)
        hidden = tokens
        for linear in (score[0], score[3]):
            hidden = hidden @ linear.weight.T + linear.bias
            hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
            hidden = hidden.clamp_min(0.0) if linear is score[0] else hidden
        expected += hidden / (1 + hidden.abs()) * tokens
    torch.testing.assert_close(fusion(*depths), expected)


def test_padded_frames_have_no_influence(bench: Bench) -> None:
    net, batch = teacher_net(bench).train(), a_batch(bench)
    for module in net.modules():  # batch statistics, but nothing random
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    mask = batch.frame_mask
    assert mask is not None
    noisy = batch.video.clone()
    noisy[~mask] = 255 - noisy[~mask]
    logits, features = net(batch.video, mask, batch.eeg)
    torch.testing.assert_close(net(noisy, mask, batch.eeg)[0], logits, rtol=0, atol=0)
    assert (net(noisy, None, batch.eeg)[0] != logits).any()
    tokens = features.unflatten(1, (-1, TOKEN))[:, : mask.shape[1]]
    assert torch.equal((tokens != 0).any(2), mask)
    whole, all_valid = net(noisy, None, batch.eeg), torch.ones_like(mask)
    torch.testing.assert_close(net(noisy, all_valid, batch.eeg), whole)


def test_every_part_of_the_teacher_learns(bench: Bench) -> None:
    net, batch = teacher_net(bench), a_batch(bench)
    F.cross_entropy(net(batch.video, batch.frame_mask, batch.eeg).logits, batch.labels).backward()
    assert all(grad.any() for grad in gradients(net.fusions) + gradients(net.head))
    assert all(p.grad is not None for p in net.parameters())


def test_feedback_gradient_is_that_of_finite_differences(bench: Bench) -> None:
    """Along a random direction of all the teacher's weights, encoders and EEG convolution too.

    So short a step that no rectifier changes sides.
    """
    pair, batch = exact(bench)
    step(pair, batch, FEEDBACK_ALONE)
    torch.manual_seed(1)
    weights = list(pair.teacher.parameters())
    direction = [torch.randn_like(weight) for weight in weights]
    slope = sum(
        float((grad * along).sum())
        for grad, along in zip(gradients(pair.teacher), direction, strict=True)
    )
    sides = []
    for distance in (1e-8, -1e-8):
        with torch.no_grad():
            for weight, along in zip(weights, direction, strict=True):
                weight += distance * along
        sides.append(step(pair, batch, FEEDBACK_ALONE)["feedback"])
        with torch.no_grad():
            for weight, along in zip(weights, direction, strict=True):
                weight -= distance * along
    assert abs(slope) > 1e-5
    assert (sides[0] - sides[1]) / 2e-8 == pytest.approx(slope, rel=1e-5)


def test_feedback_is_the_loss_after_a_plain_step(bench: Bench) -> None:
    pair, batch = exact(bench)
    with torch.no_grad():
        hint = pair.teacher(batch.video, batch.frame_mask, batch.eeg)
    output = pair(batch.video, batch.frame_mask)
    settings = replace(FEEDBACK_ALONE, feedback_weight=0.5)
    lesson = student_loss(output.logits, pair.match(output.video), hint, batch.labels, settings)
    weights = list(pair.student.parameters())
    steps = torch.autograd.grad(lesson.loss, weights)
    feedback = step(pair, batch, settings)["feedback"]
    with torch.no_grad():
        for weight, gradient in zip(weights, steps, strict=True):
            weight -= gradient
        after = F.cross_entropy(pair(batch.video, batch.frame_mask).logits, batch.labels)
    assert feedback == pytest.approx(0.5 * float(after))


def test_student_has_the_gradient_of_its_lesson_alone(bench: Bench) -> None:
    pair, batch = exact(bench)
    found = {}
    for feedback in FEEDBACKS:
        step(pair, batch, replace(FEEDBACK_ALONE, feedback=feedback))
        found[feedback] = gradients(pair.student) + gradients(pair.match)
    assert any(grad.any() for grad in found["none"])
    torch.testing.assert_close(found["second-order"], found["none"])
    torch.testing.assert_close(found["additive"], found["none"], rtol=0, atol=0)


def test_additive_feedback_gives_the_teacher_no_gradient(bench: Bench) -> None:
    pair, batch = exact(bench)
    values = step(pair, batch, replace(FEEDBACK_ALONE, feedback="additive"))
    assert values["feedback"] == values["cross_entropy"]
    assert not any(grad.any() for grad in gradients(pair.teacher))
    step(pair, batch, FEEDBACK_ALONE)
    assert any(grad.any() for grad in gradients(pair.teacher))


def test_through_hands_on_the_gradient() -> None:
    origin = torch.tensor([1.0, 2.0], requires_grad=True)
    other = torch.tensor(3.0, requires_grad=True)
    leaf = origin.detach().requires_grad_()
    passed = through((other * leaf.square()).sum(), [leaf], [origin])
    passed.backward()
    assert passed.item() == 15.0
    assert origin.grad is not None
    assert origin.grad.tolist() == [6.0, 12.0]
    assert other.grad is None


def test_looking_ahead_keeps_running_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, before = torch.randn(6, 3), net(torch.randn(6, 3)).sum()
    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    functional_call(net, look_ahead(net, before, 0.1), (x,))
    torch.testing.assert_close(dict(net.named_buffers()), kept, rtol=0, atol=0)


def test_feedback_every_third_step(bench: Bench) -> None:
    pair, batch = pair_net(bench), a_batch(bench)
    objective = AdaptiveFeedback(EmotionKDSettings(feedback_every=3))
    fed = []
    for number in range(5):
        if number == 2:  # interrupted here
            state, objective = objective.state_dict(), AdaptiveFeedback(objective.settings)
            objective.load_state_dict(state)
        objective.begin_step()
        fed.append(bool(objective(pair, batch, torch.arange(24))[1][-1] > 0))
    assert fed == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [("feedback", "some"), ("feedback_every", 0), ("kl_weight", -1.0), ("inner_lr", float("nan"))],
)
def test_settings_that_cannot_be_meant(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"emotionkd.{name}"):
        replace(EmotionKDSettings(), **{name: value})  # type: ignore[arg-type]  # on purpose


def test_resumed_training_has_the_bits_of_an_unbroken_one(bench: Bench, tmp_path: Path) -> None:
    settings = replace(EmotionKDSettings(), feedback_every=3)
    bench = replace(bench, config=QUICK, settings=settings)
    check_resumes(bench, emotionkd.train_student, tmp_path)
