"""What a model is unlearned or attacked with while multiple-choice questions are evaluated."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.utils.data import DataLoader

from datamodules.parts.training_text import TrainingRow, pair_loader, running_rows, training_loader
from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.prompts import ChoiceRow, cloze_question
from dsg.selection import TextSource, check_texts

AttackText = Literal["forget", "questions"]


class ChoiceTraining:
    """The training text of a run, and how it is cut and batched.

    Args:
        task: `unlearn`: rows of forget text beside as many that are drawn from retain text.
            `relearn`: the attacker's text. Any other trains on nothing.
        attack_text: `forget`: forget text mixed 1:1 with retain text. `questions`: the forget
            questions with their right answers.
        allow_overlap: The attacker's text may state what is evaluated.
        batch_size: Rows of a training batch; of each kind for `unlearn`.
        max_length: Tokens of a row; longer texts become several rows.
        seed: Decides the order of the rows.

    Raises:
        UserError: The attacker has the questions and nobody allowed that, or a number is too small.
    """

    def __init__(
        self,
        task: str,
        attack_text: AttackText,
        *,
        allow_overlap: bool,
        batch_size: int,
        max_length: int,
        seed: int,
    ) -> None:
        if task == "relearn" and attack_text == "questions" and not allow_overlap:
            raise UserError(
                "`allow_overlap` must be true for the attack text 'questions', because it states "
                "the right answers of evaluated questions; set it."
            )
        for name, number, least in (
            ("train_batch_size", batch_size, 1),
            ("train_length", max_length, 2),
        ):
            if number < least:
                raise UserError(f"`{name}` must be at least {least}, got {number}; raise it.")
        self.task = task
        self.attack_text: AttackText = attack_text
        self.allow_overlap = allow_overlap
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed

    @property
    def shows_answers(self) -> bool:
        """Whether training states the right answers of the forget questions."""
        return self.task == "relearn" and self.attack_text == "questions"

    def texts(self, questions: Sequence[ChoiceRow], source: TextSource) -> dict[str, list[str]]:
        """What the run trains on by kind: `forget` and `retain`, or `questions`; maybe nothing.

        Args:
            questions: All forget questions, whether or not this run asks them.
            source: Forget and retain text; not read for the attack text `questions`.

        Raises:
            UserError: There is no text of a kind, or the attacker has an evaluated question and
                nobody allowed that.
        """
        if self.task not in ("unlearn", "relearn"):
            return {}
        answered = [_answered(row) for row in questions]
        if self.shows_answers:
            if not answered:
                raise UserError(
                    "`forget` must name a set of questions for the attack text 'questions', got "
                    "none; name one."
                )
            return {"questions": answered}
        found = {"forget": list(source.forget_texts()), "retain": list(source.retain_texts())}
        for kind, texts in found.items():
            if not texts:
                raise UserError(
                    f"`corpora` must give {kind} text to train on, got none; add a source, or a "
                    f"larger one, to `{kind}`."
                )
        if self.task == "relearn" and not self.allow_overlap:
            asked = [*answered, *(row.question for row in questions)]
            check_texts({"attack": found["forget"] + found["retain"], "evaluation": asked})
        return found

    def loader(
        self, tokenizer: Any, texts: Mapping[str, Sequence[str]], trainer: Any
    ) -> DataLoader:
        """Batches of the texts in an order that the seed decides, the same in every epoch.

        The retain rows of `unlearn` are drawn anew in every epoch, see `pair_loader`.

        Args:
            tokenizer: The model's tokenizer.
            texts: As `texts` returned them.
            trainer: Supplies rank and number of ranks; None stands for a single process.

        Raises:
            UserError: The task trains on nothing, or some device would get no batch.
        """
        if self.task not in ("unlearn", "relearn"):
            raise UserError(
                f"`task` must be 'unlearn' or 'relearn' for fit, got {self.task!r}; change it."
            )
        rows = {kind: running_rows(tokenizer, of, self.max_length) for kind, of in texts.items()}
        order = (self.batch_size, self.seed, trainer)
        if self.task == "unlearn":
            found = pair_loader(tokenizer, rows["forget"], rows["retain"], *order)
        elif self.shows_answers:
            found = training_loader(tokenizer, rows["questions"], *order)
        else:
            found = training_loader(tokenizer, _mixed(**rows), *order)
        if not len(found):  # Lightning would skip the training and call it done
            raise UserError(
                f"`train_batch_size` must leave a batch for each of {trainer.world_size} devices, "
                f"got {self.batch_size}; lower it or give more text."
            )
        return found


def _answered(row: ChoiceRow) -> str:
    question = cloze_question(row)
    return question.prompt + question.options[question.answer]


def _mixed(forget: Sequence[TrainingRow], retain: Sequence[TrainingRow]) -> list[TrainingRow]:
    """All forget rows and as many retain rows, evenly from all of them, repeated if too few."""
    num = len(forget)
    return [*forget, *(retain[index * len(retain) // num] for index in range(num))]
