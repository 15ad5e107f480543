from collections import Counter, defaultdict, deque

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.compile import from_compiled

from lightning_unlearn.modules.silent import silent_step
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.modules.cases import Adversarial, Joint, User, dataset


def batch(n=6):
    return [tensor[:n] for tensor in dataset().tensors]


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: UnlearningModule(model, Joint())])
def test_the_step_returns_what_the_users_returns(wrap):
    model = User(norm=False)
    with torch.no_grad():
        expected = model.net(batch()[0])
    with silent_step(wrap(model)) as step:
        output = step(batch(), 0)
    assert torch.equal(output["logits"], expected)
    assert not output["loss"].requires_grad


def test_attributes_are_the_views():
    class Counting(User):
        def __init__(self):
            super().__init__()
            self.losses, self.count = [], 0

        def training_step(self, batch, batch_idx):
            self.count += 1
            self.losses.append(batch_idx)
            self.late = torch.nn.Linear(1, 1)
            return self.count

    model = Counting()
    kept, children = set(model.__dict__), set(model._modules)
    with silent_step(model) as step:
        assert [step(batch(), index) for index in range(3)] == [1, 2, 3]
    assert (model.count, model.losses) == (0, [])
    assert set(model.__dict__) == kept
    assert set(model._modules) == children


def test_a_compiled_step_is_the_views_as_well():
    class Counting(User):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch_idx)
            return self.net(batch[0]).sum()

    # What a Trainer makes of `torch.compile(module)`: compiled methods on the instance, bound to it.
    model = from_compiled(torch.compile(Counting(), backend="eager"))
    with silent_step(model) as step:
        step(batch(), 3)
    assert model.seen == []
    torch._dynamo.reset()


def test_manual_closures_are_evaluated_once():
    calls = []

    class Closing(Adversarial):
        def training_step(self, batch, batch_idx):
            first, _ = self.optimizers()

            def closure():
                calls.append(1)
                return self.generator(batch[0]).sum()

            with first.toggle_model():
                first.step(closure=closure)
            assert self.lr_schedulers().get_last_lr() == [0.1]

    with silent_step(Closing()) as step:
        step(batch(), 0)
    assert calls == [1]


def test_a_step_without_an_index():
    class Short(User):
        def training_step(self, batch):
            return super().training_step(batch, 0)["loss"]

    with silent_step(Short()) as step:
        assert step(batch(), 0).ndim == 0


def test_a_replaced_method_that_is_bound_to_the_module_does_not_lead_back():
    model = User()
    model.forward = model.forward
    with silent_step(model) as step:
        assert step(batch(), 0)["loss"] > 0
    assert "forward" in model.__dict__


def test_containers_in_containers_are_the_views_as_well():
    class Keeping(User):
        def __init__(self):
            super().__init__()
            self.history = {"loss": [], "self": None}
            self.history["self"] = self.history
            self.recent, self.seen, self.by_name = deque([[]], maxlen=3), Counter(), defaultdict(list)

        def training_step(self, batch, batch_idx):
            self.history["self"]["loss"].append(1)
            self.recent[0].append(1)
            self.recent.append(1)
            self.seen["step"] += 1
            self.by_name["step"].append(1)
            return len(self.history["loss"])

    model = Keeping()
    with silent_step(model) as step:
        assert [step(batch(), 0) for _ in range(2)] == [1, 2]
    assert model.history["loss"] == []
    assert (list(model.recent), dict(model.seen), dict(model.by_name)) == ([[]], {}, {})


def test_a_step_that_logs_by_itself_writes_nothing(tmp_path):
    class Writing(User):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"own": 1.0})
            self.loggers[0].experiment.log_metrics({"own": 1.0})
            self.trainer.logger.log_metrics({"own": 1.0})
            return batch_idx

    model, logger = Writing(), CSVLogger(tmp_path)
    model.trainer = Trainer(logger=logger, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    with silent_step(model) as step:
        assert step(batch(), 3) == 3
    assert model.logger is logger
    assert not logger.experiment.metrics
