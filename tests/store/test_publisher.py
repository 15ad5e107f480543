import threading
import time

import pytest

from lightning_unlearn.store.publisher import Publisher


def publisher_threads():
    return [thread for thread in threading.enumerate() if thread.name == "store-publisher"]


@pytest.mark.parametrize("threaded", [False, True])
def test_everything_runs_once_in_order(threaded):
    done, publisher = [], Publisher(threaded)
    for number in range(20):
        publisher.submit(lambda number=number: done.append(number))
    publisher.run(lambda: done.append("here"))
    publisher.wait()
    assert done == [*range(20), "here"]
    assert not publisher_threads()


def test_one_is_under_way_and_the_next_one_waits():
    publisher, gate, started = Publisher(True), threading.Event(), threading.Event()
    running, most = [0], [0]

    def task():
        running[0] += 1
        most[0] = max(most[0], running[0])
        started.set()
        assert gate.wait(10)
        running[0] -= 1

    publisher.submit(task)
    assert started.wait(10)  # the caller goes on while it is under way
    second = threading.Thread(target=publisher.submit, args=(task,))
    second.start()
    time.sleep(0.05)
    assert second.is_alive()
    assert len(publisher_threads()) == 1
    gate.set()
    second.join(10)
    publisher.wait()
    assert most == [1]


@pytest.mark.parametrize("threaded", [False, True])
def test_nothing_follows_a_failure(threaded):
    publisher, done = Publisher(threaded), []

    def fail():
        raise OSError("no space")

    if threaded:
        publisher.submit(fail)
        publisher.settle()
    else:
        with pytest.raises(OSError, match="no space"):
            publisher.submit(fail)
    for call in (
        lambda: publisher.submit(lambda: done.append(1)),
        lambda: publisher.run(lambda: done.append(2)),
        publisher.wait,
        publisher.check,
    ):
        with pytest.raises(OSError, match="no space"):
            call()
    publisher.settle()
    assert done == []
    assert not publisher_threads()
