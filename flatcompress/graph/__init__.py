"""One view of a module that quantization and the ONNX writer share.

`trace` turns any exportable module into an fx graph whose weighted layers are calls of the module's own
submodules, so that names in the graph, in the state dict and in the exported file are the same names.
`install` makes a module run such a graph instead of its own forward. `macs` counts multiply-accumulates.
This package knows nothing of quantizers: `ActivationSpec` and `WeightSpec` are the protocol they answer to.
"""

from __future__ import annotations

from flatcompress.graph.cost import macs, total_macs, weighted
from flatcompress.graph.fold import Folded, fold
from flatcompress.graph.lowering_spec import ActivationSpec, WeightSpec, headroom, rows
from flatcompress.graph.pointwise import function_of_one
from flatcompress.graph.runtime import install, installed_graph, uninstall
from flatcompress.graph.tracing import trace

__all__ = [
    "ActivationSpec",
    "Folded",
    "WeightSpec",
    "fold",
    "function_of_one",
    "headroom",
    "install",
    "installed_graph",
    "macs",
    "rows",
    "total_macs",
    "trace",
    "uninstall",
    "weighted",
]
