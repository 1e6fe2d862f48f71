"""What an attacker who fine-tunes the model minimises; one objective per file."""

from dsg.attacks.attacker import Attacker, AttackLoss
from dsg.attacks.evade import Evade
from dsg.attacks.task import Task

__all__ = ["AttackLoss", "Attacker", "Evade", "Task"]
