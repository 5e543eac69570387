"""What a model costs: parameters, FLOPs and milliseconds, beside those of the other backbones on the same machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from captioning.config import Config
from captioning.inference.predictor import Predictor
from captioning.model.encoders import build_encoder

# Those a run's own is compared with.
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2")
_SECONDS, _MOST_RUNS = 0.6, 30  # how long, and how often, one thing is timed after a warm-up


@dataclass(frozen=True)
class BackboneCost:
    """One image through one backbone. A multiplication and an addition are two FLOPs; latency is the median."""

    name: str
    parameters: int
    flops: int
    latency_ms: float


@dataclass(frozen=True)
class Profile:
    """The run's backbone and others at its image size, and the run's own model from preprocessed images to words."""

    where: str
    image_size: int
    backbones: tuple[BackboneCost, ...]
    parameters: int
    caption_ms: float  # one image alone
    batch_size: int
    images_per_s: float  # in such batches


def machine(device: torch.device) -> str:
    """The processor or GPU, threads, and the version of torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(predictor: Predictor, batch_size: int = 16) -> Profile:
    """Time the predictor, its backbone and BACKBONES, whose weights do not matter here, on the predictor's device."""
    size, device = predictor.config.data.image_size, predictor.device
    options = replace(predictor.config, precision="no")
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
    pictures = [image.permute(1, 2, 0).numpy() for image in images]
    alone = _median_s(lambda: predictor.caption(pictures[:1]), device)
    together = _median_s(lambda: predictor.caption(pictures, batch_size), device)
    return Profile(
        f"{machine(device)}, load {os.getloadavg()[0]:.1f}",
        size,
        tuple(backbone_cost(name, options, device) for name in dict.fromkeys((*BACKBONES, options.encoder.name))),
        sum(p.numel() for model in predictor.models for p in model.parameters()),
        1e3 * alone,
        batch_size,
        batch_size / together,
    )


@torch.inference_mode()
def backbone_cost(name: str, config: Config, device: torch.device) -> BackboneCost:
    """One backbone on one image of the config's size, whole unless it is the config's own."""
    side = config.data.image_size
    last = config.encoder.last_stage if name == config.encoder.name else None
    encoder = cast(
        nn.Module, build_encoder(replace(config.encoder, name=name, last_stage=last, trainable="none"), side)
    )
    encoder = encoder.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter:
        encoder(image)
    parameters = sum(p.numel() for p in encoder.parameters())
    return BackboneCost(name, parameters, counter.get_total_flops(), 1e3 * _median_s(lambda: encoder(image), device))


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of ``work``, after one run that does not count."""
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _SECONDS and len(times) < _MOST_RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
