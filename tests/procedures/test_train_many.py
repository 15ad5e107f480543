"""Many trainings: the same results as a plain loop, none lost and none repeated, whatever ends the process."""

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.exceptions import (
    MissingRequirementError,
    StoreCorruptedError,
    TrainingFailedError,
)
from lightning_unlearn.functional.klom import klom
from lightning_unlearn.procedures.member_files import MemberFiles
from lightning_unlearn.procedures.train_many import _key, train_many
from tests.helpers.members import Inline, noted, train_module, train_net, train_slowly
from tests.helpers.stores import Killed, Killer, tensor_span

inline = partial(train_many, executor=Inline(), progress=False)


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def plain_loop(task, members, keys):
    """The task, called one member after the other with the seed that a key stands for."""
    results = []
    for member, key in zip(members, keys, strict=True):
        seed = int(key[:8], 16)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        results.append(task(member))
    return results


def test_two_processes_give_what_a_plain_loop_gives(tmp_path, capfd):
    runs = train_many(train_net, range(5), folder=tmp_path, workers=2)
    assert len(runs) == 5
    assert runs.trained == runs.keys
    assert len(set(runs.keys)) == 5
    loop = plain_loop(train_net, runs.members, runs.keys)
    assert all(same(one, other) for one, other in zip(runs, loop, strict=True))
    assert not same(loop[0], loop[1])
    assert same(runs.load(3), loop[3])
    assert all(0 < seconds < 60 for seconds in runs.seconds)
    assert "5/5" in capfd.readouterr().err
    assert sorted(os.listdir(tmp_path)) == sorted(f"{key}.safetensors" for key in runs.keys)


def test_a_lightning_module_is_kept_as_its_state(tmp_path):
    runs = inline(train_module, [4, 5], folder=tmp_path)
    expected = train_module(4)
    state = runs.load(4)
    assert same(state, dict(expected.state_dict()))
    assert not same(state, runs.load(5))
    fresh = train_module(5)
    fresh.load_state_dict(state)
    assert same(dict(fresh.state_dict()), dict(expected.state_dict()))


def test_what_is_there_is_not_trained_again(tmp_path):
    task = partial(train_net, log=str(tmp_path / "log"))
    first = inline(task, [0, 1], folder=tmp_path / "runs")
    more = inline(task, [2, 1, 0, 3], folder=tmp_path / "runs")
    assert noted(tmp_path / "log") == [0, 1, 2, 3]
    assert [more.members[more.keys.index(key)] for key in more.trained] == [2, 3]
    assert same(more.load(1), first.load(1))
    assert more.seconds[2] == first.seconds[0]
    assert inline(task, [0, 1], folder=tmp_path / "runs").trained == ()


def test_other_arguments_and_versions_are_other_members(tmp_path):
    def keys(task=train_net, **options):
        return inline(task, [0], folder=tmp_path, **options).keys[0]

    found = [
        keys(),
        keys(version="2"),
        keys(name="other"),
        keys(train_module),
        keys(partial(train_net, broken=[7])),
        keys(partial(train_net, broken=[8])),
    ]
    assert len(set(found)) == len(found)
    assert keys(partial(train_net, broken=(7,))) == found[4]
    assert len(os.listdir(tmp_path)) == len(found)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())), st.integers())
def test_keys_say_what_was_asked_and_not_in_which_order(member, number):
    about = {"task": "t", "arguments": [[], {}], "version": "1"}
    backwards = dict(reversed(member.items()))
    assert _key(about, member) == _key(dict(reversed(about.items())), backwards)
    assert _key(about, member) != _key(about, {**member, "more": number})
    assert _key(about, [member, number]) != _key(about, [member, number + 1])
    assert _key(about, 1) != _key(about, True) != _key(about, "1")


def test_groups_of_models_are_what_metrics_compare(tmp_path):
    """Two versions of one task are two groups of one distribution."""
    first, second = (inline(train_net, range(60), folder=tmp_path, version=one) for one in ("a", "b"))
    unlearned, retrained = (torch.stack([one["margins"] for one in runs]) for runs in (first, second))
    assert unlearned.shape == (60, 5)
    assert 0.05 < klom(unlearned, retrained).mean() < 1.5
    assert klom(unlearned + 9, retrained).mean() > 8


def test_the_callers_random_state_stays(tmp_path):
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    inline(train_net, [0], folder=tmp_path)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_one_failure_is_told_after_the_others_are_finished(tmp_path):
    log = str(tmp_path / "log")
    with pytest.raises(TrainingFailedError, match=r"member 1 .*boom 1.*member 3 .*boom 3") as caught:
        inline(partial(train_net, log=log, broken=[1, 3]), range(5), folder=tmp_path / "runs")
    assert noted(log) == [0, 1, 2, 3, 4]
    about = {"task": "tests.helpers.members.train_net", "version": "1"}
    about["arguments"] = [[], {"log": log, "broken": [1, 3]}]
    keys = [_key(about, member) for member in range(5)]
    assert set(caught.value.failures) == {keys[1], keys[3]}
    assert keys[1] in str(caught.value)
    assert str(caught.value.__cause__) == "boom 1"
    assert pickle.loads(pickle.dumps(caught.value)).failures.keys() == caught.value.failures.keys()  # noqa: S301
    assert MemberFiles(tmp_path / "runs").keys() == {keys[0], keys[2], keys[4]}


def test_or_at_once(tmp_path):
    log, gate = str(tmp_path / "log"), tmp_path / "gate"
    task = partial(train_net, log=log, broken=[0])
    with ThreadPoolExecutor(1) as pool:
        blocker = pool.submit(train_slowly, 3, log, str(gate))  # until all members are submitted
        threading.Timer(0.3, gate.touch).start()
        with pytest.raises(TrainingFailedError, match="1 that failed"):
            train_many(task, range(40), folder=tmp_path / "runs", executor=pool, stop_on_error=True, progress=False)
    assert blocker.done()
    begun = noted(log)[1:]
    assert begun[0] == 0
    assert len(begun) < 40, "members that had not begun are not begun any more"


def test_a_pool_that_is_broken_is_told_by_member(tmp_path):
    class Broken(Inline):
        def submit(self, function, /, *args, **kwargs):
            from concurrent.futures.process import BrokenProcessPool

            raise BrokenProcessPool("a worker is gone")

    with pytest.raises(TrainingFailedError, match=r"member 0 .*a worker is gone"):
        train_many(train_net, range(2), folder=tmp_path, executor=Broken(), progress=False)


def wait_until(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def begun_script(tmp_path):
    """A process of its own with two workers; returns when three members are finished and two more have begun."""
    paths = [str(tmp_path / name) for name in ("runs", "log", "gate")]
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.helpers.members", *paths]
    script = subprocess.Popen(command, cwd=root, start_new_session=True)  # noqa: S603
    wait_until(lambda: len(MemberFiles(paths[0]).keys()) >= 3 and len(noted(paths[1])) == 5)
    return script, paths


def worker_pids(log):
    return {int(line.split()[1]) for line in Path(log).read_text().splitlines()}


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize(
    "whole_group",
    [pytest.param(True, id="all processes"), pytest.param(False, id="the parent alone", marks=pytest.mark.slow)],
)
def test_killed_in_the_middle_nothing_is_lost_or_repeated(tmp_path, whole_group):
    script, (runs, log, gate) = begun_script(tmp_path)
    try:
        assert script.poll() is None
        if whole_group:
            os.killpg(script.pid, signal.SIGKILL)
        else:
            os.kill(script.pid, signal.SIGKILL)
        assert script.wait(30) == -signal.SIGKILL
        wait_until(lambda: not any(map(is_running, worker_pids(log))), 30)
    finally:
        if any(map(is_running, worker_pids(log))):
            os.killpg(script.pid, signal.SIGKILL)
    finished = MemberFiles(runs).keys()
    assert len(finished) == 3
    assert sorted(noted(log)) == [0, 1, 2, 3, 4]
    Path(gate).touch()
    # The name is that of the script, which `-m` runs as `__main__`.
    task = partial(train_slowly, log=log, gate=gate)
    resumed = inline(task, range(6), folder=runs, name="members.train_slowly")
    assert finished < set(resumed.keys)
    assert set(resumed.trained) == set(resumed.keys) - finished
    assert sorted(noted(log)) == [0, 1, 2, 3, 3, 4, 4, 5], "finished members are not repeated"
    loop = plain_loop(train_net, resumed.members, resumed.keys)
    assert all(same(one, other) for one, other in zip(resumed, loop, strict=True))


def test_killed_at_every_write_and_resumed(tmp_path, monkeypatch):
    expected = list(inline(train_net, range(3), folder=tmp_path / "whole"))
    for survive in range(1000):
        folder = tmp_path / f"killed-{survive}"
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            try:
                inline(train_net, range(3), folder=folder)
            except Killed:
                assert killer.struck
        before = MemberFiles(folder).keys()
        resumed = inline(train_net, range(3), folder=folder)
        assert set(resumed.trained) == set(resumed.keys) - before
        assert all(same(one, other) for one, other in zip(resumed, expected, strict=True))
        left = {name for name in os.listdir(folder) if name.startswith(".tmp-")}
        assert not {name for name in left if not any(key in name for key in before)}, "no torn file is left"
        if not killer.struck:
            break
    assert not killer.struck
    assert survive > 6


def test_two_runs_share_the_members(tmp_path):
    log, gate = str(tmp_path / "log"), tmp_path / "gate"
    task = partial(train_slowly, log=log, gate=str(gate))
    found = {}

    def run(name):
        with ThreadPoolExecutor(2) as pool:
            found[name] = train_many(task, range(8), folder=tmp_path / "runs", executor=pool, progress=False)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(noted(log)) >= 6)
    gate.touch()
    for thread in threads:
        thread.join(60)
    assert sorted(noted(log)) == list(range(8)), "each is trained once, by one of the two"
    assert not set(found["a"].trained) & set(found["b"].trained)
    assert {*found["a"].trained, *found["b"].trained} == set(found["a"].keys)
    assert all(same(one, other) for one, other in zip(found["a"], found["b"], strict=True))
    assert [one["seed"] for one in found["a"]] == list(range(8))
    assert sorted(os.listdir(tmp_path / "runs")) == sorted(f"{key}.safetensors" for key in found["a"].keys)


def test_the_first_result_counts(tmp_path):
    files = MemberFiles(tmp_path)
    files.save("0" * 32, {"seconds": 1.0}, {"a": torch.ones(2)})
    files.save("0" * 32, {"seconds": 2.0}, {"a": torch.zeros(2)})
    assert files.about("0" * 32)["seconds"] == 1.0
    assert same(files.load("0" * 32), {"a": torch.ones(2)})
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")]


def test_results_of_every_kind_come_back(tmp_path):
    tied = torch.arange(6.0).view(2, 3).T
    given = {
        "tied": [tied, tied],
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True]),
        1: (None, "a", float("inf")),
    }
    back = inline(lambda member: given, ["x"], folder=tmp_path, name="kinds").load("x")
    assert same(back["tied"][0], tied)
    assert same(back["tied"][1], tied)
    assert back["half"].dtype == torch.bfloat16
    assert back["empty"].shape == (0, 3)
    assert back["mask"].tolist() == [True]
    assert back[1] == (None, "a", float("inf"))


def test_members_may_be_plain_data_of_any_kind(tmp_path):
    members = [{"seed": 1, "lr": 0.5}, (1, "a"), "text", 0.5, None]
    runs = inline(lambda member: {"got": repr(member)}, members, folder=tmp_path, name="echo")
    assert [one["got"] for one in runs] == list(map(repr, members))
    assert runs.load({"lr": 0.5, "seed": 1})["got"] == repr(members[0])
    with pytest.raises(ValueError, match="`member` to be one of"):
        runs.load("other")


@pytest.mark.parametrize("damage", ["tensor", "header", "cut"])
def test_damage_is_named(tmp_path, damage):
    runs = inline(train_net, [0, 1], folder=tmp_path)
    path = tmp_path / f"{runs.keys[1]}.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "tensor":
        content[tensor_span(path, "result/margins")[0]] ^= 1
    if damage == "header":
        content[content.index(b"seconds")] ^= 1
    path.write_bytes(content[: len(content) // 3] if damage == "cut" else content)
    with pytest.raises(StoreCorruptedError, match=rf"{runs.keys[1]}.*Delete the file"):
        runs.load(1)
    assert runs.load(0)["seed"] == 0
    path.unlink()
    assert inline(train_net, [0, 1], folder=tmp_path).trained == (runs.keys[1],)


class Elsewhere(Inline):
    """Workers whose folder is not the caller's."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        future.set_result("trained")
        return future


class Task:
    def __call__(self, member):
        return {}


@pytest.mark.parametrize(
    ("task", "members", "options", "error", "match"),
    [
        (train_net, [1, 2, 1], {}, ValueError, "different values"),
        (train_net, [torch.tensor(1)], {}, ValueError, "plain data"),
        (train_net, [float("nan")], {}, ValueError, "plain data"),
        (partial(train_net, log=Path("log")), [1], {}, ValueError, "plain data"),
        (train_net, [1], {"workers": 2, "executor": Inline()}, ValueError, "at most one"),
        (train_net, [1], {"executor": None, "workers": 0}, ValueError, "workers"),
        (lambda member: {}, [1], {}, MissingRequirementError, "Give it a `name`"),
        (Task(), [1], {}, MissingRequirementError, "Give it a `name`"),
        (Task().__call__, [1], {}, MissingRequirementError, "Give it a `name`"),
        (train_net, [1], {"executor": Elsewhere()}, MissingRequirementError, "all workers reach"),
    ],
)
def test_refuses(tmp_path, task, members, options, error, match):
    with pytest.raises(error, match=match):
        train_many(task, members, folder=tmp_path, progress=False, **{"executor": Inline(), **options})
    assert not os.listdir(tmp_path)


def test_a_result_that_cannot_be_kept_is_a_failure(tmp_path):
    with pytest.raises(TrainingFailedError, match=r"TypeError.*Leave it out"):
        inline(lambda member: {"model": object()}, [1], folder=tmp_path, name="odd")
    assert not MemberFiles(tmp_path).keys()
