"""Methods that make a model forget by changing its weights, one class per file."""

from dsg.objectives.ga import GradientAscent
from dsg.objectives.grad_diff import GradDiff
from dsg.objectives.npo import NPO
from dsg.objectives.objective import Objective, OneShot, ReferenceKind
from dsg.objectives.rmu import RMU
from dsg.objectives.scrub import SCRUB
from dsg.objectives.simnpo import SimNPO
from dsg.objectives.ssd import SSD
from dsg.objectives.task_vector import TaskVector
from dsg.objectives.terms import Loss

__all__ = [
    "NPO",
    "RMU",
    "SCRUB",
    "SSD",
    "GradDiff",
    "GradientAscent",
    "Loss",
    "Objective",
    "OneShot",
    "ReferenceKind",
    "SimNPO",
    "TaskVector",
]
