"""One direction: a module imports only from modules above its own in this table, wherever in its file the import is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "retinanet_keras"

# Modules of one row do not import each other.
TABLE = (
    ("runtime",),
    ("errors",),
    ("storage", "strict_json", "printable", "archives"),
    ("weight_files",),
    ("identity", "settings"),
    ("config",),
    ("boxes",),
    ("nms",),
    ("losses",),
    ("mining", "anchors", "targets", "detections"),
    ("objective", "fit_arguments"),
    ("backbone", "pyramid", "subnets"),
    ("pretrained",),
    ("optimizers",),
    ("train_step",),
    ("model",),
    ("released.stand_ins",),
    ("released.pickles",),
    ("released.files",),
    ("released.layouts",),
    ("checkpoints",),
    ("data.rules",),
    ("data.coco",),
    ("data.splits", "data.image_formats"),
    ("data.tfds", "data.shapes"),
    ("data.headers",),
    ("data.bitmaps",),
    ("data.sources",),
    ("data.buckets", "data.augmentation", "data.reading"),
    ("data.pipeline",),
    ("results.files",),
    ("results.records",),
    ("results.truth",),
    ("results.scoring",),
    ("results.matching",),
    ("results.evaluation",),
    ("results.draw",),
    ("results.curves", "results.table"),
    ("results.plots",),
    ("results.report",),
    ("data.image_files", "data.listing"),
    ("data.reach",),
    ("data.inspection",),
    ("serving.warmup", "serving.card", "serving.inference", "serving.onnx"),
    ("serving.export",),
    ("serving.detector",),
    ("serving.messages", "serving.answers", "serving.pictures"),
    ("serving.conversation",),
    ("serving.client",),
    ("training.log_file",),
    ("training.folder",),
    ("training.best", "training.fingerprint", "training.strategies"),
    ("training.checkpoints",),
    ("training.callbacks",),
    ("training.replay",),
    ("training.stream",),
    ("training.evaluator", "training.outputs", "training.unfinished"),
    ("training.metrics", "training.preflight"),
    ("training.run",),
    ("experiments.paper",),
    ("experiments.tables",),
    ("experiments.measured", "experiments.timing"),
    ("experiments.output",),
    ("experiments.runner",),
    ("trained",),
    ("evaluate",),
    ("experiments.figures.sheet",),
    ("experiments.figures.curves", "experiments.figures.architecture", "experiments.figures.speed"),
    ("experiments.figures.distribution", "experiments.figures.star"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
ROW = {name: number for number, names in enumerate(TABLE) for name in names}
MATHS = ("boxes", "nms", "losses", "mining", "anchors", "targets", "detections", "objective")
CLIENT = (
    "results.draw",
    "results.table",
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


def violations(name, path):
    """What in a module's imports is against the table, one line each."""
    found = []
    for other, line in own_imports(path):
        if not other:
            found.append(f"{path}:{line}: imports the package itself; import the module that has the name")
        elif other not in ROW:
            found.append(f"{path}:{line}: imports {other}, which is not in the table")
        elif ROW[other] >= ROW[name]:
            found.append(f"{path}:{line}: {name} (row {ROW[name]}) imports {other} (row {ROW[other]}), not above it")
    return found


def test_every_module_is_in_the_table():
    new = sorted(set(MODULES) - set(ROW))
    assert not new, f"add {', '.join(new)} to TABLE in {Path(__file__).name}, below all that they import"


def test_the_table_of_the_documentation_has_the_same_order():
    listed = []
    for line in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            first, *rest = re.findall(r"`([\w/]+)`", line.split("|")[1])
            listed += [first.replace("/", ".") + name for name in rest] if first.endswith("/") else [first, *rest]
    assert listed and set(listed) <= set(ROW)
    assert listed == [name for name in ROW if name in listed]


@pytest.mark.parametrize("name", sorted(set(MODULES) & set(ROW)))
def test_imports_come_from_above(name):
    assert not violations(name, MODULES[name])


def test_packages_import_nothing_of_their_own():
    """But that the process is set up before anything else."""
    for path in PACKAGE.rglob("__init__.py"):
        allowed = {"runtime"} if path.parent == PACKAGE else set()
        assert {name for name, _ in own_imports(path)} <= allowed, path


@pytest.mark.parametrize("name", [*MATHS, "config", "data.rules", "data.coco", "data.listing", *CLIENT])
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
    assert {other for other, _ in own_imports(path)} <= {"runtime", "cli", "config", "evaluate", "training.run"}
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_the_check_itself_sees_every_way_to_import(tmp_path):
    """Each line is against the table for `boxes`, but the last."""
    path = tmp_path / "boxes.py"
    for code in (
        "from retinanet_keras import nms",
        "from retinanet_keras.nms import per_class",
        "import retinanet_keras.nms",
        "def f():\n    from retinanet_keras.data import coco",
        "from retinanet_keras import RetinaNet",
        "from retinanet_keras.boxes import iou",
    ):
        path.write_text(code)
        assert len(violations("boxes", path)) == 1, code
    path.write_text("import tensorflow\nfrom retinanet_keras.config import AnchorConfig")
    assert violations("boxes", path) == []
