"""Lightning modules, one per kind of run; each is a thin shell around `dsg`."""

from lightning_modules.conversation import ConversationModule
from lightning_modules.evaluation import EvaluationModule
from lightning_modules.finetuning import FinetuningModule
from lightning_modules.prediction import PredictionModule
from lightning_modules.pretraining import PretrainingModule
from lightning_modules.question_filter import QuestionFilterModule
from lightning_modules.relearning import RelearningModule
from lightning_modules.selection import SelectionModule
from lightning_modules.sequential import SequentialModule
from lightning_modules.unlearning import UnlearningModule

__all__ = [
    "ConversationModule",
    "EvaluationModule",
    "FinetuningModule",
    "PredictionModule",
    "PretrainingModule",
    "QuestionFilterModule",
    "RelearningModule",
    "SelectionModule",
    "SequentialModule",
    "UnlearningModule",
]
