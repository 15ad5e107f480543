"""Unlearning methods, one a file. Adding one touches its file and the export here."""

from lightning_unlearn.methods.amnesiac import Amnesiac
from lightning_unlearn.methods.base import Procedure, Requirement, UnlearningMethod, WeightEdit
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.methods.gradient_ascent import GradientAscent
from lightning_unlearn.methods.loss_method import LossMethod, PushingMethod
from lightning_unlearn.methods.neg_grad_plus import NegGradPlus
from lightning_unlearn.methods.partial_amnesiac import PartialAmnesiac
from lightning_unlearn.methods.partial_updates import PartialUpdates
from lightning_unlearn.methods.registry import METHODS, get_method, register
from lightning_unlearn.methods.retrain import Retrain
from lightning_unlearn.methods.rewind import Rewind

__all__ = [
    "METHODS",
    "Amnesiac",
    "FineTune",
    "GradientAscent",
    "LossMethod",
    "NegGradPlus",
    "PartialAmnesiac",
    "PartialUpdates",
    "Procedure",
    "PushingMethod",
    "Requirement",
    "Retrain",
    "Rewind",
    "UnlearningMethod",
    "WeightEdit",
    "get_method",
    "register",
]
