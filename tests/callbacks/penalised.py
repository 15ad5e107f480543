"""Users' modules with a penalty written into their own step: what a callback has to equal."""

import torch
from torch.nn import functional

from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer

GAMMA, STRENGTH = 0.3, 0.2


def deviation(logits):
    """The mean over samples of the biased standard deviation, written out; of half precision in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    centred = logits - logits.mean(1, keepdim=True)
    return (centred.pow(2).mean(1) + 1e-12).sqrt().mean()


class Plain(BoringClassifier):
    """No penalty; says what its step returns."""

    returns = "tensor"

    def training_step(self, batch, batch_idx):
        logits = self(batch["x"])
        loss = self.penalised(functional.cross_entropy(logits, batch["y"]), logits)
        if self.returns == "dict":
            return {"loss": loss, "logits": logits.detach()}
        return None if self.returns == "none" and batch_idx % 2 else loss

    def penalised(self, loss, logits):
        return loss


class OwnDeviation(Plain):
    """The standard-deviation loss in the step."""

    def penalised(self, loss, logits):
        return loss + GAMMA * deviation(logits)


class OwnDistance(Plain):
    """The squared distance to the initial weights in the step."""

    def on_train_start(self):
        self.start = [one.detach().clone() for one in self.parameters() if one.requires_grad]

    def penalised(self, loss, logits):
        active = [one for one in self.parameters() if one.requires_grad]
        return loss + STRENGTH * sum((one - start).pow(2).sum() for one, start in zip(active, self.start, strict=True))


def fit(module, *callbacks, seed=3, batch_size=8, length=48, compiled=None, **trainer):
    """Train on batches whose order depends on the seed alone, and give the module back."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    data = loader(IdDataset(length), batch_size=batch_size, shuffle=True, generator=order)
    quiet_trainer(callbacks=list(callbacks), **trainer).fit(module if compiled is None else compiled(module), data)
    return module


def largest_difference(left, right):
    """Over all parameters and buffers."""
    ours, theirs = left.state_dict(), right.state_dict()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in theirs)
