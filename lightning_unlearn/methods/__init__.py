"""Unlearning methods, one a file. Adding one touches its file and the export here."""

from lightning_unlearn.methods.amnesiac import Amnesiac
from lightning_unlearn.methods.base import LossMethod, Procedure, Requirement, UnlearningMethod, WeightEdit
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.methods.partial_amnesiac import PartialAmnesiac
from lightning_unlearn.methods.registry import METHODS, get_method, register
from lightning_unlearn.methods.retrain import Retrain

__all__ = [
    "METHODS",
    "Amnesiac",
    "FineTune",
    "LossMethod",
    "PartialAmnesiac",
    "Procedure",
    "Requirement",
    "Retrain",
    "UnlearningMethod",
    "WeightEdit",
    "get_method",
    "register",
]
