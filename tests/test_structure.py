"""What import-linter (`make lint`, contracts in pyproject.toml) cannot tell of the modules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "retinanet_keras"

MATHS = ("tensors", "boxes", "nms", "losses", "mining", "anchors", "targets", "detections", "objective")
CLIENT = (
    "visualization.draw",
    "visualization.text_table",
    "serving.messages",
    "serving.answers",
    "serving.pictures",
    "serving.conversation",
    "serving.client",
)


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"}


def imports(path, top_level=False):
    """(absolute dotted name, line) of everything a file imports; `top_level`: outside of functions only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if top_level and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import with its full name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own_imports(path):
    """(module of this package, line); a name that is no module stands for the module that has it."""
    for dotted, line in imports(path):
        first, *rest = dotted.split(".")
        if first == "retinanet_keras":
            while rest and ".".join(rest) not in MODULES:
                rest = rest[:-1]
            yield ".".join(rest), line


def test_packages_import_nothing_of_their_own():
    """But that the process is set up before anything else."""
    for path in PACKAGE.rglob("__init__.py"):
        allowed = {"runtime"} if path.parent == PACKAGE else set()
        assert {name for name, _ in own_imports(path)} <= allowed, path


@pytest.mark.parametrize("name", [*MATHS, "config", "data.coco_rules", "data.coco", "data.listing", *CLIENT])
def test_tensorflow_stays_out_of(name):
    found = {dotted.split(".")[0] for dotted, _ in imports(MODULES[name], top_level=True)}
    assert "tensorflow" not in found, "import it inside the function that needs it"
    if name not in MATHS:
        assert "keras" not in found


def test_a_configuration_is_read_without_keras():
    code = (
        "import sys; from retinanet_keras import load_config; print({'keras', 'tensorflow'} & set(sys.modules) or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", [*(name for name in MATHS if name != "objective"), "config", "data.coco"])
def test_make_check_has_the_tests_of(name):
    """The Makefile takes the files that have this line; `objective` is tested where the model is."""
    text = (ROOT / "tests" / f"test_{name.rpartition('.')[2]}.py").read_text(encoding="utf-8")
    assert "\npytestmark = pytest.mark.check\n" in text


@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_scripts_are_thin(name):
    path = ROOT / name
    assert {other for other, _ in own_imports(path)} <= {"cli.parser"}
    assert len(path.read_text(encoding="utf-8").splitlines()) < 12
