"""`lightning-unlearn plan-recording`, as a user meets it."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_unlearn.cli import main
from lightning_unlearn.commands.shapes import frozen_but, read_shapes
from tests.helpers.recorded import XYClassifier

MODEL = "tests.helpers.recorded:XYClassifier"


def plan(capsys, *arguments):
    main(["plan-recording", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_table_for_people(capsys):
    main(["plan-recording", MODEL, "--samples", "64", "--epochs", "3", "--batch-size", "8", "--step-seconds", "0.01"])
    out = capsys.readouterr().out
    for said in ("size of the store", "share of a step", "24 of them with their delta", "What to set", "by default"):
        assert said in out


def test_numbers_for_machines(capsys):
    found = plan(capsys, MODEL, "--batch_size=8", "--steps", "24", "--keep", "1.0", "--dtype", "float32")
    trained = [one for name, one in XYClassifier().named_parameters() if not name.startswith("fixed")]
    assert found["trained"] == found["kept"] == sum(one.numel() for one in trained)
    assert found["bytes"]["values"] == 24 * 4 * found["kept"]
    assert found["bytes"]["total"] == pytest.approx(sum(found["bytes"][part] for part in PARTS))
    assert found["touched_share"] is None
    assert found["settings"]["keep"] == 1.0


PARTS = ("positions", "values", "entries", "ids", "columns", "initial", "anchors")


def test_a_model_of_any_size_takes_no_memory(capsys):
    model = ["torch.nn:Linear", "--model-args", '{"in_features": 1000000, "out_features": 1000000}']
    found = plan(capsys, *model, "--steps", "1", "--batch-size", "1")
    assert found["parameters"] == 10**12 + 10**6
    assert plan(capsys, "torch.nn.Linear", *model[1:], "--steps", "1", "--batch-size", "1") == found


def test_patterns(capsys):
    common = [MODEL, "--steps", "10", "--batch-size", "4"]
    found = plan(capsys, *common, "--keep", '{"*.bias": 1.0, "*": 0.5}')
    assert found["settings"]["keep_overrides"] == {"*.bias": 1.0}
    head = plan(capsys, *common, "--trainable", "net.3.*")
    assert head["trained"] == 16 * 3 + 3
    both = plan(capsys, *common, "--trainable", '["net.3.bias", "net.0.bias"]')
    assert both["trained"] == 16 + 3
    few = plan(capsys, *common, "--trainable", "net.3.bias")
    assert (few["settings"]["keep"], few["settings"]["value_dtype"]) == (1.0, "float32")
    assert few["bytes"]["initial"] < head["bytes"]["initial"]


def test_a_checkpoint_says_the_same(tmp_path, capsys):
    model = XYClassifier()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "last.ckpt")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    common = ["--steps", "10", "--batch-size", "4", "--trainable", "net.*"]
    expected = plan(capsys, MODEL, *common)
    for name in ("last.ckpt", "plain.pt", "weights.safetensors"):
        found = plan(capsys, str(tmp_path / name), *common)
        assert all(found[one] == expected[one] for one in ("parameters", "trained", "kept", "bytes", "memory")), name


def test_sharded_on_an_accelerator(capsys):
    found = plan(
        capsys, MODEL, "--steps", "10", "--batch-size", "4", "--ranks", "2", "--sharded", "--device", "cuda"
    )  # fmt: skip
    assert found["network_bytes"] > 0
    assert found["memory"]["device"] > 0
    assert sum("assumed, not measured" in line for line in found["assumptions"]) == 2
    assert any("not checked" in line for line in found["assumptions"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([MODEL, "--steps", "1"], "`batch_size`"),
        ([MODEL, "--batch-size", "1"], "`steps`"),
        ([MODEL, "--batch-size", "1", "--steps", "1", "--epochs", "2"], "`steps`"),
        (["nowhere.to:be", "--batch-size", "1", "--steps", "1"], "`model`"),
        (["runs/last.ckpt", "--batch-size", "1", "--steps", "1"], "`model`"),
        (["torch.nn:Linear", "--batch-size", "1", "--steps", "1"], "meta device"),
        (["torch.nn:relu", "--batch-size", "1", "--steps", "1"], "`model`"),
        (["math:sqrt", "--model-args", "{}", "--batch-size", "1", "--steps", "1"], "`model`"),
        ([MODEL, "--batch-size", "1", "--steps", "1", "--trainable", "nobody"], "`trainable`"),
        ([MODEL, "--batch-size", "1", "--steps", "1", "--keep", "0.0"], "`keep`"),
    ],
)
def test_errors_are_one_sentence(capsys, arguments, said):
    with pytest.raises(SystemExit, match="1"):
        main(["plan-recording", *arguments])
    message = " ".join(capsys.readouterr().err.split())
    assert said in message
    assert "Expected" in message


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    torch.save({"epoch": 1}, tmp_path / "empty.ckpt")
    for name in ("broken.safetensors", "broken.ckpt", "empty.ckpt"):
        with pytest.raises(ValueError, match="Expected `model`"):
            read_shapes(str(tmp_path / name))


def test_a_module_that_is_there_already():
    signature, frozen = read_shapes("tests.test_cli_recording:READY")
    assert [layer.shape for layer in signature.layers] == [(1, 2), (1,)]
    assert frozen == {"bias"}
    assert frozen_but(signature, ["*"]) == frozenset()


READY = nn.Linear(2, 1)
READY.bias.requires_grad_(False)
