"""Files and functions stay short enough to be read in one go."""

import ast
from pathlib import Path

import flatcompress

FILES = sorted(Path(flatcompress.__file__).parent.rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 60


def test_no_file_is_longer_than_400_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lengths) > 100 and {str(p): n for p, n in lengths.items() if n > FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines():
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found[f"{path}:{node.lineno} {node.name}"] = lines
    assert found == {}
