"""Channels and masks: what can be cut, what should be, and the cut itself.

The package knows nothing of flat minima, quantizers or recipes. `find_groups` gives the coupled channels, `score` their
importance, `adaptive_radius` AdaSAP's perturbation radius; `SoftMask` holds removed channels at zero while training
goes on and `shrink` cuts them for good; `prune` does it all at once. `masks` is for unstructured and N:M zeros,
`isoflop` for training as many weights in another form.
"""

from __future__ import annotations

from flatcompress.prune.budgets.choice import Budget, choose
from flatcompress.prune.budgets.cost import CostModel, Width
from flatcompress.prune.dependency.groups import Group, Member, Survey
from flatcompress.prune.dependency.survey import find_groups, survey
from flatcompress.prune.gradual import ChannelSchedule, WeightSchedule
from flatcompress.prune.importance import IMPORTANCES, NEEDS_GRADIENTS, RunningScore, score
from flatcompress.prune.isoflop import REPARAMETRIZATIONS
from flatcompress.prune.oneshot import NothingPruned, prune
from flatcompress.prune.radius import adaptive_radius, relative_sizes
from flatcompress.prune.ranking import RANKINGS, Limits
from flatcompress.prune.schedule import SCHEDULES
from flatcompress.prune.soft import SoftMask, shrink

__all__ = [
    "IMPORTANCES",
    "NEEDS_GRADIENTS",
    "RANKINGS",
    "REPARAMETRIZATIONS",
    "SCHEDULES",
    "Budget",
    "ChannelSchedule",
    "CostModel",
    "Group",
    "Limits",
    "Member",
    "NothingPruned",
    "RunningScore",
    "SoftMask",
    "Survey",
    "WeightSchedule",
    "Width",
    "adaptive_radius",
    "choose",
    "find_groups",
    "prune",
    "relative_sizes",
    "score",
    "shrink",
    "survey",
]
