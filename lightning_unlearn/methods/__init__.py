"""Unlearning methods, one a file, and what it takes to write another: bases, contexts, `register`.

A new method touches its file, the export here, and the names in the package's `__init__`.
"""

from lightning_unlearn.methods.amnesiac import Amnesiac
from lightning_unlearn.methods.bad_teacher import BadTeacher
from lightning_unlearn.methods.base import (
    EditContext,
    Procedure,
    ProcedureContext,
    Requirement,
    UnlearningMethod,
    WeightEdit,
    hyperparameters,
)
from lightning_unlearn.methods.boundary_expanding import BoundaryExpanding
from lightning_unlearn.methods.boundary_shrink import BoundaryShrink
from lightning_unlearn.methods.ce_fine_tune import CEFineTune, ICEFineTune
from lightning_unlearn.methods.config import load_method, save_method
from lightning_unlearn.methods.delta_grad import DeltaGrad
from lightning_unlearn.methods.exact_unlearning_k import ExactUnlearningK
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.methods.fisher_forgetting import FisherForgetting
from lightning_unlearn.methods.gradient_ascent import GradientAscent
from lightning_unlearn.methods.influence import InfluenceUnlearning
from lightning_unlearn.methods.kl_fine_tune import KLFineTune
from lightning_unlearn.methods.l1_sparse import L1Sparse
from lightning_unlearn.methods.label_flipping import LabelFlipping
from lightning_unlearn.methods.last_layers import CatastrophicForgettingK
from lightning_unlearn.methods.loss_method import LossMethod, PushingMethod, UnlearningHost, user_loss, weighted_sum
from lightning_unlearn.methods.neg_grad_plus import NegGradPlus
from lightning_unlearn.methods.partial_amnesiac import PartialAmnesiac
from lightning_unlearn.methods.partial_gradient_ascent import PartialGradientAscent
from lightning_unlearn.methods.partial_label_flipping import PartialLabelFlipping
from lightning_unlearn.methods.partial_updates import PartialUpdates
from lightning_unlearn.methods.registry import METHODS, get_method, register
from lightning_unlearn.methods.relabelling import Relabelling
from lightning_unlearn.methods.retention_masking import RetentionMasking
from lightning_unlearn.methods.retrain import Retrain
from lightning_unlearn.methods.rewind import Rewind, RewindPlan, plan_rewind
from lightning_unlearn.methods.salun import SalUn
from lightning_unlearn.methods.scrub import Scrub
from lightning_unlearn.methods.scrub_r import ScrubR
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange, SearchSpace
from lightning_unlearn.methods.single_gradient import SingleGradient
from lightning_unlearn.methods.sisa import Sisa
from lightning_unlearn.methods.ssd import SelectiveSynapticDampening
from lightning_unlearn.methods.unrolled_influence import UnrolledInfluence
from lightning_unlearn.methods.unsir import Unsir
from lightning_unlearn.shards.ensemble import SisaEnsemble

__all__ = [
    "METHODS",
    "Amnesiac",
    "BadTeacher",
    "BoundaryExpanding",
    "BoundaryShrink",
    "CEFineTune",
    "CatastrophicForgettingK",
    "Choices",
    "DeltaGrad",
    "EditContext",
    "ExactUnlearningK",
    "FineTune",
    "FisherForgetting",
    "FloatRange",
    "GradientAscent",
    "ICEFineTune",
    "InfluenceUnlearning",
    "IntRange",
    "KLFineTune",
    "L1Sparse",
    "LabelFlipping",
    "LossMethod",
    "NegGradPlus",
    "PartialAmnesiac",
    "PartialGradientAscent",
    "PartialLabelFlipping",
    "PartialUpdates",
    "Procedure",
    "ProcedureContext",
    "PushingMethod",
    "Relabelling",
    "Requirement",
    "RetentionMasking",
    "Retrain",
    "Rewind",
    "RewindPlan",
    "SalUn",
    "Scrub",
    "ScrubR",
    "SearchSpace",
    "SelectiveSynapticDampening",
    "SingleGradient",
    "Sisa",
    "SisaEnsemble",
    "UnlearningHost",
    "UnlearningMethod",
    "UnrolledInfluence",
    "Unsir",
    "WeightEdit",
    "get_method",
    "hyperparameters",
    "load_method",
    "plan_rewind",
    "register",
    "save_method",
    "user_loss",
    "weighted_sum",
]
