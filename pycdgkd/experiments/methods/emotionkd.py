"""EmotionKD: a teacher that hears how its student fares (Liu, Jia, Wang, ACM Multimedia 2023).

The student S learns from the teacher T by

    L_S = CE_S + w_kl KL(p_T || p_S) + w_match MSE(M z_S, f_T)

and the teacher, in the same step, by adaptive feedback: what the student would make of its lesson,

    L_T = e1 CE_T + e2 CE(S'),    S' = S - eta dL_S/dS.

CE(S') depends on T through the lesson, so dL_T/dT takes mixed second derivatives of L_S. The
authors' released code cuts that path ("additive"): CE(S) then is a number beside the teacher's
loss and changes no weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.models.networks import Network
from pycdgkd.models.presets import get_preset
from pycdgkd.training.objective import CrossEntropy, Objective
from pycdgkd.training.recordings import Batch

from .distilled import NoSettings
from .emotionkd_nets import EmotionKDPair, EmotionKDTeacher, TeacherOutput

FEEDBACKS = ("second-order", "additive", "none")


@dataclass(frozen=True)
class EmotionKDSettings:
    """Weights of L_S and L_T as in the released code; its learning rates give way to the bench's.

    feedback: one of ``FEEDBACKS``. inner_lr: eta, which no source tells. A plain step is as long as
    one of Adam's where eta = lr sqrt(weights) / norm of the gradient, about 0.07 for the "paper"
    networks when training begins. feedback_every: steps from one feedback to the next; the other
    steps train the teacher by e1 CE_T alone, at half the cost.
    """

    kl_weight: float = 0.1
    match_weight: float = 1.0
    teacher_weight: float = 1.0
    feedback_weight: float = 1.0
    feedback: str = "second-order"
    inner_lr: float = 0.1
    feedback_every: int = 1

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        if self.feedback not in FEEDBACKS:
            raise InputError(
                f"emotionkd.feedback must be one of {', '.join(FEEDBACKS)}; got '{self.feedback}'"
            )
        if self.feedback_every < 1:
            raise InputError(
                f"emotionkd.feedback_every must be 1 or more; got {self.feedback_every}"
            )
        for name in ("kl_weight", "match_weight", "teacher_weight", "feedback_weight", "inner_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"emotionkd.{name} must be a finite number from 0; got {value}")


class StudentLoss(NamedTuple):
    """L_S and its parts before weighting."""

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    match: Tensor


def student_loss(
    logits: Tensor,
    features: Tensor,
    hint: TeacherOutput,
    labels: Tensor,
    settings: EmotionKDSettings,
) -> StudentLoss:
    """L_S, twice differentiable in every tensor (the package's fused KL refuses that).

    logits: (B, K) of the student. features: (B, D), the student's after their linear map. hint: of
    the teacher. labels: (B,).
    """
    cross_entropy = F.cross_entropy(logits, labels)
    kl = F.kl_div(
        logits.log_softmax(1), hint.logits.log_softmax(1), reduction="batchmean", log_target=True
    )
    match = F.mse_loss(features, hint.features)
    loss = cross_entropy + settings.kl_weight * kl + settings.match_weight * match
    return StudentLoss(loss, cross_entropy, kl, match)


def look_ahead(student: nn.Module, loss: Tensor, rate: float) -> dict[str, Tensor]:
    """S' by name, for ``functional_call``: S - rate dloss/dS with S held fixed.

    Differentiable in whatever ``loss`` depends on. Buffers are copies: S' may use batch statistics,
    but its pass is not one of the student's, so its running averages are not kept.
    """
    names, weights = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    moved = [weight.detach() - rate * step for weight, step in zip(weights, gradients, strict=True)]
    copies = {name: buffer.clone() for name, buffer in student.named_buffers()}
    return dict(zip(names, moved, strict=True)) | copies


def through(value: Tensor, leaves: Sequence[Tensor], origins: Sequence[Tensor]) -> Tensor:
    """``value`` with its gradient in ``leaves`` handed to ``origins``, and no other gradient.

    leaves: detached copies of origins.
    """
    # The lesson that value was made from still has its own backward pass to come.
    gradients = torch.autograd.grad(value, leaves, retain_graph=True)
    linear = value.detach()
    for gradient, origin in zip(gradients, origins, strict=True):
        linear = linear + (gradient * (origin - origin.detach())).sum()
    return linear


class AdaptiveFeedback(Objective):
    """L_S + L_T in one step: no weight occurs in both, so each has its own loss's gradient alone.

    The lesson starts from detached copies of the teacher's output, and the feedback's gradient is
    taken with respect to them: second derivatives end at the student's network, and of the
    teacher's (whose EEG convolution has no others) only the first are used. Both passes of the
    student are in training mode; S' draws dropout masks of its own, as the next step will.
    """

    columns = ("loss", "cross_entropy", "kl", "match", "teacher_cross_entropy", "feedback")

    def __init__(self, settings: EmotionKDSettings) -> None:
        self.settings = settings
        self.step = 0

    def begin_step(self) -> None:
        """Count the steps."""
        self.step += 1

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both losses; "cross_entropy" is the student's, "feedback" e2 CE(S')."""
        del positions
        assert isinstance(net, EmotionKDPair), "feedback needs the teacher beside the student"
        settings = self.settings
        taught = net.teacher(batch.video, batch.frame_mask, batch.eeg)
        ahead = self._looks_ahead()
        hint = TeacherOutput(*(tensor.detach().requires_grad_(ahead) for tensor in taught))
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if ahead else contextlib.nullcontext():
            output = net(batch.video, batch.frame_mask)
        lesson = student_loss(output.logits, net.match(output.video), hint, batch.labels, settings)
        teacher = F.cross_entropy(taught.logits, batch.labels)
        feedback = self._feedback(net, batch, lesson, hint, taught)
        loss = lesson.loss + settings.teacher_weight * teacher + feedback
        return loss, torch.stack([loss, *lesson[1:], teacher, feedback]).detach()

    def _looks_ahead(self) -> bool:
        every = self.settings.feedback_every
        return self.settings.feedback == "second-order" and (self.step - 1) % every == 0

    def _feedback(
        self,
        net: EmotionKDPair,
        batch: Batch,
        lesson: StudentLoss,
        hint: TeacherOutput,
        taught: TeacherOutput,
    ) -> Tensor:
        """e2 CE(S') with a gradient to the teacher alone; 0 in a step without feedback."""
        settings = self.settings
        if settings.feedback == "additive":
            return settings.feedback_weight * lesson.cross_entropy.detach()
        if not self._looks_ahead():
            return torch.zeros_like(lesson.loss)
        weights = look_ahead(net.student, lesson.loss, settings.inner_lr)
        output = functional_call(net.student, weights, (batch.video, batch.frame_mask))
        cross_entropy = F.cross_entropy(output.logits, batch.labels)
        return settings.feedback_weight * through(cross_entropy, hint, taught)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved number of steps."""
        self.step = state["step"]


def teacher_net(bench: Bench) -> EmotionKDTeacher:
    """A teacher whose encoders start from the weights of all other multimodal networks."""
    parts = bench.multimodal_net()
    sizes = get_preset(bench.config.preset)
    bench.seed("emotionkd teacher")
    net = EmotionKDTeacher(
        parts.visual,
        parts.eeg,
        frames=bench.data.cache.video.shape[1],
        num_classes=bench.num_classes,
        hidden=sizes.hidden,
        dropout=sizes.dropout,
    )
    return net.to(bench.data.device)


def pair_net(bench: Bench) -> EmotionKDPair:
    """The teacher of ``teacher_net`` and the student that all methods share."""
    teacher, student = teacher_net(bench), bench.visual_net()
    bench.seed("emotionkd match")
    return EmotionKDPair(teacher, student).to(bench.data.device)


def train_teacher(bench: Bench, settings: NoSettings) -> Classifier:
    """The teacher alone, by cross-entropy."""
    del settings
    net = teacher_net(bench)
    return bench.classifier(net, bench.fit("teacher", net, CrossEntropy(), seed_role="teacher"))


def train_student(bench: Bench, settings: EmotionKDSettings) -> Classifier:
    """Teacher and student together, from their initial weights; the best epoch is the student's."""
    pair = pair_net(bench)
    state = bench.fit("pair", pair, AdaptiveFeedback(settings))
    return bench.classifier(pair.student, state)


TEACHER = Method(
    "emotionkd-teacher", "EmotionKD's teacher", ("video", "eeg"), NoSettings(), train_teacher
)
STUDENT = Method(
    "emotionkd",
    "EmotionKD",
    ("video",),
    EmotionKDSettings(),
    train_student,
    "a teacher trained beside it, by second derivatives",
)
