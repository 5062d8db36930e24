"""onnxruntime sessions: default, unoptimized, and what the optimizer made of a file."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from flatcompress.errors import UserError

PROVIDERS = ["CPUExecutionProvider"]
QUIET = 3  # errors only: the optimizer warns about every file it saves

# What onnxruntime calls the kernels that compute on integers.
INTEGER_KERNELS = frozenset(
    {
        *("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"),
        *("QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearAveragePool"),
        *("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax"),
    }
)


_Key = tuple[str, int, int, bool, bool, int]
_shared: ContextVar[dict[_Key, ort.InferenceSession] | None] = ContextVar("shared", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """Inside, a file is loaded once for each set of options; the sessions go at the end.

    What is timed or profiled (``idle``, ``profile_to``) has sessions of its own.
    """
    before = _shared.set({}) if _shared.get() is None else None
    try:
        yield
    finally:
        if before is not None:
            _shared.reset(before)


def session(
    model: str | Path | bytes,
    *,
    optimized: bool = True,
    fused: bool = True,
    threads: int = 1,
    save_to: Path | None = None,
    idle: bool = False,
    profile_to: Path | None = None,
) -> ort.InferenceSession:
    """A CPU session with default options but for the thread count. UserError when onnxruntime refuses the file.

    fused: false keeps operators between DequantizeLinear and QuantizeLinear in floats, as ONNX defines them, where a
    default session makes integer kernels of them. idle: its threads sleep between two calls instead of spinning, for
    several sessions that take turns. profile_to: what the names of onnxruntime's profiles begin with.
    """
    known = _shared.get()
    if known is None or isinstance(model, bytes) or idle or profile_to is not None:
        return _loaded(model, optimized, fused, threads, save_to, idle, profile_to)
    key = _key(Path(model), optimized, fused, threads)
    if key is None or save_to is not None or key not in known:
        found = _loaded(model, optimized, fused, threads, save_to, idle, profile_to)
        if key is not None:
            known[key] = found
        return found
    return known[key]


def _key(path: Path, optimized: bool, fused: bool, threads: int) -> _Key | None:
    """What a session depends on; None for what cannot be read."""
    try:
        there = path.stat()
    except OSError:
        return None
    return str(path.absolute()), there.st_mtime_ns, there.st_size, optimized, fused, threads


def _loaded(
    model: str | Path | bytes,
    optimized: bool,
    fused: bool,
    threads: int,
    save_to: Path | None,
    idle: bool,
    profile_to: Path | None,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = QUIET
    if not fused:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if idle:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    try:
        return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=PROVIDERS)
    except Exception as error:  # onnxruntime's exceptions share no base class
        name = "the model" if isinstance(model, bytes) else model
        raise UserError(f"{name}: onnxruntime {ort.__version__} cannot load it ({_first_line(error)}).") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def run(handle: ort.InferenceSession, batches: Iterable[Any], output: int = 0) -> NDArray[np.float32]:
    """The first output (or another) for every batch, joined. A batch is an array, or a tuple of them for several
    inputs. UserError when onnxruntime cannot run the file, with the node that it names."""
    name = handle.get_outputs()[output].name
    results = []
    for batch in batches:
        given = feed(handle, batch)
        try:
            results.append(handle.run([name], given)[0])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise UserError(f"onnxruntime {ort.__version__} cannot run the file ({_first_line(error)}).") from None
    return np.concatenate(results)


def feed(handle: ort.InferenceSession, batch: Any) -> dict[str, NDArray[Any]]:
    """What a session is given for a batch: an array, a tuple of them in the order of the inputs, or a dictionary."""
    if isinstance(batch, Mapping):
        return dict(batch)
    given = batch if isinstance(batch, tuple | list) else (batch,)
    return {entry.name: value for entry, value in zip(handle.get_inputs(), given)}


@dataclass(frozen=True)
class Kernels:
    """What runs after optimization: operator counts, and the operator that each named node became."""

    counts: dict[str, int]
    of: dict[str, str]

    @property
    def integer(self) -> int:
        """How many integer kernels there are."""
        return sum(count for kind, count in self.counts.items() if kind in INTEGER_KERNELS)


WHOLE = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8}


def drawn(random: np.random.Generator, shape: list[int], kind: str) -> NDArray[Any]:
    """A value for an input of onnxruntime's type ``kind``: real ones in [0, 1), whole ones (token ids, masks) 1."""
    if kind in WHOLE:
        return np.ones(shape, WHOLE[kind])
    return random.random(shape, dtype=np.float32)


def kernels(model: str | Path | bytes) -> Kernels:
    """Optimize a file as a default session does and look at the result."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimized.onnx"
        session(model, save_to=saved)
        nodes = onnx.load(saved, load_external_data=False).graph.node
    return Kernels(
        counts=dict(sorted(Counter(node.op_type for node in nodes).items())),
        of={_plain(node.name): node.op_type for node in nodes if node.name},
    )


def _plain(name: str) -> str:
    """A node's name without what the layout optimizer appends to it."""
    return re.sub(r"(_token_\d+|_nchwc)+$", "", name)
