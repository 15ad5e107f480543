"""Creating a store: of two attempts one succeeds; frozen parameters are left out, and come in when they are trained."""

import contextlib

import pytest
import torch
from safetensors.torch import load_file

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import DataFingerprint, RecordingSettings
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.parameters import float_buffers, model_signature, parameter_distance, weights_digest
from tests.helpers.stores import Killed, Killer, Plain, Steps, make_store


def with_frozen(url, module, *frozen):
    tensors = {**dict(module.named_parameters()), **float_buffers(module)}
    return DeltaStore.create(
        url,
        signature=model_signature(module),
        settings=RecordingSettings(0.1),
        data=DataFingerprint("key", 20),
        initial={name: tensor for name, tensor in tensors.items() if name not in frozen},
        frozen={name: tensors[name] for name in frozen},
    )


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("moment", ["initial", "lineage", "store"])
def test_of_two_creations_at_the_same_moment_one_succeeds_and_is_whole(tmp_path, monkeypatch, place, moment):
    """The second one begins and ends just as the first is about to publish one of its files."""
    url = str(tmp_path / "s") if place == "local" else f"memory://{tmp_path.name}-{moment}"
    other = Plain()
    with torch.no_grad():
        other.a += 1
    publish, made = Files.publish, []

    def interrupted(files, name, *args, **kwargs):
        if name.startswith(moment) and not made:
            made.append(None)
            made[0] = make_store(url, module=other)
        publish(files, name, *args, **kwargs)

    monkeypatch.setattr(Files, "publish", interrupted)
    with pytest.raises(StoreMismatchError, match="written by one process"):
        make_store(url)
    monkeypatch.undo()
    store = DeltaStore.open(url)
    assert store.store_id == made[0].store_id
    assert torch.equal(store.initial_weights()["a"], other.a.detach())
    assert store.state_of(weights_digest(other)) is not None
    report = store.verify()
    assert report.ok
    assert report.orphans == ()


def test_a_creation_that_is_killed_anywhere_leaves_no_store_or_a_whole_one(tmp_path, monkeypatch):
    survive, whole = 0, 0
    while True:
        url = tmp_path / str(survive)
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            with contextlib.suppress(Killed):
                make_store(url)
        if DeltaStore.exists(url):
            whole += 1
            assert DeltaStore.open(url).verify().ok
        else:
            store = make_store(url)
            assert store.verify().ok
        if not killer.struck:
            break
        survive += 1
    assert survive > 8
    assert whole >= 2


def test_frozen_parameters_are_not_written_and_not_missed(tmp_path):
    module = Plain()
    store = with_frozen(tmp_path / "s", module, "a", "c")
    assert set(load_file(tmp_path / "s" / store.initial_file)) == {"b", "d", "mean"}
    assert set(store.initial_weights()) == {"b", "d", "mean"}
    assert store.state_of(weights_digest(module)) is not None
    store.check_frozen(module)
    with torch.no_grad():
        module.b += 3.0
    # What is not there has not changed.
    assert parameter_distance(module, store.initial_weights()) == pytest.approx((9.0 * 8) ** 0.5)
    with torch.no_grad():
        module.c[0, 0, 0] += 1e-6
    with pytest.raises(StoreMismatchError, match="other values of 'c'"):
        store.check_frozen(module)
    store.check_frozen(module, known={"c"})
    del module.c
    with pytest.raises(StoreMismatchError, match="other values of 'c'"):
        store.check_frozen(module)


def test_values_are_added_once_and_only_as_they_were(tmp_path):
    module = Plain()
    url = tmp_path / "s"
    store = with_frozen(url, module, "a", "c")
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with pytest.raises(StoreMismatchError, match="other values of 'a'"):
        store.add_initial({"a": start["a"] + 1e-6})
    with pytest.raises(StoreMismatchError, match="other values of 'z'"):
        store.add_initial({"z": start["a"]})
    assert set(DeltaStore.open(url).initial_weights()) == {"b", "d", "mean"}
    store.add_initial({"a": start["a"], "b": start["b"]})
    files = set(url.iterdir())
    store.add_initial({"a": start["a"]})
    assert set(url.iterdir()) == files
    for one in (store, DeltaStore.open(url)):
        weights = one.initial_weights()
        assert same({name: weights[name] for name in ("a", "b", "d")}, {name: start[name] for name in ("a", "b", "d")})
        assert "c" not in weights
    store.add_initial({"c": start["c"]})
    assert DeltaStore.open(url).initial_weights().keys() == {"a", "b", "c", "d", "mean"}
    report = store.verify()
    assert report.ok
    assert report.orphans == ()
    (name, _), _ = store.lineage.initial
    (url / name).write_bytes((url / name).read_bytes()[:-1])
    assert [damage.file for damage in store.verify().damages] == [name]
    with pytest.raises(StoreCorruptedError, match=name):
        store.initial_weights()


def test_adding_values_is_all_or_nothing(tmp_path, monkeypatch):
    module, survive = Plain(), 0
    while True:
        url = tmp_path / str(survive)
        store = with_frozen(url, module, "a")
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            with contextlib.suppress(Killed):
                store.add_initial({"a": module.a})
        reopened = DeltaStore.open(url)
        assert reopened.verify().ok
        assert ("a" in reopened.initial_weights()) in ((True, False) if killer.struck else (True,))
        reopened.add_initial({"a": module.a})
        assert torch.equal(DeltaStore.open(url).initial_weights()["a"], module.a.detach())
        if not killer.struck:
            break
        survive += 1
    assert survive > 4


def test_a_discarded_store_leaves_none_of_its_files(tmp_path):
    module = Plain()
    store = with_frozen(tmp_path / "s", module, "a")
    store.add_initial({"a": module.a})
    store.discard_empty()
    assert not DeltaStore.exists(tmp_path / "s")
    left = [path.name for path in (tmp_path / "s").iterdir() if path.is_file()]
    assert not [name for name in left if not name.endswith(".lock")]
    with make_store(tmp_path / "s").writer() as writer:
        Steps().fill(writer, 1)
    assert DeltaStore.open(tmp_path / "s").n_steps == 1
