"""What a file is written for: a target sets profile and scheme, its published rules are checked, and it is run there.

`TARGETS` names them. `check` lints a written file and, where the target's tool is installed, loads it there and
compares outputs; what was not run is said.
"""

from flatcompress.onnx_export.targets.checking import check, judge
from flatcompress.onnx_export.targets.table import TARGETS, Target

__all__ = ["TARGETS", "Target", "check", "judge"]
