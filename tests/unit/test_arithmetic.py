"""TF32 is one setting for products, convolutions and recurrences. Which GPU kernels obey, only a GPU can tell. And
what is said of GPUs of several kinds."""

import pytest
import torch

from captioning.distributed.arithmetic import allow_tf32
from captioning.distributed.ranks import _warn_of_kinds, init_distributed


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


def test_gpus_of_several_kinds_are_warned_of(caplog):
    _warn_of_kinds(["NVIDIA T4", "NVIDIA T4"])
    assert not caplog.records
    _warn_of_kinds(["NVIDIA T4", "NVIDIA H100", "NVIDIA T4"])
    assert "compute on NVIDIA H100 and NVIDIA T4: a step takes as long as on the slowest" in caplog.text
