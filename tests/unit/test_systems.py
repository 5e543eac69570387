"""The shipped configs: each is parsed, has the parameters of the system it is named after, trains and captions."""

import re
from pathlib import Path

import pytest
import torch

from captioning import config as configuration
from captioning.config import Config, flat
from captioning.data import captions as encoded
from captioning.data.captions import EncodedCaptions
from captioning.data.dataset import train_dataset
from captioning.data.transforms import preprocessing_of
from captioning.data.vocabulary import Vocabulary
from captioning.distributed.ranks import init_distributed
from captioning.model.captioner import Captioner
from captioning.model.encoders import build_encoder
from captioning.model.search import options_of, search
from captioning.runs import checkpoint
from captioning.runs.checkpoint import Checkpoint, RunState
from captioning.training.init_weights import OF_THE_MODEL
from captioning.training.objectives import CrossEntropy, scope_alone
from captioning.training.train_step import TrainStep
from shards import index as shard_index
from shards.dataset import ShardDataset
from tests.conftest import ROOT, settings

pytestmark = pytest.mark.slow

SECOND_STAGE = "_self_critical"
ALL = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
SYSTEMS = [name for name in ALL if name != "demo" and not name.endswith(SECOND_STAGE)]


def load(name: str, *overrides: str) -> Config:
    return configuration.load_config(ROOT / "configs" / f"{name}.yaml", list(overrides))


@pytest.mark.parametrize("name", ALL)
def test_a_config_says_its_command(name):
    path = ROOT / "configs" / f"{name}.yaml"
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(re.search(rf"captioning train {name}\b", line) for line in header)
    assert load(name).run.startswith(f"runs/{name}")


@pytest.mark.parametrize("name", [name for name in ALL if name.endswith(SECOND_STAGE)])
def test_a_second_stage_goes_on_from_its_first(name):
    """The same model, data and words; no dropout, since captions are drawn without it."""
    first, second = load(name.removesuffix(SECOND_STAGE)), load(name)
    assert second.init_from == first.run != second.run and second.train.objective == "self_critical"
    here, there = flat(second), flat(first)
    assert not [key for key in OF_THE_MODEL if here[key] != there[key]]
    assert here["decoder.dropout"] == 0
    assert all(here[key] == there[key] for key in ("data.train", "data.val", "data.image_size", "data.max_words"))
    assert 5e-6 <= second.optim.decoder_lr <= 5e-5


def train_batches(config: Config, shards: Path, folder: Path) -> tuple[ShardDataset, Vocabulary]:
    index = shard_index.load(shards / "train.json")
    vocabulary = encoded.encode(index, folder, config.data.min_word_freq, config.data.max_words)
    sizes = {"global_batch_size": config.train.global_batch_size, "micro_batch_size": config.train.micro_batch_size}
    captions, each = EncodedCaptions(folder), config.data.captions_per_image
    return train_dataset(index, captions, preprocessing_of(config), each, **sizes, rank=0, world_size=1), vocabulary


def train_step_of(config: Config, vocabulary: Vocabulary) -> TrainStep:
    torch.manual_seed(0)
    accelerator, ranks = init_distributed(config.precision)
    return TrainStep(Captioner(config, len(vocabulary)), CrossEntropy(), config, accelerator, ranks, total_steps=100)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_learns_and_captions(name, scene_shards, tmp_path):
    """A few steps on one batch, with the system's own backbone and decoder, on images of 64 pixels."""
    config = load(
        name,
        "precision=no",
        "encoder.weights=null",
        "encoder.freeze_batch_norm=false",  # without pretrained statistics the features would grow from stage to stage
        "data.resize_size=64",
        "data.image_size=64",
        "data.min_word_freq=1",
        "data.max_words=8",
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
        "optim.warmup_steps=0",
        "evaluate.min_words=1",
    )
    batches, vocabulary = train_batches(config, scene_shards, tmp_path)
    batch, train_step = batches.read(0), train_step_of(config, vocabulary)
    losses = [float(train_step.step(scope_alone(step, [batch]), [batch]).sums["loss"]) for step in range(6)]
    assert min(losses[-2:]) < losses[0]
    model = train_step.captioner.eval()
    found = search([model], batch.inputs, options_of(config.evaluate), config.data.max_words)
    assert [len(of_image) for of_image in found] == [config.evaluate.beam_size] * 2
    assert all(vocabulary.decode(hypothesis.ids) for of_image in found for hypothesis in of_image)


@pytest.mark.parametrize("kind", ["attention", "transformer", "updown"])
def test_any_cut_of_the_batch_updates_alike(kind, scene_shards, tmp_path, empty_config):
    """What test_training shows of the LSTM with real processes: one micro-batch or three, loss and penalty add up."""
    sizes = {"transformer": {"decoder__num_heads": 4, "decoder__encoder_layers": 1}}.get(kind, {})
    updated = []
    for micro in (8, 3):
        changes = {"decoder__name": kind, "train__micro_batch_size": micro, "train__total_steps": 9, **sizes}
        config = configuration.load_config(empty_config, settings(scene_shards, tmp_path, **changes))
        batches, vocabulary = train_batches(config, scene_shards, tmp_path / "encoded")
        parts = [batches.read(0, number) for number in range(batches.micro_batches(0))]
        train_step = train_step_of(config, vocabulary)
        train_step.optimizer.step = lambda: (
            None
        )  # the gradient is compared: Adam's first step shows little but its signs
        train_step.optimizer.zero_grad = lambda: None
        loss = train_step.step(scope_alone(0, parts), parts).sums["loss"]
        gradients = {name: p.grad for name, p in train_step.captioner.decoder.named_parameters()}
        updated.append((loss, gradients))
    (loss, gradients), (cut_loss, cut_gradients) = updated
    torch.testing.assert_close(loss, cut_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, cut_gradients[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["attention", "transformer", "updown"])
def test_a_continued_run_is_the_uninterrupted_one(kind, scene_shards, tmp_path, empty_config):
    """Bit for bit, with dropout, from what a checkpoint holds."""
    changes = {"decoder__name": kind, "decoder__dropout": 0.3, "decoder__num_heads": 4, "train__total_steps": 9}
    config = configuration.load_config(empty_config, settings(scene_shards, tmp_path, **changes))
    batches, vocabulary = train_batches(config, scene_shards, tmp_path / "encoded")

    def train(train_step: TrainStep, first: int, last: int) -> None:
        for step in range(first, last):
            parts = [batches.read(step, number) for number in range(batches.micro_batches(step))]
            train_step.step(scope_alone(step, parts), parts)

    whole, first, second = (train_step_of(config, vocabulary) for _ in range(3))
    train(whole, 0, 4)
    train(first, 0, 2)
    model, optimizer, _ = first.saved_state()
    texts = {"config.yaml": "", "vocabulary.json": ""}
    (tmp_path / "run").mkdir()
    saved = Checkpoint(checkpoint.save(tmp_path / "run", RunState(2, 16, 1, ""), model, optimizer, texts, keep=2))
    second.captioner.load_state_dict(saved.model())
    second.load(saved)
    train(second, 2, 4)
    state, expected = second.captioner.state_dict(), whole.captioner.state_dict()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_backbones_have_the_features_the_systems_are_built_on():
    sizes = {
        name: build_encoder(load(name).encoder).feature_size for name in SYSTEMS if "101" not in load(name).encoder.name
    }
    assert {size for name, size in sizes.items() if "mobilenet" in name} == {1280}
    assert {size for name, size in sizes.items() if "mobilenet" not in name} == {2048}


@pytest.mark.parametrize(
    ("name", "vocabulary", "parameters"),
    [
        # Linear + BatchNorm of the tutorial's encoder, then embedding, LSTM and classifier of its decoder.
        ("coco_resnet152_lstm", 9957, 2048 * 256 + 256 + 2 * 256 + 9957 * 256 + 4 * 512 * (256 + 512 + 2) + 513 * 9957),
        ("flickr8k_resnet50_lstm", 3000, 2049 * 256 + 2 * 256 + 3000 * 256 + 4 * 512 * (256 + 512 + 2) + 513 * 3000),
        ("classes_mobilenet_lstm", 100, 1281 * 300 + 2 * 300 + 100 * 300 + 4 * 512 * (300 + 512 + 2) + 513 * 100),
        ("coco_resnet50_lstm2", 9955, 2049 * 512 + 9955 * 512 + 2 * 4 * 512 * (512 + 512 + 2) + 513 * 9955),
        (
            "flickr8k_resnet101_attention",
            2633,
            # Of the tutorial's attention the biases on the query and the energy are left out: they change nothing.
            (2048 * 512 + 512 + 512 * 512 + 512)
            + 2633 * 512
            + 4 * 512 * (512 + 2048 + 512 + 2)
            + 2 * (2049 * 512)
            + 513 * 2048
            + 513 * 2633,
        ),
    ],
)
def test_a_system_has_the_parameters_of_its_namesake(name, vocabulary, parameters):
    """Beside the backbone: what the code it is named after would have with a vocabulary of that size."""
    with torch.device("meta"):
        model = Captioner(load(name), vocabulary)
    backbone = sum(p.numel() for p in model.encoder.parameters())
    assert sum(p.numel() for p in model.parameters()) - backbone == parameters
