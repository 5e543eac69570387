"""What a step minimises. Each objective is a file here; ``train.objective`` names one of ``OBJECTIVES``."""

from captioning.training.objectives.cross_entropy import CrossEntropy
from captioning.training.objectives.objective import Losses, Objective, StepScope, scope_alone
from captioning.training.objectives.self_critical import SelfCritical

OBJECTIVES: dict[str, type[Objective]] = {"cross_entropy": CrossEntropy, "self_critical": SelfCritical}

__all__ = ["OBJECTIVES", "CrossEntropy", "Losses", "Objective", "SelfCritical", "StepScope", "scope_alone"]
