"""Fine-tuning and masks in the linear model: closed forms against solutions, solutions against independent solvers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.functional.linear_masking import (
    feature_importance,
    feature_mask,
    importance_mask,
    mask_features,
    masked_solution,
    predicted_masked_losses,
)
from lightning_unlearn.functional.linear_problem import LinearProblem, draw_linear_problem
from lightning_unlearn.functional.linear_theory import (
    fine_tuned_solution,
    golden_residual,
    golden_solution,
    losses_of,
    nearest_interpolant,
    original_solution,
    predicted_losses,
    projector,
)

OPTIONS = ("retain", "retain_and_overlap")
MANY = settings(max_examples=300, deadline=None)


OVERLAP = st.integers(0, 12)


@st.composite
def problems(draw, overlap=OVERLAP):
    """Twice as many own features as samples at least, so that Gram matrices are well conditioned."""
    n_retain, n_forget = draw(st.integers(1, 10)), draw(st.integers(1, 8))
    extra = st.integers(2, 12)
    return draw_linear_problem(
        n_retain,
        n_forget,
        d_retain=2 * n_retain + draw(extra),
        d_forget=2 * n_forget + draw(extra),
        d_overlap=draw(overlap),
        seed=draw(st.integers(0, 10_000)),
    )


@st.composite
def problems_with_rows(draw):
    problem = draw(problems())
    count = problem.x_retain.shape[1]
    return problem, draw(st.lists(st.integers(0, count - 1), unique=True))


def pseudo_inverse_solution(columns, labels, start):
    return start + torch.linalg.pinv(columns.T) @ (labels - columns.T @ start)


def is_zero(loss, problem):
    """As good as zero beside the labels."""
    return loss <= 1e-20 * float(torch.cat([problem.y_retain, problem.y_forget]).square().sum())


def close(found, predicted, problem):
    floor = 1e-10 * float(problem.y_forget.square().mean())
    assert found.forget == pytest.approx(predicted.forget, rel=1e-10, abs=1e-10 * floor)
    if predicted.retain == 0:
        assert is_zero(found.retain, problem)
    else:
        assert found.retain == pytest.approx(predicted.retain, rel=1e-10, abs=1e-10 * floor)


@MANY
@given(problems())
def test_golden_closed_forms(problem):
    close(losses_of(golden_solution(problem), problem), predicted_losses(problem, "golden"), problem)
    # The paper's own expression, with its projector.
    d_retain, d_overlap, _ = problem.sizes
    seen = torch.arange(len(problem.true_weights)) < d_retain + d_overlap
    unseen = torch.arange(len(problem.true_weights)) >= d_retain
    known = projector(problem.x_retain) @ (problem.true_weights * seen)
    residual = problem.x_forget.T @ (known - problem.true_weights * unseen)
    expected = float(residual.square().mean())
    assert predicted_losses(problem, "golden").forget == pytest.approx(expected, rel=1e-10)


@MANY
@given(problems_with_rows())
def test_fine_tuning_on_any_samples_moves_nothing_and_forgets_nothing(case):
    problem, rows = case
    original, tuned = original_solution(problem), fine_tuned_solution(problem, rows)
    torch.testing.assert_close(tuned, original, rtol=1e-10, atol=1e-11)
    for model in (original, tuned):
        losses = losses_of(model, problem)
        assert is_zero(losses.retain, problem)
        assert is_zero(losses.forget, problem)
    assert predicted_losses(problem, "original") == predicted_losses(problem, "fine_tuned") == (0, 0)


@MANY
@given(problems_with_rows(), st.sampled_from(OPTIONS))
def test_masked_closed_forms(case, keep):
    problem, rows = case
    solution = masked_solution(problem, feature_mask(problem, keep), rows)
    close(losses_of(solution, problem), predicted_masked_losses(problem, keep, rows), problem)


@MANY
@given(problems_with_rows())
def test_solutions_are_those_of_independent_solvers(case):
    problem, rows = case
    columns = torch.cat([problem.x_retain, problem.x_forget], 1)
    labels = torch.cat([problem.y_retain, problem.y_forget])
    zero = torch.zeros(len(columns), dtype=torch.float64)
    # Of an underdetermined system this driver gives the solution of minimum norm.
    least = torch.linalg.lstsq(columns.T, labels[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(original_solution(problem), least, rtol=1e-10, atol=1e-11)
    golden = pseudo_inverse_solution(problem.x_retain, problem.y_retain, zero)
    torch.testing.assert_close(golden_solution(problem), golden, rtol=1e-10, atol=1e-11)
    start = torch.linspace(-1, 1, len(columns), dtype=torch.float64)
    chosen = problem.x_retain[:, rows]
    if rows:
        tuned = pseudo_inverse_solution(chosen, problem.y_retain[rows], start)
        torch.testing.assert_close(fine_tuned_solution(problem, rows, start), tuned, rtol=1e-10, atol=1e-11)
    # (I - P_t) start + P_t w_*
    p = projector(chosen)
    mixed = start - p @ start + p @ problem.true_weights
    torch.testing.assert_close(fine_tuned_solution(problem, rows, start), mixed, rtol=1e-10, atol=1e-11)


@MANY
@given(problems())
def test_a_projector_is_one(problem):
    p, x = projector(problem.x_retain), problem.x_retain
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-12)
    torch.testing.assert_close(p, p.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(p @ x, x, rtol=1e-11, atol=1e-11)
    assert float(p.trace()) == pytest.approx(x.shape[1], abs=1e-11)
    gram = x @ torch.linalg.solve(x.T @ x, x.T)
    torch.testing.assert_close(p, gram, rtol=0, atol=1e-10)


@MANY
@given(problems(overlap=st.just(0)), st.sampled_from(OPTIONS), st.data())
def test_with_distinct_features_a_masked_model_has_the_golden_weights(problem, keep, data):
    rows = data.draw(st.lists(st.integers(0, problem.x_retain.shape[1] - 1), unique=True))
    solution = masked_solution(problem, feature_mask(problem, keep), rows)
    torch.testing.assert_close(solution, golden_solution(problem), rtol=1e-10, atol=1e-11)
    assert predicted_losses(problem, "golden").forget == pytest.approx(
        float(problem.w_forget @ problem.forget_only @ problem.forget_only.T @ problem.w_forget)
        / problem.x_forget.shape[1],
        rel=1e-10,
    )


@MANY
@given(problems(overlap=st.integers(1, 12)))
def test_keeping_the_overlap_forgets_less_than_the_golden_model(problem):
    x = problem.x_forget
    schur = x.T @ (x - projector(problem.x_retain) @ x)
    golden = golden_residual(problem)
    kept = masked_solution(problem, feature_mask(problem, "retain_and_overlap"))
    residual = x.T @ kept - problem.y_forget
    lengths = [float(one @ torch.linalg.solve(schur, one)) for one in (residual, golden)]
    assert 0 < lengths[0] < lengths[1] * (1 + 1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_discarding_what_is_shared_costs_retain_loss_until_all_is_fine_tuned_on(seed):
    problem = draw_linear_problem(20, 20, d_retain=48, d_forget=48, d_overlap=24, seed=seed)
    discarded = [predicted_masked_losses(problem, "retain", range(count)) for count in (0, 12, 20)]
    kept = [predicted_masked_losses(problem, "retain_and_overlap", range(count)) for count in (0, 12, 20)]
    assert discarded[0].retain > 0.1
    assert discarded[1].retain > 0.1
    assert discarded[2].retain == 0
    assert kept[0] == kept[1] == kept[2]  # nothing is left to tune
    assert kept[0].retain == 0
    assert kept[0].forget < discarded[2].forget  # what is kept is remembered
    assert kept[0].forget < predicted_losses(problem, "golden").forget


def test_where_everything_is_shared_one_option_forgets_nothing_and_the_other_starts_again():
    problem = draw_linear_problem(6, 5, d_retain=0, d_forget=0, d_overlap=30, seed=3)
    assert predicted_masked_losses(problem, "retain_and_overlap").forget == 0
    torch.testing.assert_close(
        masked_solution(problem, feature_mask(problem, "retain")), golden_solution(problem), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("d_overlap", [0, 6])
def test_gradient_descent_ends_there(d_overlap):
    problem = draw_linear_problem(4, 3, d_retain=30, d_forget=20, d_overlap=d_overlap, seed=1)

    def descended(columns, labels, start):
        rate = 1 / torch.linalg.matrix_norm(columns, 2).square()
        weights = start.clone().requires_grad_()
        for _ in range(1500):
            loss = (columns.T @ weights - labels).square().sum() / 2
            (gradient,) = torch.autograd.grad(loss, weights)
            weights = (weights - rate * gradient).detach().requires_grad_()
        return weights.detach()

    rows = [0, 2]
    zero = torch.zeros_like(problem.true_weights)
    original = descended(
        torch.cat([problem.x_retain, problem.x_forget], 1), torch.cat([problem.y_retain, problem.y_forget]), zero
    )
    golden = descended(problem.x_retain, problem.y_retain, zero)
    masked = mask_features(original, problem, "retain")
    tuned = descended(problem.x_retain[:, rows], problem.y_retain[rows], masked)
    expected = masked_solution(problem, feature_mask(problem, "retain"), rows)
    for found, solution in (
        (original, original_solution(problem)),
        (golden, golden_solution(problem)),
        (tuned, expected),
    ):
        torch.testing.assert_close(found, solution, rtol=1e-9, atol=1e-10)


def test_importances_of_the_answer_give_both_options():
    problem = draw_linear_problem(9, 7, d_retain=20, d_forget=14, d_overlap=6, seed=2)
    d = 40
    assert torch.equal(importance_mask(problem, 26 / d, of="retain"), feature_mask(problem, "retain_and_overlap"))
    assert torch.equal(importance_mask(problem, 20 / d, of="forget"), feature_mask(problem, "retain"))
    assert bool(importance_mask(problem, 1.0, of="retain").all())


@pytest.mark.parametrize("of", ["retain", "forget"])
def test_importances_of_the_loss_are_its_gradients_and_none_at_an_interpolant(of):
    problem = draw_linear_problem(9, 7, d_retain=20, d_forget=14, d_overlap=6, seed=2)
    x, y = (problem.x_retain, problem.y_retain) if of == "retain" else (problem.x_forget, problem.y_forget)
    weights = torch.linspace(-1, 1, 40, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(40, dtype=torch.float64)
    for column, label in zip(x.T, y, strict=True):
        (gradient,) = torch.autograd.grad((column @ weights - label).square(), weights)
        total += gradient.abs() / len(y)
    torch.testing.assert_close(feature_importance(problem, of, weights.detach()), total)
    assert int(importance_mask(problem, 0.25, of=of, weights=weights.detach()).sum()) == 10
    with pytest.raises(ValueError, match="leave `weights` out"):
        feature_importance(problem, of, original_solution(problem))


def test_shapes_at_the_limit_of_overparameterisation():
    problem = draw_linear_problem(9, 9, d_retain=1, d_forget=1, d_overlap=17, seed=5)
    for keep in OPTIONS:
        found = losses_of(masked_solution(problem, feature_mask(problem, keep), [0, 4]), problem)
        predicted = predicted_masked_losses(problem, keep, [0, 4])
        assert found.forget == pytest.approx(predicted.forget, rel=1e-5)
        assert found.retain == pytest.approx(predicted.retain, rel=1e-5, abs=1e-15)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"n_retain": 6, "n_forget": 2, "d_retain": 6, "d_forget": 9}, "`n_retain`"),
        ({"n_retain": 2, "n_forget": 9, "d_retain": 6, "d_forget": 9}, "`n_forget`"),
        ({"n_retain": 5, "n_forget": 5, "d_retain": 2, "d_forget": 2, "d_overlap": 6}, r"`n_retain \+ n_forget`"),
        ({"n_retain": 0, "n_forget": 2, "d_retain": 6, "d_forget": 9}, "`n_retain`"),
        ({"n_retain": 1, "n_forget": 2, "d_retain": -1, "d_forget": 9}, "`d_retain`"),
    ],
)
def test_a_problem_that_is_not_overparameterised_is_refused(sizes, name):
    with pytest.raises(ValueError, match=rf"^Expected {name} to be"):
        draw_linear_problem(**sizes)


def blocks(**changes):
    problem = draw_linear_problem(3, 2, d_retain=6, d_forget=5, d_overlap=4)
    names = ("retain_only", "overlap_retain", "overlap_forget", "forget_only", "w_retain", "w_overlap", "w_forget")
    return {name: getattr(problem, name) for name in names} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_retain": torch.zeros(7, dtype=torch.float64)}, r"`w_retain` to be of shape \(6,\)"),
        ({"overlap_forget": torch.zeros(3, 2, dtype=torch.float64)}, r"`overlap_forget` to be of shape \(4, 2\)"),
        ({"forget_only": torch.zeros(5, 2)}, "`forget_only` to be float64 with 2 dimensions"),
        ({"w_overlap": torch.zeros(4, 1, dtype=torch.float64)}, "`w_overlap` to be float64 with 1 dimension,"),
        (
            {"overlap_forget": torch.ones(4, 2).double(), "forget_only": torch.ones(5, 2).double()},
            "5 linearly independent columns, but got 'rank 4'",
        ),
    ],
)
def test_blocks_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LinearProblem(**blocks(**changes))


@pytest.mark.parametrize("rows", [[0, 0], [3], [-1]])
def test_rows_that_are_not_there_are_refused(rows):
    problem = LinearProblem(**blocks())
    for call in (
        lambda: fine_tuned_solution(problem, rows),
        lambda: predicted_masked_losses(problem, "retain", rows),
    ):
        with pytest.raises(ValueError, match="`rows`"):
            call()


def test_unknown_choices_are_refused():
    problem = LinearProblem(**blocks())
    for call, name in (
        (lambda: predicted_losses(problem, "best"), "`model`"),
        (lambda: feature_mask(problem, "overlap"), "`keep`"),
        (lambda: predicted_masked_losses(problem, "overlap"), "`keep`"),
        (lambda: feature_importance(problem, "test"), "`of`"),
        (lambda: importance_mask(problem, 0.0, of="retain"), "`keep`"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_nothing_to_fit_leaves_the_start_as_it_is():
    start = torch.arange(4, dtype=torch.float64)
    found = nearest_interpolant(torch.zeros(4, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), start)
    assert torch.equal(found, start)
