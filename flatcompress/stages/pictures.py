"""Pictures of the data: the preview sheet at the beginning of a run, and the examples of its report at the end.

They show the corrupted parts that are measured, sample for sample, and so nothing is corrupted for them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from flatcompress import report
from flatcompress.data import DataBundle, preview
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import corrupted_parts
from flatcompress.storage import write_json_atomic
from flatcompress.store.runfolder import RunFolder


def sheet(run: RunContext) -> bytes:
    """The preview sheet as a PNG, each corruption at its hardest measured severity; nothing where there is no image."""
    return preview.png(_as_measured(run))


def draw_examples(run: RunContext, folder: RunFolder) -> None:
    """Write examples.json of ``folder``, which is the run's; nothing where samples have no picture."""
    if len(run.data.input_shape) != 3:  # series and features
        return
    data = _as_measured(run)
    wanted = report.examples.wanted(report.gather(folder.path))
    drawn = [(w, preview.thumbnail(data, w.part, w.index)) for w in wanted]
    told = preview.drawn(data, run.model, run.device)  # of tasks that know how a sample is shown
    drawn += [(report.examples.Wanted(part, index), picture) for part, index, picture in told]
    write_json_atomic(folder.examples, report.examples.file_of(drawn))


def _as_measured(run: RunContext) -> DataBundle:
    """The data with the corrupted parts as they are measured; with none where corruption is not."""
    parts: dict[str, Any] = corrupted_parts(run, say=False)[0]
    shown: dict[str, Any] = {k: _Some(v) if isinstance(v, Subset) else v for k, v in parts.items()}
    return replace(run.data, corrupted=shown)


class _Some:
    """Labels and pictures of some samples of a part that cannot be narrowed itself."""

    def __init__(self, part: Subset[Any]) -> None:
        self._whole: Any = part.dataset
        self._indices = list(part.indices)

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def labels(self) -> Tensor:
        found: Tensor = self._whole.labels[self._indices]
        return found

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] of the samples at ``indices`` of these."""
        found: Tensor = self._whole.pixels([self._indices[i] for i in indices])
        return found
