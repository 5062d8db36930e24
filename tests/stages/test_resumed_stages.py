"""A stage that was stopped in its middle and goes on ends in the same bits as one that was not."""

from __future__ import annotations

import pytest
import torch
from stage_pieces import StopAt, config, context

from flatcompress.errors import Interrupted
from flatcompress.stages import run_stage
from flatcompress.training.devices import seed_everything

STAGES = [
    ("prune", {"method": "adasap", "epochs": 4}, 3),
    ("prune", {"method": "adasap", "epochs": 4}, 11),
    ("prune", {"method": "taylor", "epochs": 3, "schedule_steps": 2}, 3),
    ("prune", {"method": "growing_reg", "epochs": 4}, 5),
    ("sparsify", {"method": "asam", "sparsity": 0.7, "schedule_steps": 2}, 3),
    ("sparsify", {"method": "none", "pattern": "2:4"}, 6),
    ("quantize", {"method": "gaqat", "K": 3}, 5),
    ("quantize", {"method": "qt_dog", "weight_bits": 3}, 2),
    ("quantize", {"method": "qt_dog", "weight_bits": 3}, 6),
    ("quantize", {"method": "squat", "bits": "auto"}, 5),
    ("quantize", {"method": "saq", "oscillation_threshold": 0.01, "weight_bits": 2}, 5),
    ("quantize", {"method": "lsq_sagm", "scale_steps": "relative", "scale_turns": 2, "scale_warmup": 0.3}, 5),
    ("quantize", {"method": "gaqat", "mode": "standing", "K": 3}, 5),
]


@pytest.mark.parametrize(("kind", "keys", "step"), STAGES, ids=lambda v: v["method"] if isinstance(v, dict) else str(v))
def test_resumed_stage_ends_in_the_same_bits(kind, keys, step):
    whole = run_stage(kind, context(), config(kind, **keys))

    stopped = context()
    stopped.progress = StopAt(step)
    with pytest.raises(Interrupted):
        run_stage(kind, stopped, config(kind, **keys))
    resumed = context()
    resumed.resume = stopped.progress.state
    seed_everything(1234)  # whatever the new process drew before
    resumed = run_stage(kind, resumed, config(kind, **keys))

    assert resumed.plan.to_json() == whole.plan.to_json()
    assert resumed.passes == whole.passes
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]
