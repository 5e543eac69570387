"""How this process's GPU computes: how exactly it multiplies float32, and in which order it adds."""

import os

import torch


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products, convolutions and recurrences alike, may round their factors to TF32's 10 bits, which
    NVIDIA's GPUs since 2020 multiply several times as fast. PyTorch's own default is yes for the last two alone."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def enable_determinism() -> None:
    """From now on GPU kernels give the same bits for the same input, where there are such kernels; of any other PyTorch
    warns (https://pytorch.org/docs/stable/notes/randomness.html). A CPU does so anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS asks for; read when it is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    # With nothing but a warning, the attention kernels that are no plain products would still add in any order.
    for enable in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        getattr(torch.backends.cuda, enable)(False)
