"""Which batches belong to which optimizer's step."""

from lightning_unlearn.callbacks.pending_ids import PendingIds


def test_each_optimizer_takes_what_came_since_its_own_last_step():
    pending = PendingIds(2)
    pending.add([1, 2])
    assert pending.take(0) == [1, 2]
    pending.add([3])
    assert pending.take(1) == [1, 2, 3]
    assert pending.take(0) == [3]


def test_a_second_step_on_a_batch_belongs_to_it_and_a_step_before_any_batch_to_nobody():
    pending = PendingIds(1)
    assert pending.take(0) == []
    pending.add(["a"])
    assert [pending.take(0), pending.take(0)] == [["a"], ["a"]]
    pending.add(["b"])
    assert pending.take(0) == ["b"]
