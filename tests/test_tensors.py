"""Arithmetic on sizes, known before a graph runs and not."""

import pytest
from keras import ops

from retinanet_keras.tensors import round_up, smaller

pytestmark = pytest.mark.check


@pytest.mark.parametrize("size, multiple, expected", [(1, 32, 32), (32, 32, 32), (33, 32, 64), (800, 128, 896)])
def test_round_up(size, multiple, expected):
    rounded = round_up(size, multiple)
    assert rounded == expected and isinstance(rounded, int)
    assert int(round_up(ops.convert_to_tensor(size), multiple)) == expected


def test_smaller():
    assert smaller(3, 5) == smaller(5, 3) == 3 and isinstance(smaller(3, 5), int)
    assert int(smaller(ops.convert_to_tensor(3), 5)) == int(smaller(5, ops.convert_to_tensor(3))) == 3
