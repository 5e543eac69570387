"""The step in real processes: any cut of the batch, steps that are skipped, stages that are thawed, fp16's scaler."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from captioning import config as configuration
from captioning.config import Config, DecoderConfig, EncoderConfig, OptimConfig, TrainConfig
from captioning.data.collate import CaptionBatch
from captioning.data.padded_captions import PaddedCaptions
from captioning.distributed.ranks import Ranks, init_distributed
from captioning.distributed.stop_signals import StopSignals
from captioning.model.captioner import Captioner
from captioning.runs import checkpoint
from captioning.training.experiment import Experiment
from captioning.training.objectives import CrossEntropy, StepScope
from captioning.training.train_step import TrainStep
from captioning.training.trainer import train
from shards import sources
from shards.errors import InputError
from shards.packing.packer import Settings, pack
from shards.sources import scenes
from tests.conftest import UNTRAINED_WORDS, settings, untrained_run
from tests.distributed.test_training import SAME, distance, parameters, reference, status
from tests.processes import in_processes


@pytest.fixture(scope="module")
def uneven_shards(tmp_path_factory) -> Path:
    """41 scenes with one to seven captions: an epoch of batches of 8 ends with a single image."""
    folder = tmp_path_factory.mktemp("uneven")
    images, captions = scenes.write(folder / "drawn", "train", 41, seed=1)
    document = json.loads(captions.read_text())
    first = {note["image_id"]: note["caption"] for note in reversed(document["annotations"])}
    document["annotations"] = [
        {"image_id": image, "caption": caption + " indeed" * again, "id": 10 * image + again}
        for image, caption in first.items()
        for again in range(1 + image % 7)
    ]
    captions.write_text(json.dumps(document))
    pack(sources.coco(images, captions), "train", folder / "shards", Settings())
    return folder / "shards"


def run_config(overrides: list[str], config: Path) -> None:
    train(configuration.load_config(config, overrides), StopSignals())


CUTS = {  # (processes, micro-batch); with three and four processes some have no image in an epoch's last step
    "none": [(1, 3), (3, 4), (4, 1)],
    "all": [(2, 4)],
}
RARE_CUTS = {"none": [(2, 1), (2, 2), (3, 1), (4, 2)], "all": [(1, 3), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2)]}


@pytest.mark.parametrize(
    ("trainable", "cuts"),
    [
        *((trainable, cuts) for trainable, cuts in CUTS.items()),
        *(pytest.param(trainable, cuts, marks=pytest.mark.sweep) for trainable, cuts in RARE_CUTS.items()),
    ],
)
def test_any_cut_of_the_batch_trains_what_a_plain_loop_does(uneven_shards, tmp_path, empty_config, trainable, cuts):
    """20 updates over three epochs, each of which ends with one image, against a loop without Accelerate."""
    changes = {"train__total_steps": 20, "encoder__trainable": trainable, "checkpoint__every_steps": 20}
    overrides = settings(uneven_shards, tmp_path / "unused", **changes)
    start = reference(overrides, empty_config, tmp_path / "encoded", steps=0)
    expected = reference(overrides, empty_config, tmp_path / "encoded", steps=20)
    for processes, micro in cuts:
        run = tmp_path / f"run-{processes}-{micro}"
        own = settings(uneven_shards, run, train__micro_batch_size=micro, **changes)
        in_processes(processes, run_config, own, empty_config)
        assert distance(parameters(run, 20), expected, start) < SAME[trainable], (processes, micro)


def test_thawed_at_a_step_and_continued_before_at_and_after_it(scene_shards, tmp_path, empty_config):
    """Two processes, bf16, averaged weights: the same bits wherever the run was taken up again."""
    changes = {
        "train__total_steps": 5,
        "train__global_batch_size": 6,
        "train__micro_batch_size": 2,  # a rank's third image is alone: stored statistics normalise it
        "train__ema_decay": 0.9,
        "encoder__trainable": "layer4",
        "encoder__unfreeze_at_step": 2,
        "encoder__freeze_batch_norm": "false",
        "encoder__gradient_checkpointing": "true",
        "checkpoint__every_steps": 1,
        "checkpoint__keep": 9,
        "optim__layerwise_lr_decay": 0.5,
        "precision": "bf16",
    }
    whole = tmp_path / "whole"
    in_processes(2, run_config, settings(scene_shards, whole, **changes), empty_config)
    at = {step: parameters(whole, step) for step in (1, 2, 3, 5)}
    encoder = [name for name in at[1] if name.startswith("encoder.stages.layer4")]
    below = [name for name in at[1] if name.startswith("encoder.stages.layer3")]
    assert all(torch.equal(at[1][name], at[2][name]) for name in encoder), "frozen until then, BatchNorm too"
    assert not any(torch.equal(at[2][name], at[3][name]) for name in encoder)
    assert all(torch.equal(at[1][name], at[5][name]) for name in below), "never to be trained"
    for step in (1, 2, 3):
        run = tmp_path / f"from-{step}"
        shutil.copytree(whole, run)
        for later in range(step + 1, 6):
            shutil.rmtree(run / "checkpoints" / f"step-{later:08d}")
        in_processes(2, run_config, settings(scene_shards, run, **changes), empty_config)
        ours, theirs = (checkpoint.find(place, "step-5", pytest.fail) for place in (run, whole))
        for mine, other in ((ours.model(), theirs.model()), (ours.captioner(), theirs.captioner())):
            assert not [name for name in other if not torch.equal(mine[name], other[name])], f"from step {step}"


def tiny(**train_settings) -> tuple[Config, Captioner]:
    """A captioner of 9 words in which word 8 is broken: no loss is finite that comes after it."""
    config = Config(
        encoder=EncoderConfig("resnet18", trainable="layer4"),
        decoder=DecoderConfig("lstm", 8, 8, 1),
        train=TrainConfig(**train_settings),
        optim=OptimConfig(decoder_lr=0.01),
    )
    torch.manual_seed(0)
    captioner = Captioner(config, 9)
    captioner.decoder.embedding.weight.data[8] = torch.nan
    return config, captioner


def batch_of(words: list[int], rank: int) -> CaptionBatch:
    torch.manual_seed(rank)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    keys = (f"left-{rank}", f"right-{rank}")
    lengths = torch.tensor([len(words)] * 2)
    captions = PaddedCaptions.of(torch.tensor([words] * 2), lengths, torch.tensor([0, 1]))
    return CaptionBatch(0, 0, images, captions, keys, ())


def everything_of(train_step: TrainStep) -> list[torch.Tensor]:
    model, optimizer, average = train_step.saved_state()
    moments = [value for state in optimizer["optimizer"]["state"].values() for value in state.values()]
    return [value.detach().clone().nan_to_num(7.0) for value in [*model.values(), *moments, *(average or {}).values()]]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def one_rank_has_no_finite_loss(folder: Path) -> None:
    accelerator, ranks = init_distributed("no")
    config, captioner = tiny(max_skipped_steps=2, ema_decay=0.9)
    train_step = TrainStep(captioner, CrossEntropy(), config, accelerator, ranks, total_steps=9)
    good, bad = batch_of([4, 5, 6], ranks.rank), batch_of([8, 5, 6] if ranks.rank == 1 else [4, 5, 6], ranks.rank)
    assert not train_step.step(StepScope(0, 2, 24.0, 2), [good, good]).skipped
    before = everything_of(train_step)
    update = train_step.step(StepScope(1, 2, 24.0, 2), [good, bad])
    assert update.skipped and update.culprits == ("step 2, rank 1: left-1 right-1",)
    assert same(everything_of(train_step), before), "weights, statistics, moments and averages are untouched"
    assert not train_step.step(StepScope(2, 2, 12.0, 2), [good]).skipped
    assert not same(everything_of(train_step), before)
    train_step.step(StepScope(3, 2, 12.0, 2), [bad])
    with pytest.raises(InputError, match="2 steps in a row") as error:
        train_step.step(StepScope(4, 2, 12.0, 2), [bad])
    assert "step 5, rank 1: left-1 right-1\n  step 4, rank 1: left-1 right-1" in str(error.value)
    (folder / f"{ranks.rank}").touch()
    ranks.barrier()
    train_step.replica.release()
    accelerator.end_training()


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all_and_its_samples_named(tmp_path):
    in_processes(2, one_rank_has_no_finite_loss, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def fp16_scaler(folder: Path) -> None:
    """fp16's scaler around a model that computes in fp32: torch has no fp16 LSTM for CPUs."""
    batch, weight = batch_of([4, 5, 6], 0), "decoder.classifier.weight"
    config, plain = tiny()
    train_step = TrainStep(plain, CrossEntropy(), config, Accelerator(mixed_precision="no", cpu=True), Ranks(0, 1), 9)
    for step in range(3):
        norm = train_step.step(StepScope(step, 2, 6.0, 1), [batch]).gradient_norm
    accelerator = train_step.accelerator
    train_steps = []
    for _ in range(2):
        accelerator.native_amp = False
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
        accelerator.state._shared_state["_mixed_precision"] = "fp16"
        train_steps.append(TrainStep(tiny()[1], CrossEntropy(), config, accelerator, Ranks(0, 1), 9))
        accelerator.native_amp = True  # gradients are unscaled; the forward pass was wrapped before
    scaled, other = train_steps
    accelerator.scaler = scaled.optimizer.scaler
    before, skipped = everything_of(scaled), 1
    assert scaled.step(StepScope(0, 2, 6.0, 1), [batch]).skipped
    assert same(everything_of(scaled)[: len(before)], before), "moments have been made, and are nought"
    before = everything_of(scaled)
    while scaled.step(StepScope(0, 2, 6.0, 1), [batch]).skipped:
        assert same(everything_of(scaled), before)
        skipped += 1
    assert skipped > 2
    for step in (1, 2):
        update = scaled.step(StepScope(step, 2, 6.0, 1), [batch])
    assert update.gradient_norm == pytest.approx(norm, rel=1e-3), "clipped after unscaling"
    torch.testing.assert_close(scaled.captioner.state_dict()[weight], plain.state_dict()[weight], rtol=1e-3, atol=1e-5)
    saved = scaled.saved_state()
    assert saved[1]["scaler"]["scale"] < 2.0**127
    checkpoint.save(folder, checkpoint.RunState(3, 6, 1, ""), *saved[:2], {"config.yaml": "", "vocabulary.json": ""}, 2)
    accelerator.scaler = other.optimizer.scaler
    other.load(checkpoint.find(folder, "latest", pytest.fail))
    assert other.saved_state()[1]["scaler"] == saved[1]["scaler"]


def test_fp16_scales_skips_what_overflows_and_its_scale_is_saved(tmp_path):
    in_processes(1, fp16_scaler, tmp_path)


@pytest.mark.parametrize("setting", ["precision=fp16", "train.sync_batch_norm=true"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_is_refused_without(scene_shards, tmp_path, empty_config, setting):
    from captioning.runs.run_folder import RunFolder
    from captioning.training.preparation import prepare

    overrides = [*settings(scene_shards, tmp_path / "run", train__epochs=1), setting]
    with pytest.raises(InputError, match="needs"), RunFolder(tmp_path / "run") as folder:
        prepare(configuration.load_config(empty_config, overrides), folder, 1, lambda done, total: None)
    assert not (tmp_path / "run").exists()


def test_synchronised_batch_norm_keeps_names_and_sees_a_single_image():
    _, captioner = tiny()
    names, x = list(captioner.state_dict()), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    nn.SyncBatchNorm.convert_sync_batchnorm(captioner)
    assert list(captioner.state_dict()) == names
    captioner.projection = captioner.projection[0]
    before = captioner.encoder.stages["layer4"][0].bn1.running_mean.clone()
    captioner.train()(x, PaddedCaptions.of(torch.tensor([[4, 5]]), torch.tensor([2]), torch.tensor([0])))
    assert not torch.equal(captioner.encoder.stages["layer4"][0].bn1.running_mean, before), "it takes part in them"


def compiled_steps(folder: Path) -> None:
    states = []
    for compiled in (False, True):
        config, _ = tiny()
        config = replace(
            config,
            train=replace(config.train, compile=compiled),
            decoder=replace(config.decoder, name="attention"),
        )
        torch.manual_seed(0)
        captioner = Captioner(config, 9)
        train_step = TrainStep(captioner, CrossEntropy(), config, Accelerator(cpu=True), Ranks(0, 1), 9)
        train_step.step(StepScope(0, 2, 6.0, 1), [batch_of([4, 5, 6], 0)])
        states.append(train_step.saved_state()[0])
    plain, compiled_state = states
    assert plain.keys() == compiled_state.keys()
    for weight in ("encoder.stages.layer4.0.bn1.running_mean", "decoder.attention.query.weight"):
        torch.testing.assert_close(plain[weight], compiled_state[weight], rtol=1e-3, atol=1e-4)


@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++), and there is none")
def test_compiled_parts_keep_their_names_and_statistics(tmp_path):
    in_processes(1, compiled_steps, tmp_path)


UNFITTING = r"step-00000001 does not fit this run's model: .*\n.*version"


def loads_other_optimizers(folder: Path) -> None:
    config, captioner = tiny(ema_decay=0.9)
    train_step = TrainStep(captioner, CrossEntropy(), config, Accelerator(cpu=True), Ranks(0, 1), 9)
    train_step.step(StepScope(0, 2, 6.0, 1), [batch_of([4, 5, 6], 0)])
    model, optimizer, average = train_step.saved_state()
    groups, moments = (optimizer["optimizer"][part] for part in ("param_groups", "state"))
    longer = {0: {**moments[0], "exp_avg": torch.zeros(3)}}
    others = {
        "groups": (average, {"optimizer": {"param_groups": groups[:-1], "state": moments}}),
        "shapes": (average, {"optimizer": {"param_groups": groups, "state": moments | longer}}),
        "nothing": (average, {}),
        "average": ({"other": torch.zeros(3)}, optimizer),
    }
    for name, (averages, state) in others.items():
        texts = {"config.yaml": "", "vocabulary.json": ""}
        (folder / name).mkdir()
        checkpoint.save(folder / name, checkpoint.RunState(1, 6, 1, ""), model, state, texts, 2, averages)
        with pytest.raises(InputError, match=UNFITTING):
            train_step.load(checkpoint.find(folder / name, "latest", pytest.fail))
    (folder / "all refused").touch()


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    in_processes(1, loads_other_optimizers, tmp_path)
    assert (tmp_path / "all refused").exists()


def continues_with_sgd(folder: Path) -> None:
    config, captioner = tiny()
    config = replace(config, optim=replace(config.optim, name="sgd"))
    train_step = TrainStep(captioner, CrossEntropy(), config, Accelerator(cpu=True), Ranks(0, 1), 9)
    train_step.step(StepScope(0, 2, 6.0, 1), [batch_of([4, 5, 6], 0)])
    model, optimizer, _ = train_step.saved_state()
    texts = {"config.yaml": "", "vocabulary.json": ""}
    checkpoint.save(folder, checkpoint.RunState(1, 6, 1, ""), model, optimizer, texts, 2, None)
    buffers = [state["momentum_buffer"] for state in train_step.optimizer.state.values()]
    kept = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.zero_()
    train_step.load(checkpoint.find(folder, "latest", pytest.fail))
    loaded = [state["momentum_buffer"] for state in train_step.optimizer.state.values()]
    assert kept and all(torch.equal(now, then) for now, then in zip(loaded, kept, strict=True))
    (folder / "continued").touch()


def test_sgd_is_continued_with_its_momentum(tmp_path):
    in_processes(1, continues_with_sgd, tmp_path)
    assert (tmp_path / "continued").exists()


def test_weights_of_another_model_are_refused(tmp_path):
    run = untrained_run(tmp_path)
    found = checkpoint.find(run, "latest", pytest.fail)
    config = configuration.load_config(
        run / "config.yaml", settings(run, run, decoder__hidden_size=24, train__epochs=1)
    )
    experiment = Experiment(None, None, UNTRAINED_WORDS, None, None, None, found, found.state, [], 0)
    with pytest.raises(InputError, match=UNFITTING):
        experiment.build_model(config, is_main=True)


@pytest.mark.parametrize("split", ["train", pytest.param("val", marks=pytest.mark.sweep)])
def test_what_one_rank_cannot_read_ends_all_with_its_words(scene_shards, tmp_path, empty_config, split):
    """One line of an ``.idx`` is garbled: only the rank that has that sample reads it."""
    run, shards = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(scene_shards, shards)
    idx = next(shards.glob(f"{split}-*.idx"))
    lines = idx.read_text().splitlines()
    idx.write_text("\n".join([*lines[:-1], lines[-1].replace(" ", "")]) + "\n")
    changes = {"train__total_steps": 9, "train__global_batch_size": 40}
    if split == "val":
        changes |= {"data__val": shards / "val.json", "evaluate__batch_size": 3, "evaluate__every_steps": 1}
    in_processes(2, meets_the_garbled_line, settings(shards, run, **changes), empty_config, split)
    if split == "train":
        assert status(run)[0] == "failed"
    else:
        assert not (run / "status").exists(), "rank 0 looks at some validation images before it starts"


def meets_the_garbled_line(overrides: list[str], config: Path, split: str) -> None:
    with pytest.raises(InputError) as error:
        run_config(overrides, config)
    assert re.search(rf"/{split}-000000.idx: its bytes are not those that the index was written with", str(error.value))


def threads_of_a_rank(folder: Path) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(4)
    init_distributed("no")
    (folder / "threads").write_text(str(torch.get_num_threads()))


def test_a_rank_keeps_to_the_cores_it_may_use(tmp_path):
    in_processes(1, threads_of_a_rank, tmp_path)
    assert (tmp_path / "threads").read_text() == "1"
