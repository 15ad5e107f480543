"""Selection over pieces on several processes against a sort of the whole."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.functional.shard_selection import Alone, NotFiniteError, select_shards


class Together:
    """Reductions of several threads that stand for processes."""

    def __init__(self, n):
        self.n, self.given, self.calls = n, [None] * n, 0
        self.barrier = threading.Barrier(n, timeout=30)

    def of(self, rank):
        return Member(self, rank)

    def exchange(self, rank, values):
        self.given[rank] = values
        self.barrier.wait()
        everyone = list(self.given)
        self.barrier.wait()
        self.calls += rank == 0
        return everyone


class Member:
    def __init__(self, together, rank):
        self.together, self.rank = together, rank

    def total(self, values):
        return torch.stack(self.together.exchange(self.rank, values)).sum(0).to(values.dtype)

    def before(self, values):
        return sum(self.together.exchange(self.rank, values)[: self.rank], torch.zeros_like(values))


def by_sorting(whole, k):
    """The k largest magnitudes, the first of equal ones, never a zero."""
    order = sorted(range(len(whole)), key=lambda i: (-abs(whole[i]), i))
    return sorted(i for i in order[:k] if whole[i] != 0)


def select_on(n, rows, kept):
    """Chosen places of whole rows that are cut into runs for `n` threads, or the errors."""
    together, answers = Together(n), [None] * n
    cuts = [torch.tensor_split(row, n) for row in rows]

    def run(rank):
        try:
            answers[rank] = select_shards([[cut[rank]] for cut in cuts], kept, together.of(rank))
        except ValueError as error:
            answers[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(isinstance(answer, ValueError) for answer in answers):
        return answers, together.calls
    starts = [[0, *torch.tensor([len(part) for part in cut]).cumsum(0).tolist()] for cut in cuts]
    chosen = [
        [
            start + place
            for rank, start in zip(range(n), starts[row], strict=False)
            for place in answers[rank][row][0].tolist()
        ]
        for row in range(len(rows))
    ]
    return chosen, together.calls


FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-45, 3.4e38]),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.lists(FLOATS, min_size=1, max_size=40), st.floats(0.01, 1.0)), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_pieces_are_selected_from_as_the_whole_is(rows, n):
    wholes = [torch.tensor(values, dtype=torch.float32) for values, _ in rows]
    kept = [max(1, int(len(values) * share)) for values, share in rows]
    chosen, _ = select_on(n, wholes, kept)
    assert chosen == [by_sorting(whole.tolist(), k) for whole, k in zip(wholes, kept, strict=True)]


@pytest.mark.parametrize("kind", ["gaussian", "few values", "mostly zero", "sorted"])
def test_large_layers(kind):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50_001, generator=generator) * 1e-3
    if kind == "few values":
        values = (values * 1e3).round() * 1e-3
    elif kind == "mostly zero":
        values *= torch.rand(len(values), generator=generator) < 0.02
    elif kind == "sorted":
        values = values.sort().values
    (chosen,), calls = select_on(3, [values], [5_001])
    assert chosen == by_sorting(values.tolist(), 5_001)
    assert calls == (4 if kind == "few values" else 3)  # who has how many is asked where there are too many


def test_all_are_told_where_one_holds_what_is_not_finite():
    rows = [torch.ones(6), torch.tensor([0.0, 1.0, 2.0, float("nan"), 1.0, 2.0])]
    answers, _ = select_on(3, rows, [1, 1])
    assert [(type(answer), answer.row) for answer in answers] == [(NotFiniteError, 1)] * 3
    assert "row 1 is not" in str(answers[0])


def test_a_process_without_any_piece_takes_part():
    assert select_shards([[]], [3], Alone()) == [[]]


def test_several_pieces_of_one_process_are_one_row():
    one, other = torch.tensor([1.0, 5.0]), torch.tensor([5.0, 5.0, 2.0])
    ((first, second),) = select_shards([[one, other]], [2], Alone())
    assert (first.tolist(), second.tolist()) == ([1], [0])


def test_counts_of_very_large_layers_are_wide():
    class Watching(Alone):
        def total(self, values):
            seen.append(values.dtype)
            return values

    seen = []
    select_shards([[torch.ones(3)]], [1], Watching(), numel=1 << 31)
    select_shards([[torch.ones(3)]], [1], Watching())
    assert seen == [torch.int64] * 3 + [torch.int32] * 3
