"""`lightning-unlearn tune` and `unlearn`, from the checkpoint to the forgotten model."""

import json
import warnings

import pytest
import torch
from torch.distributed.checkpoint import save

from lightning_unlearn.api import unlearn
from lightning_unlearn.cli import main
from lightning_unlearn.commands.inputs import read_ids
from lightning_unlearn.procedures.outcome import save_checkpoint
from tests.tuning.blobs import FORGET, TRAINER, Blobs, Linear, trained

CLASSES = ["--model", "tests.tuning.blobs.Linear", "--data", "tests.tuning.blobs.Blobs"]
REPAIR = "class_path: FineTune\ninit_args: {max_steps: 3}\n"


class BrokenBlobs(Blobs):
    def train_dataloader(self):
        raise ValueError("a mistake of the user's")


def key(position):
    return f"row-{position}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "last.ckpt"
    save_checkpoint(trained(), path)
    return path


@pytest.fixture
def given(checkpoint, tmp_path, monkeypatch):
    """The arguments of both commands, as flags; runs write into a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forget.txt").write_text("\n".join(map(str, FORGET)))
    (tmp_path / "repair.yaml").write_text(REPAIR)
    return [*CLASSES, "--checkpoint", str(checkpoint), "--forget", "forget.txt", "--trainer.accelerator", "cpu"]


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    return said


def test_from_a_config_to_a_forgotten_model(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tune.yaml").write_text(
        "model:\n  class_path: tests.tuning.blobs.Linear\ndata:\n"
        "  class_path: tests.tuning.blobs.Blobs\n  init_args: {}\n"
        f"checkpoint: {checkpoint}\nforget: {FORGET}\nmethods: [l1-sparse, neg-grad-plus]\ngoal: bias_removal\n"
        "lambda_: 0.6\ntrials: 3\ntrainer:\n  accelerator: cpu\noutput: out\n"
    )
    main(["tune", "--config", "tune.yaml"])
    said = " ".join(capsys.readouterr().out.split())
    assert "3/3" in said
    for part in ("chosen", "L1Sparse, defaults", "NegGradPlus, defaults", "goal error", "on test data"):
        assert part in said
    first = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert [trial["label"] for trial in first["trials"]][:2] == ["L1Sparse", "NegGradPlus"]
    assert first["objective"] == {"goal": "bias_removal", "lambda_": 0.6, "utility": "absolute"}
    best = min(first["trials"], key=lambda trial: (trial["value"], trial["rates"]["validation"], trial["number"]))
    assert first["best"] == best["number"]
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 5000

    main(["tune", "--config", "tune.yaml", "--trials", "4"])  # a flag wins over the file
    capsys.readouterr()
    second = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert second["trials"][:3] == first["trials"]
    assert len(second["trials"]) == 4

    shared = ["--checkpoint", str(checkpoint), "--forget", str(FORGET), "--trainer.accelerator", "cpu", "--seed", "0"]
    call = ["unlearn", *CLASSES, *shared, "--method", "out/tuned.yaml", "--output", "forgotten.ckpt"]
    main(call)
    said = " ".join(capsys.readouterr().out.split())
    assert "Still holding the samples: - optimizer state" in said
    assert "forgotten.ckpt holds the forgotten model" in said
    loaded = Linear.load_from_checkpoint(tmp_path / "forgotten.ckpt", weights_only=True)
    direct = unlearn(trained(), FORGET, method="out/tuned.yaml", data=Blobs(), trainer=TRAINER, seed=0).model
    for one, other in zip(loaded.parameters(), direct.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "'forgotten.ckpt'. Name another, or add --overwrite." in refused(call, capsys)


def test_the_weights_may_be_a_folder_of_shards(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group
        save({"state_dict": trained().state_dict()}, checkpoint_id="shards")
    shared = ["--forget", str(FORGET), "--trainer.accelerator", "cpu", "--seed", "0", "--method", "fine-tune"]
    main(["unlearn", *CLASSES, *shared, "--checkpoint", "shards", "--output", "forgotten.ckpt"])
    assert "forgotten.ckpt holds the forgotten model" in " ".join(capsys.readouterr().out.split())
    loaded = Linear.load_from_checkpoint(tmp_path / "forgotten.ckpt", weights_only=True)
    direct = unlearn(trained(), FORGET, method="fine-tune", data=Blobs(), trainer=TRAINER, seed=0).model
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), direct.parameters(), strict=True))
    (tmp_path / "empty").mkdir()
    call = ["unlearn", *CLASSES, *shared, "--checkpoint", "empty", "--output", "other.ckpt"]
    assert "left a `.metadata`, but got 'empty, a folder without it'" in refused(call, capsys)


def test_two_workers_go_on_with_a_journal(given, tmp_path, capsys):
    call = ["tune", *given, "--methods", "l1-sparse", "--goal", "privacy", "--storage", "shared/journal"]
    main([*call, "--trials", "1", "--output", "one"])
    main([*call, "--trials", "3", "--output", "two", "--workers", "2"])
    one, two = (json.loads((tmp_path / name / "trials.json").read_text())["trials"] for name in ("one", "two"))
    assert two[0] == one[0]
    assert len(two) == 3
    assert "3/3" in capsys.readouterr().out
    main([*call, "--trials", "2", "--output", "two"])
    assert len(json.loads((tmp_path / "two" / "trials.json").read_text())["trials"]) == 3


def test_keys_by_dotted_path_and_a_repair(given, tmp_path, capsys):
    keys = ["--sample_keys", "tests.test_cli_tuning.key", "--forget", '["row-0", "row-3"]']
    call = ["unlearn", *given, *keys, "--method", "repair.yaml", "--then", "repair.yaml", "--output", "new/one.ckpt"]
    main(call)
    assert capsys.readouterr().out.count("FineTune") == 3  # the title and two stages
    first = (tmp_path / "new" / "one.ckpt").stat().st_mtime_ns
    main([*call, "--overwrite"])
    assert (tmp_path / "new" / "one.ckpt").stat().st_mtime_ns > first


def test_a_collapsed_model_is_not_written(given, tmp_path, capsys):
    text = "class_path: GradientAscent\ninit_args: {max_steps: 5, lr_scale: 1.0e+6, stop: null}\n"
    (tmp_path / "wild.yaml").write_text(text)
    call = ["unlearn", *given, "--method", "wild.yaml", "--output", "one.ckpt"]
    with pytest.warns(UserWarning, match="The original model is returned"):
        assert "Nothing was written" in refused(call, capsys)
    assert not (tmp_path / "one.ckpt").exists()


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ("3\n 5 \n\nuser-7\n007\n-1\n", [3, 5, "user-7", "007", -1]),
        ('[3, "5", "user-7"]', [3, "5", "user-7"]),
        ("\ufeff3\r\n5\r\n", [3, 5]),
    ],
)
def test_forms_of_a_file_of_ids(tmp_path, content, ids):
    (tmp_path / "ids").write_bytes(content.encode())
    found = read_ids(str(tmp_path / "ids"))
    assert found == ids
    assert [type(one) for one in found] == [type(one) for one in ids]


@pytest.mark.parametrize("content", [b"[1, 2", b"[true]", b"[1.5]", b"\xff\xfe\x00"])
def test_what_is_no_file_of_ids(tmp_path, content):
    (tmp_path / "ids").write_bytes(content)
    with pytest.raises(ValueError, match="Expected `forget`"):
        read_ids(str(tmp_path / "ids"))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (["--forget", "nowhere.txt"], "Expected `forget` to be a list of ids or the path of a file"),
        (["--forget", "[]"], "DeletionRequestError: Expected"),
        (["--forget", "[999]"], "999"),
        (["--checkpoint", "nowhere.ckpt"], "Expected `checkpoint` to be the path of a checkpoint"),
        (["--checkpoint", "forget.txt"], "loads with weights_only=True, but got 'forget.txt (which torch.save did"),
        (["--checkpoint", "code.ckpt"], "(it holds a tests.tuning.blobs.Linear)"),
        (["--checkpoint", "bare.ckpt"], "with a `state_dict`, but got 'bare.ckpt (OrderedDict without it)'"),
        (["--checkpoint", "other.ckpt"], "Expected `checkpoint` to be that of a Linear with these arguments"),
        (["--methods", "amnesia"], "but got 'amnesia'"),
        (["--methods", "nowhere.yaml"], "the name of a method, or a file of one, but got 'nowhere.yaml'"),
        (["--methods", "forget.txt"], "but got 'forget.txt'"),
        (["--then", "amnesiac"], "a method that trains"),
        (["--lambda_", "2"], "Expected `lambda_`"),
        (["--trainer.epochs", "2"], "arguments of lightning.Trainer, but got ['epochs']"),
        (["--storage", "forget.txt"], "a journal that tuning wrote"),
        (["--output", "forget.txt"], "Expected `output` to be a folder"),
        (["--methods", "amnesiac"], "MissingRequirementError"),
        (["--trials", "0"], "Expected `trials`"),
    ],
)
def test_what_cannot_work_is_one_sentence(given, tmp_path, capsys, changed, sentence):
    torch.save(Linear().state_dict(), tmp_path / "bare.ckpt")
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "model": Linear()}, tmp_path / "code.ckpt")
    before = (tmp_path / "forget.txt").read_bytes()
    said = refused(["tune", *given, "--methods", "l1-sparse", "--goal", "privacy", "--trials", "1", *changed], capsys)
    assert sentence in said
    assert (tmp_path / "forget.txt").read_bytes() == before
    assert not list(tmp_path.rglob("tuned.yaml"))


def test_a_mistake_of_the_users_keeps_its_traceback(given):
    call = ["unlearn", *given, "--data", "tests.test_cli_tuning.BrokenBlobs", "--method", "fine-tune", "--output", "a"]
    with pytest.raises(ValueError, match="a mistake of the user's"):
        main(call)


@pytest.mark.parametrize("command", ["tune", "unlearn"])
def test_help(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("--config", "--model MODEL", "The trained module, as class_path and init_args.", "--checkpoint"):
        assert part in said


def test_what_is_missing_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", *CLASSES])
    assert "tune.checkpoint, tune.forget, tune.methods, tune.goal" in " ".join(capsys.readouterr().err.split())
