"""Teacher losses against sums written out by hand in float64, their gradients, and the corners."""

import math

import pytest
import torch
from torch.nn import functional

from lightning_unlearn.functional.distillation import distillation_loss, mixed_teacher_loss


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row, heat):
    powers = [math.exp(value / heat) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("heat", [0.5, 1.0, 4.0])
def test_distillation_written_out(heat):
    student, teacher = draw(6, 5), draw(6, 5, seed=1)
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    wanted = heat**2 * sum(divergence(softmax(t, heat), softmax(s, heat)) for s, t in rows) / 6
    assert distillation_loss(student, teacher, temperature=heat).item() == pytest.approx(wanted, rel=1e-12)
    # the other direction is another number, so neither is taken for the other
    assert distillation_loss(teacher, student, temperature=heat).item() != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("heat", [1.0, 4.0])
def test_the_gradient_is_the_difference_of_answers_times_the_temperature(heat):
    student, teacher = draw(6, 5).requires_grad_(), draw(6, 5, seed=1).requires_grad_()
    distillation_loss(student, teacher, temperature=heat).backward()
    wanted = heat * ((student / heat).softmax(1) - (teacher / heat).softmax(1)) / 6
    torch.testing.assert_close(student.grad, wanted)
    assert teacher.grad is None


def test_a_student_like_its_teacher_is_at_zero():
    student = draw(6, 5).float().requires_grad_()
    loss = distillation_loss(student, student.detach() + 2.0, temperature=2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6
    assert distillation_loss(student, student).item() == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_mixture_written_out(share, heat):
    student, incompetent, competent = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2)
    wanted = 0.0
    for z, d, s in zip(student.tolist(), incompetent.tolist(), competent.tolist(), strict=True):
        pairs = zip(softmax(d, heat), softmax(s, heat), strict=True)
        wanted += divergence([share * a + (1 - share) * b for a, b in pairs], softmax(z, heat)) / 4
    settings = {"share": share, "temperature": heat}
    assert mixed_teacher_loss(student, incompetent, competent, **settings).item() == pytest.approx(wanted, rel=1e-12)
    official = mixed_teacher_loss(student, incompetent, competent, **settings, reduction="official")
    assert official.item() == pytest.approx(wanted / 3, rel=1e-12)
    # what the authors' code calls
    target = share * (incompetent / heat).softmax(1) + (1 - share) * (competent / heat).softmax(1)
    code = functional.kl_div((student / heat).log_softmax(1), target, reduction="none").mean()
    torch.testing.assert_close(official, code)


def test_a_share_of_nothing_is_distillation_from_the_competent_teacher():
    student, incompetent, competent = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2)
    torch.testing.assert_close(
        mixed_teacher_loss(student, incompetent, competent, share=0.0), distillation_loss(student, competent)
    )


def test_positions_are_samples():
    student, teacher = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    flat = [tensor.permute(0, 2, 3, 1).reshape(-1, 3) for tensor in (student, teacher)]
    torch.testing.assert_close(distillation_loss(student, teacher), distillation_loss(*flat))
    mixed = mixed_teacher_loss(student, teacher, student, share=0.4)
    torch.testing.assert_close(mixed, mixed_teacher_loss(flat[0], flat[1], flat[0], share=0.4))


def test_yes_no_questions_written_out():
    student, teacher = draw(4, 3), draw(4, 3, seed=1)
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    wanted = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=2.0, multi_label=True), wanted)
    for reduction in ("batchmean", "official"):  # a mean over all questions, whatever the reduction
        settings = {"share": 0.0, "temperature": 2.0, "reduction": reduction, "multi_label": True}
        mixed = mixed_teacher_loss(student, draw(4, 3, seed=2), teacher, **settings)
        torch.testing.assert_close(mixed, wanted / 4)


@pytest.mark.parametrize("multi_label", [False, True])
def test_answers_that_are_sure_give_no_nan(multi_label):
    sure = torch.tensor([[200.0, -200.0, -torch.inf]])
    student = torch.zeros(1, 3, requires_grad=True)
    loss = distillation_loss(student, sure, multi_label=multi_label)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    mixed = mixed_teacher_loss(student, sure, sure, share=0.5, multi_label=multi_label)
    assert torch.isfinite(mixed)


def test_a_class_that_both_exclude_adds_nothing():
    student, teacher = draw(4, 3).requires_grad_(), draw(4, 3, seed=1)
    none = torch.full((4, 1), -torch.inf, dtype=torch.float64)
    loss = distillation_loss(torch.cat((student, none), 1), torch.cat((teacher, none), 1))
    torch.testing.assert_close(loss, distillation_loss(student, teacher))
    loss.backward()
    assert torch.isfinite(student.grad).all()


def test_half_precision_is_computed_in_single():
    student, teacher = draw(8, 5, scale=0.01).bfloat16(), draw(8, 5, seed=1, scale=0.01).bfloat16()
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(distillation_loss(student.double(), teacher.double()).item(), rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"temperature": 0.0}, "temperature"), ({"share": 1.5}, "share"), ({"reduction": "sum"}, "reduction")],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        mixed_teacher_loss(draw(2, 3), draw(2, 3), draw(2, 3), **{"share": 0.5, **settings})


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"here \(2, 3\)"):
        distillation_loss(draw(2, 3), draw(2, 4))
