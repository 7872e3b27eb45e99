"""The bounds that keep the repository small; the room each file has is in the README."""

import ast
import io
import tokenize

import pytest
from conftest import ROOT

ROOMS = [ROOT, ROOT / "common", ROOT / "tasks"]
CODE = sorted(path for room in ROOMS for path in room.glob("*.py"))
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.comprehension)
LAYOUT = {getattr(tokenize, name) for name in "NL NEWLINE INDENT DEDENT COMMENT ENDMARKER".split()}


def tokens(source: str) -> int:
    return sum(t.type not in LAYOUT for t in tokenize.generate_tokens(io.StringIO(source).readline))


def branches(function) -> int:
    """Branches of a function, without those of functions inside it."""
    total, todo = 0, list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            total += isinstance(node, BRANCHES)
            total += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
            todo += ast.iter_child_nodes(node)
    return total


def test_the_code_is_small():
    sources = [path.read_text(encoding="utf-8") for path in CODE]
    assert {p.name for p in CODE} >= {"imagen.py", "textgen.py", "reason.py", "tokengen.py", "diffusion.py"}
    assert sum(len(source.splitlines()) for source in sources) <= 3500
    assert sum(map(tokens, sources)) <= 31_500
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 620
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert branches(node) <= 12, node.name


def test_flags_are_few():
    flags = 0
    for path in CODE:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in ("Config", "Flags"):
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                scripts = 4 if node.name == "Flags" else 1  # each has them
                flags += scripts * sum("ClassVar" not in ast.unparse(field.annotation) for field in fields)
    assert 0 < flags <= 130


def test_imports_run_one_way():
    """bench -> scripts -> common, tasks -> common.run; diffusion.py, blocks.py and vae.py know no files."""
    core, scripts = {"diffusion", "blocks", "vae"}, {"imagen", "textgen", "reason", "tokengen"}
    for path in CODE:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in core:
            assert not imported & (scripts | {"common", "tasks", "tyro", "pathlib"}), path
        if room in ("common", "tasks"):
            assert not imported & (scripts | core), path
        if room in scripts:
            assert not imported & scripts, path
