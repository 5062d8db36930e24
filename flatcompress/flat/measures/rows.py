"""The measures that look at several networks, or at classes, by name."""

from __future__ import annotations

from flatcompress.flat.measures.connectivity import cka, linear_connectivity, regime
from flatcompress.flat.measures.entropy import psp_entropy
from flatcompress.registry import Registry

MEASURES = Registry("measure")
MEASURES.add("psp_entropy", psp_entropy, "how little a neuron's firing depends on the class", "2004.14765")
MEASURES.add("linear_connectivity", linear_connectivity, "the error barrier between two networks", "2305.18383")
MEASURES.add("cka", cka, "how alike the outputs of two networks are", "1905.00414")
MEASURES.add("regime", regime, "which of three regimes a pruned network is in, and what helps", "2305.18383")
