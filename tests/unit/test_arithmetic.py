"""TF32 is one setting for products, convolutions and recurrences. Which GPU kernels obey, only a GPU can tell."""

import pytest
import torch

from captioning.distributed.arithmetic import allow_tf32
from captioning.distributed.ranks import init_distributed


@pytest.fixture(autouse=True)
def settings_of_torch():
    products, others = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = others


@pytest.mark.parametrize("allowed", [True, False])
def test_one_setting_holds_for_all_of_them(allowed):
    allow_tf32(not allowed)
    init_distributed("no", tf32=allowed)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
