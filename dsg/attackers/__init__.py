"""What an attacker who fine-tunes the model minimises; one objective per file."""

from dsg.attackers.attacker import Attacker, AttackLoss
from dsg.attackers.evade import Evade
from dsg.attackers.task import Task

__all__ = ["AttackLoss", "Attacker", "Evade", "Task"]
