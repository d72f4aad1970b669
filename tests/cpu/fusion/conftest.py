import copy

import pytest
from test_fuse import quantized

from liquidgemm import fuse_


@pytest.fixture(scope="module")
def llama():
    model = quantized()
    fused = copy.deepcopy(model)
    return model, fused, fuse_(fused)
