"""Flags of two processes: the same answer on both at the same batch, also where one of them fails."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from lightning_unlearn.callbacks.batch_agreement import BatchAgreement
from lightning_unlearn.exceptions import LightningUnlearnError

BATCHES = 6


def agreement_of(n_flags=2):
    strategy = SimpleNamespace(_timeout=None)
    trainer = SimpleNamespace(world_size=dist.get_world_size(), global_rank=dist.get_rank(), strategy=strategy)
    return BatchAgreement.of(trainer, n_flags)


def agreed_by_batch(raised):
    """What each batch ends with; `raised` says for each rank in which batch which flag gets which value."""
    number, flag, value = raised[dist.get_rank()]
    agreement, answers = agreement_of(), []
    flags = [0, 0]
    for batch in range(BATCHES):
        agreement.begin(flags)
        if batch == number:
            flags[flag] = value  # in the middle of the batch
        answers.append(agreement.end(flags))
    answers.append(agreement.now(flags))
    agreement.close()
    return answers


def test_what_comes_up_during_a_batch_is_known_to_both_at_the_end_of_the_next(gloo_pool):
    one, other = gloo_pool.run(agreed_by_batch, [(1, 0, 10), (3, 1, 15)])
    assert one == other
    assert one == [(0, 0), (0, 0), (10, 0), (10, 0), (10, 15), (10, 15), (10, 15)]


def uneven(error):
    """Rank 1 fails between two batches, rank 0 goes on; what each of them gets to know."""
    agreement = agreement_of()
    agreement.begin((0, 0))
    agreement.end((0, 0))
    if dist.get_rank() == 1:
        return agreement.fail(OSError(28, "full"))
    try:
        agreement.begin((0, 0))
        agreement.end((0, 0))
    except LightningUnlearnError as told:
        return str(told), agreement.fail(told if error is None else error)
    return None


def test_a_process_that_fails_is_heard_of_in_the_next_batch(gloo_pool):
    (told, first), own = gloo_pool.run(uneven, None)
    assert "process 1 that has failed" in told
    assert first == "Process 1 failed first: OSError(28, 'full')"
    assert own is None


def test_the_same_error_on_both_is_nobodys_fault(gloo_pool):
    (_, first), own = gloo_pool.run(uneven, OSError(28, "full"))
    assert (first, own) == (None, None)


def unfinished():
    """A batch that is left in its middle, and begun again."""
    agreement = agreement_of(1)
    agreement.begin((dist.get_rank(),))
    agreement.begin((2 * dist.get_rank(),))
    answer = agreement.end((0,))
    again = agreement.end((0,))
    agreement.close()
    return answer, again


def test_a_batch_that_does_not_end_counts_for_nothing(gloo_pool):
    assert gloo_pool.run(unfinished) == [((2,), (0,))] * 2


def test_one_process_agrees_with_itself_at_once():
    agreement = BatchAgreement.of(SimpleNamespace(world_size=1), 2)
    agreement.begin((0, 0))
    assert agreement.end((0, 7)) == (0, 7)
    assert agreement.now((3, 0)) == (3, 0)
    assert agreement.fail(ValueError()) is None
    agreement.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_nobody_is_waited_for_where_nobody_answers(gloo_pool, failing):
    told = gloo_pool.run(alone, failing)
    assert told[failing] is None


def alone(failing):
    """One rank fails while the other never looks again."""
    agreement = agreement_of()
    answer = agreement.fail(ValueError()) if dist.get_rank() == failing else None
    dist.barrier()
    agreement.close()
    return answer
