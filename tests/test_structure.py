"""The structure of the repository: layers, import cycles, and what each file may import."""

import ast
import sys
from functools import cache

import pytest
from conftest import ROOT

# From the bottom to the top. A module imports from lower layers, or from its own.
LAYERS = [
    ["losses"],
    ["core"],
    ["data"],
    ["sets"],
    ["batches"],
    ["features"],
    ["mapper", "anchors"],
    ["strategies"],
    ["finetune"],
    ["report"],
    ["evaluate"],
    ["run", "export", "benchmark", "emoji"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = sorted(
    path for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    if path.parent.name not in ("tests", ".venv")
)
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in FILES
}


@cache
def imports_of(module):
    """Return the modules of this repository that a module imports, at its top or in a function."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (names & MODULES.keys()) - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_layers(module):
    own = LAYER[module.partition(".")[0]]
    upward = [name for name in imports_of(module) if LAYER[name.partition(".")[0]] > own]
    assert not upward


def test_there_is_no_import_cycle():
    """… none through imports within functions either."""
    finished, path = set(), []

    def visit(module):
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module in finished:
            return
        path.append(module)
        for name in sorted(imports_of(module)):
            visit(name)
        path.pop()
        finished.add(module)

    for module in MODULES:
        visit(module)


def test_losses_import_only_torch():
    tree = ast.parse((ROOT / "losses.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {alias.name for node in imported for alias in node.names} == {"torch", "torch.nn.functional"}


def test_the_root_contains_what_a_reader_of_the_papers_must_read():
    assert {path.stem for path in ROOT.glob("*.py")} == {
        "losses", "mapper", "anchors", "finetune", "evaluate", "data", "batches", "features", "export", "run",
    }


def test_parsing_flags_needs_no_slow_package():
    """core.config and what it imports leave PyTorch alone, so that --help is quick."""
    import subprocess

    code = "import core.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
