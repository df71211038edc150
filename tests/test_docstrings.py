"""The examples in the docstrings of public classes run as they stand."""

import re
import textwrap

import pytest

from retinanet_keras import CocoMetrics, RetinaNet, losses

pytestmark = pytest.mark.eager

WITH_EXAMPLE = [RetinaNet, *losses.LOSS_OF.values()]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def examples(kind):
    return BLOCK.findall(textwrap.dedent("    " + kind.__doc__))


@pytest.mark.parametrize("kind", WITH_EXAMPLE)
def test_a_public_class_has_an_example(kind):
    assert examples(kind)


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=kind.__name__) for kind in [*WITH_EXAMPLE, CocoMetrics] for code in examples(kind)]
)
def test_an_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
