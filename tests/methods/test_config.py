"""Methods in files: every one there and back, exactly, and nothing else."""

import json
import math
import textwrap
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_unlearn.methods import (
    METHODS,
    BadTeacher,
    BoundaryExpanding,
    BoundaryShrink,
    DeltaGrad,
    FineTune,
    L1Sparse,
    NegGradPlus,
    PartialAmnesiac,
    PartialGradientAscent,
    PartialUpdates,
    Rewind,
    Scrub,
    SingleGradient,
    UnlearningMethod,
    load_method,
    save_method,
)
from lightning_unlearn.methods.config import as_method

NAMES = sorted(METHODS)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "method.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name, file):
    method = METHODS[name]()
    highest = {
        key: one.options[-1] if hasattr(one, "options") else one.high for key, one in method.search_space.items()
    }
    for one in (method, method.with_hyperparameters(**highest)):
        save_method(one, file, comment=f"{name} of a test.")
        loaded = load_method(file)
        assert type(loaded) is type(one)
        assert loaded.arguments == one.arguments
        assert loaded.settings == one.settings
    assert file.read_text().startswith(f"# {name} of a test.\nclass_path: lightning_unlearn.{name}\n")


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_everything(name, file):
    method = METHODS[name]()
    save_method(method, file)
    content = yaml.safe_load(file.read_text())
    assert set(content) == {"class_path", "init_args"}
    assert set(content["init_args"]) == set(method.arguments)


def test_others_read_the_file_as_we_do(file):
    method = L1Sparse(alpha=1e-5, lr_scale=1 / 3)
    save_method(method, file)
    parser = ArgumentParser()
    parser.add_argument("--method", type=UnlearningMethod)
    parsed = parser.parse_string("method:\n" + textwrap.indent(file.read_text(), "  ")).method
    assert parsed.class_path == "lightning_unlearn.L1Sparse"
    assert vars(parsed.init_args) == method.arguments


@pytest.mark.parametrize("alpha", [1e-5, 5e-4, 1e-300, 5e-324, 0.1, 1 / 3, 1e22, 123456789.123, 2.0])
def test_numbers_are_the_same(alpha, file):
    save_method(L1Sparse(alpha=alpha), file)
    loaded = load_method(file).alpha
    assert (type(loaded), loaded) == (float, alpha)
    assert yaml.safe_load(file.read_text())["init_args"]["alpha"] == alpha


@given(st.floats(0, allow_infinity=False, allow_nan=False), st.text())
def test_any_number_and_any_text(alpha, layer):
    for method in (L1Sparse(alpha=alpha), BoundaryExpanding(layer=layer)):
        path = "memory://test-config/any.yaml"
        save_method(method, path)
        assert load_method(path).settings == method.settings


@pytest.mark.parametrize(
    "layer", ["1e5", "1e-5", "null", "yes", "0x10", "12", "", "a: b", "# c", "- d", "2020-01-01", "ä"]
)
def test_text_stays_text(layer, file):
    save_method(BoundaryExpanding(layer=layer), file)
    assert load_method(file).layer == layer


def test_lists_mappings_and_kinds_of_numbers(file):
    class Layer(StrEnum):
        HEAD = "net.head"

    for method in (
        PartialAmnesiac(keep={"*.weight": 1e-5, "*": 0.5}, prune="sum"),
        BoundaryShrink(value_range=(0.0, 1.0), levels=255),
        DeltaGrad(lr=[0.1, 1e-5, 0.1]),
        Rewind(checkpoints=["a.ckpt", "b.ckpt"]),
        FineTune(max_epochs=2),
    ):
        save_method(method, file)
        assert load_method(file).settings == method.settings
    method = BoundaryExpanding(layer=Layer.HEAD)
    method.lr_scale = np.float64(0.25)
    save_method(method, file)
    loaded = load_method(file)
    assert (type(loaded.layer), loaded.layer, loaded.lr_scale) == (str, "net.head", 0.25)


def test_the_comment(file):
    save_method(Scrub(), file, comment="First.\n\nclass_path: other\tthing\n")
    assert file.read_text().startswith("# First.\n#\n# class_path: other")
    assert load_method(file).name == "Scrub"
    before = file.read_bytes()
    with pytest.raises(ValueError, match="lines of text"):
        save_method(FineTune(), file, comment="a\x00b")
    assert file.read_bytes() == before


def refused():
    infinite, beside = FineTune(), FineTune().with_updates(PartialUpdates(0.2))
    infinite.lr_scale = math.inf
    return [
        (FineTune(optimizer=torch.optim.SGD), "`optimizer`"),
        (BadTeacher(teacher_factory=torch.nn.Identity), "`teacher_factory`"),
        (SingleGradient(initial_weights={"w": torch.zeros(1)}), "initial_weights"),
        (DeltaGrad(lr=lambda step: 0.1), "`lr`"),
        (infinite, "`lr_scale` to be a finite"),
        (beside, "`updates`.*with_updates"),
        (PartialGradientAscent().with_updates(PartialUpdates(0.2)), "`updates`.*with_updates"),
    ]


@pytest.mark.parametrize(("method", "message"), refused())
def test_what_no_file_can_say_is_refused_before_anything_is_written(method, message, file):
    with pytest.raises(ValueError, match=message):
        save_method(method, file)
    assert not list(file.parent.iterdir())


def test_names_and_classes_that_would_not_be_found_again(tmp_path):
    class Unregistered(FineTune):
        """A method of a test."""

    with pytest.raises(ValueError, match="registered one, but got 'Unregistered'"):
        save_method(Unregistered(), tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="a YAML file"):
        save_method(FineTune(), tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    save_method(FineTune(max_steps=7), file)

    def full(*_):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("lightning_unlearn.utilities.files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_method(Scrub(), file)
    assert load_method(file).max_steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping with `class_path`"),
        ("- a", "a mapping with `class_path`"),
        ("init_args: {}", "a mapping with `class_path`"),
        ("class_path: 3", "a mapping with `class_path`"),
        ("class_path: [", "cannot be read"),
        ("class_path: Scrub\nclass_path: FineTune", "'class_path' is there twice"),
        ("class_path: Scrub\ninit_args: {alpha: 1, alpha: 2}", "'alpha' is there twice"),
        ("class_path: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("class_path: Scrub\nmore: 1", r"keys of .*'more'"),
        ("class_path: Scrub\ninit_args: [1]", "`init_args in .*a mapping"),
        ("class_path: Scrub\ninit_args: {strength: 1}", r"arguments of Scrub .*\['strength'\]"),
        ("class_path: Scrub\ninit_args: {max_steps: 1}", r"arguments of Scrub .*\['max_steps'\]"),
        ("class_path: Scrub\ninit_args: {alpha: much}", r"`alpha` .* See .*method.yaml"),
        ("class_path: Scrub\ninit_args: {alpha: .inf}", "`alpha` .*finite.* See .*method.yaml"),
        ("class_path: Scrub\ninit_args: {alpha: 2020-01-01}", "`alpha`.*number, text.*method.yaml"),
        ("class_path: Scrub\ninit_args: {alpha: &a [*a]}", "cannot be read: a reference"),
        ("class_path: BoundaryShrink\ninit_args: {value_range: 3}", "method.yaml"),
        ("class_path: Scrub\ninit_args: {msteps: 9}", "`msteps`"),
        ("class_path: os.path", "registered method, but got 'os.path'. Import the module"),
        ("class_path: a.Scrub.", "Import the module"),
    ],
)
def test_a_file_that_describes_no_method(text, message, file):
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_method(file)


def test_nothing_that_a_file_names_is_imported(tmp_path, monkeypatch, file):
    (tmp_path / "planted.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    file.write_text("class_path: planted.Method")
    with pytest.raises(ValueError, match="Import the module"):
        load_method(file)
    file.write_text("class_path: planted.Scrub")
    assert type(load_method(file)) is Scrub


def test_bytes_that_are_no_text(file):
    file.write_bytes(b"class_path: \xff")
    with pytest.raises(ValueError, match="cannot be read"):
        load_method(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_method(file.parent / "nowhere.yaml")


def test_written_by_hand(file):
    file.write_text("class_path: L1Sparse\ninit_args: {alpha: 1e-5, lr_scale: 2E-1, max_epochs: 3}\n")
    method = load_method(file)
    assert (method.alpha, method.lr_scale, method.max_steps, method.max_epochs) == (1e-5, 0.2, None, 3)
    file.write_text("class_path: FineTune\ninit_args:\n")
    assert load_method(file).settings == FineTune().settings


def test_what_a_method_may_be_given_as(tmp_path):
    method = NegGradPlus()
    assert as_method(method) is method
    assert as_method("neg-grad-plus").settings == method.settings
    content = {"class_path": "lightning_unlearn.L1Sparse", "init_args": {"alpha": 1e-5}}
    for name in ("a.json", "a.yaml", "a.YML", "a.txt"):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        assert as_method(path).alpha == 1e-5
        if name != "a.txt":
            assert as_method(str(path)).alpha == 1e-5
    with pytest.raises(ValueError, match="one of Amnesiac"):
        as_method(str(Path(tmp_path) / "a.txt"))
    with pytest.raises(FileNotFoundError, match=r"b\.yaml"):
        as_method("b.yaml")
    with pytest.raises(TypeError, match="an instance of the class"):
        as_method(NegGradPlus)
