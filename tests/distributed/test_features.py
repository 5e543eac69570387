"""Features of a frozen encoder, encoded once: the same bytes by any number of processes, and training from them."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from captioning import config as configuration
from captioning.config import Config, DataConfig, DecoderConfig, EncoderConfig
from captioning.data.captions import EncodedCaptions
from captioning.data.captions import encode as encode_captions
from captioning.data.dataset import EvaluationBatches, train_dataset
from captioning.data.stored_features import stored_features
from captioning.data.transforms import preprocessing_of
from captioning.distributed.ranks import Ranks, init_distributed
from captioning.distributed.stop_signals import StopSignals
from captioning.inference.encode_split import Encoding, FrozenEncoder, encode_split
from captioning.inference.evaluate_run import caption_run
from captioning.inference.predictor import Predictor
from captioning.model.captioner import Captioner
from captioning.model.encoder_identity import first_encoder
from captioning.model.search import SearchOptions
from captioning.training.trainer import train
from shards import index as shard_index
from shards import sources
from shards.errors import InputError
from shards.index import Index
from shards.packing.packer import Settings, pack
from shards.reader import read_samples
from shards.sources import rich_scenes, scenes
from tests.conftest import settings, with_one_broken_image
from tests.distributed.test_training import SAME, distance, parameters
from tests.processes import in_processes

# The smallest frozen run: a random encoder that its seed draws.
FROZEN = {"encoder__trainable": "none", "train__total_steps": 12, "checkpoint__every_steps": 12}

# Pictures of 3 : 2 lack a row or column of 8 x 8 places at each side of them.
PADDED = {"data__crop_mode": "pad", "data__image_size": 64, "encoder__last_stage": "layer2"}
LAYERED = {"decoder__encoder_layers": 1, "decoder__num_heads": 2}  # of a Transformer

ALONE, GREEDY = Ranks(0, 1), SearchOptions()


def config_of(shards: Path, run: Path, empty_config: Path, **changes) -> Config:
    return configuration.load_config(empty_config, settings(shards, run, **FROZEN | changes))


def encoded(shards: Path, out: Path, config: Config, split: str = "train", ranks: Ranks | None = None, **how) -> Index:
    """A split through the config's encoder, in this process."""
    pooled = config.decoder.name == "lstm"
    model = FrozenEncoder(first_encoder(config), config, pooled, torch.device("cpu"))
    encoding = Encoding(**{"batch_size": 4, "samples_per_shard": 16} | how)
    return encode_split(shard_index.load(shards / f"{split}.json"), model, out, encoding, ranks or Ranks(0, 1))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_of(config: Config) -> Path:
    train(config, StopSignals())
    return Path(config.run)


@pytest.fixture(scope="module")
def wide_shards(tmp_path_factory) -> Path:
    """As ``scene_shards``, of wide and tall pictures."""
    folder = tmp_path_factory.mktemp("wide")
    for split, count in (("train", 24), ("val", 10)):
        drawn = scenes.write(folder / "drawn", split, count, 0, rich_scenes.scene, rich_scenes.captions)
        pack(sources.coco(*drawn), split, folder / "shards", Settings())
    return folder / "shards"


@pytest.fixture(scope="module")
def features(scene_shards, tmp_path_factory, empty_config) -> Path:
    """Both splits in float32, plain views, pooled, by the encoder of TINY's seed."""
    folder = tmp_path_factory.mktemp("features")
    config = config_of(scene_shards, folder / "run", empty_config)
    for split in ("train", "val"):
        encoded(scene_shards, folder, config, split, dtype="float32")
    return folder


def test_a_split_of_features_is_a_split_like_any_other(scene_shards, features):
    """Same samples in the same order, verifiable, readable by the stock library, and it says which encoder it was."""
    webdataset = pytest.importorskip("webdataset")
    index, images = (shard_index.load(folder / "train.json") for folder in (features, scene_shards))
    shard_index.verify(index)
    assert index.texts() == images.texts() and len(index.shards) == 3
    assert index.document["packing"]["short_side"] == images.document["packing"]["short_side"]
    stored = stored_features(index)
    assert (stored.encoder, stored.form, stored.size, stored.views) == ("resnet18", "pooled", 512, 1)
    assert stored.preprocessing["image_size"] == 32 and stored.preprocessing["crop_mode"] == "crop"
    path = str(index.shards[1].path)
    samples = list(webdataset.WebDataset(path, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [text.key for text in index.texts()[16:32]]
    assert all(sample["npy"].shape == (512,) and sample["json"]["captions"] for sample in samples)


def test_stored_features_are_what_the_encoder_says(scene_shards, features, tmp_path, empty_config):
    config = config_of(scene_shards, tmp_path, empty_config)
    pixels, stored = (
        EvaluationBatches(shard_index.load(folder / "val.json"), preprocessing_of(config))[0, 8].inputs
        for folder in (scene_shards, features)
    )
    encoder = first_encoder(config).eval()
    with torch.inference_mode():
        expected = torch.cat([encoder.pooled(pixels[:4]), encoder.pooled(pixels[4:])])
    assert torch.equal(stored, expected) and stored.dtype == torch.float32


def encode_in_a_rank(shards: Path, out: Path, config: Config, how: dict) -> None:
    accelerator, ranks = init_distributed("no")
    encoded(shards, out, config, ranks=ranks, **how)
    accelerator.end_training()


def test_of_padded_images_what_shows_them_is_stored_and_batched_as_of_pixels(wide_shards, tmp_path, empty_config):
    """A rectangle of places each, which a batch has where the padded pixels have it, with the same mask."""
    config = config_of(wide_shards, tmp_path, empty_config, decoder__name="attention", **PADDED)
    features = encoded(wide_shards, tmp_path / "out", config, "val", dtype="float32")
    shapes = {np.load(io.BytesIO(sample.image_bytes)).shape for sample in read_samples(features, range(len(features)))}
    assert shapes == {(8, 6, 128), (6, 8, 128)}
    images = shard_index.load(wide_shards / "val.json")
    pixels, stored = (EvaluationBatches(index, preprocessing_of(config))[0, 8] for index in (images, features))
    model = Captioner(config, 9).eval()
    model.encoder.load_state_dict(first_encoder(config).state_dict())
    seen, read = model.encode(pixels.inputs, pixels.valid), model.encode(stored.inputs, stored.valid)
    assert seen.mask is not None and torch.equal(seen.mask, read.mask) and not seen.mask.all() and read.square
    torch.testing.assert_close(read.grid[read.mask], seen.grid[seen.mask])
    assert not read.grid[~read.mask].any()


def test_any_number_of_processes_writes_the_same_bytes(scene_shards, tmp_path, empty_config):
    config = config_of(scene_shards, tmp_path, empty_config, data__flip="true")
    how = {"views": 2, "samples_per_shard": 8}
    for processes in (1, 3):
        in_processes(processes, encode_in_a_rank, scene_shards, tmp_path / f"by-{processes}", config, how)
    alone, together = files_in(tmp_path / "by-1"), files_in(tmp_path / "by-3")
    assert alone == together and len(alone) == 6 * 4 + 1


def test_a_killed_encoding_goes_on_where_it_was(scene_shards, tmp_path, empty_config):
    """SIGKILL in the midst of it: finished shards are not touched again, and the whole is what one go makes."""
    config = config_of(scene_shards, tmp_path, empty_config)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    how = {"samples_per_shard": 2, "batch_size": 1}
    encoded(scene_shards, whole, config, **how)
    code = (
        "import sys; from pathlib import Path; from tests.distributed.test_features import *\n"
        f"c = config_of(Path({str(scene_shards)!r}), Path({str(tmp_path)!r}), Path({str(empty_config)!r}))\n"
        f"encoded(Path({str(scene_shards)!r}), Path({str(out)!r}), c, samples_per_shard=2, batch_size=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent.parent)
    deadline = time.monotonic() + 240
    while len(list(out.glob("train-*.tar")) if out.exists() else []) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("train-*.tar")}
    assert 3 <= len(done) < 22 and not (out / "train.json").exists()
    encoded(scene_shards, out, config, **how)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert files_in(out) == files_in(whole)


def test_unreadable_images_are_left_out_and_listed(scene_shards, tmp_path, empty_config):
    index, extent = with_one_broken_image(scene_shards, tmp_path / "broken")
    config = config_of(tmp_path / "broken", tmp_path / "run", empty_config)
    found = encoded(tmp_path / "broken", tmp_path / "out", config)
    assert [entry["image"] for entry in found.document["skipped"]] == [extent.key]
    assert [text.key for text in found.texts()] == [text.key for text in index.texts() if text.key != extent.key]
    shard_index.verify(found)


def test_another_encoding_of_the_name_is_refused(scene_shards, features, tmp_path, empty_config):
    config = config_of(scene_shards, tmp_path, empty_config, seed=1)
    before = files_in(features)
    with pytest.raises(InputError, match="already holds split 'train'"):
        encoded(scene_shards, features, config, dtype="float32")
    assert files_in(features) == before


def test_each_view_is_an_epochs_crop_and_training_takes_turns(scene_shards, tmp_path, empty_config):
    """Three views: those of epochs 0 to 2 of a run; an image is seen in another one each epoch, and in all of them."""
    config = config_of(scene_shards, tmp_path / "run", empty_config, data__image_size=24, data__flip="true")
    index = encoded(scene_shards, tmp_path / "out", config, views=3, dtype="float32")
    shard_index.verify(index)
    images = shard_index.load(scene_shards / "train.json")
    encoder, seen = first_encoder(config).eval(), []
    for epoch in range(3):
        pixels = EvaluationBatches(images, preprocessing_of(config), (config.seed, epoch))[4, 8].inputs
        with torch.inference_mode():
            seen.append(encoder.pooled(pixels)[1])  # of sample 5
    stored = [np.load(io.BytesIO(next(read_samples(index, [5], [view])).image_bytes)) for view in range(3)]
    assert all(np.array_equal(one, other) for one, other in zip(stored, seen, strict=True))
    encode_captions(index, tmp_path / "words", 1, 20)
    dataset = train_dataset(
        index, EncodedCaptions(tmp_path / "words"), preprocessing_of(config), 5,
        seed=config.seed, global_batch_size=44, rank=0, world_size=1,
    )  # fmt: skip
    views = [dict(dataset.decoded(epoch, [5])).popitem()[1][0] for epoch in range(4)]
    assert {view.tobytes() for view in views} == {view.tobytes() for view in stored}
    assert np.array_equal(views[0], views[3]), "the same sample in the same epoch, for whoever asks"


@pytest.mark.parametrize(
    ("decoder", "seen"),
    [
        ("lstm", {}),
        ("attention", {"encoder__grid_size": 3}),
        ("lstm", PADDED),
        ("attention", PADDED),
        ("transformer", PADDED | LAYERED),
    ],
)
def test_training_from_features_is_training_from_pixels(
    scene_shards, wide_shards, features, tmp_path, empty_config, decoder, seen
):
    """float32, plain views, no augmentation: the same parameters to rounding, and the same samples in the ledger."""
    images = wide_shards if PADDED.items() <= seen.items() else scene_shards
    changes = {"decoder__name": decoder, "data__val": images / "val.json", "evaluate__every_steps": 12, **seen}
    folder = features
    if seen:
        folder = tmp_path / "encoded"
        encoded(images, folder, config_of(images, tmp_path / "x", empty_config, **changes), dtype="float32")
    start = config_of(images, tmp_path / "start", empty_config, **changes | {"train__total_steps": 1})
    runs = [
        run_of(config_of(place, tmp_path / f"run-{number}", empty_config, **changes))
        for number, place in enumerate((images, folder))
    ]
    pixels, stored = (parameters(run, 12) for run in runs)
    assert distance(stored, pixels, parameters(run_of(start), 1)) < SAME["none"]
    ledgers = [sorted((run / "ledger").glob("*.txt"))[0].read_text() for run in runs]
    assert ledgers[0] == ledgers[1]
    scores = [json.loads((run / "scores.jsonl").read_text().splitlines()[-1]) for run in runs]
    forced = [score.pop("teacher_forcing") for score in scores]
    assert all(score.pop("provenance") for score in scores)
    assert forced[0] == pytest.approx(forced[1], rel=1e-3) and scores[0] == pytest.approx(scores[1], abs=1e-2)


@pytest.mark.parametrize(
    "padded",
    [{}, PADDED | LAYERED | {"decoder__name": "transformer", "decoder__embedding_size": 16}],
    ids=["crop", "pad"],
)
def test_a_run_from_features_captions_raw_images_as_it_captions_features(
    scene_shards, wide_shards, features, tmp_path, empty_config, padded
):
    """The checkpoint holds the encoder: raw images and their features give the same captions and loss."""
    images_of = wide_shards if padded else scene_shards
    if padded:
        features = tmp_path / "encoded"
        for split in ("train", "val"):
            encoded(
                images_of,
                features,
                config_of(images_of, tmp_path / "x", empty_config, **padded),
                split,
                dtype="float32",
            )
    changes = {"data__val": features / "val.json", "train__total_steps": 6, "decoder__embedding_size": 32, **padded}
    run = run_of(config_of(features, tmp_path / "run", empty_config, **changes))
    predictor = Predictor.from_checkpoint(run, "latest", "cpu")
    both = [caption_run(predictor, run, str(folder / "val.json"), ALONE, GREEDY) for folder in (features, images_of)]
    assert both[0].captions.captions == both[1].captions.captions
    losses = [one.about["teacher_forcing"]["loss"] for one in both]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    images = shard_index.load(images_of / "val.json")
    raw = [sample.image_bytes for sample in read_samples(images, range(len(images)))]
    assert [caption.text for caption in predictor.caption(raw)] == list(both[0].captions.captions)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder__trainable": "layer4"}, "an encoder learns from pixels"),
        ({"encoder__name": "resnet34"}, "encoder.name: resnet18 there, resnet34 here"),
        ({"data__resize_size": 40}, "data.resize_size: 32 there, 40 here"),
        ({"encoder__last_stage": "layer3"}, "encoder.last_stage: None there, layer3 here"),
        ({"seed": 5}, "other weights than this run's.*drawn by seed=5"),
        ({"decoder__name": "attention"}, "encode the images with --grid"),
    ],
)
def test_features_of_another_encoder_are_refused(features, tmp_path, empty_config, changes, said):
    config = config_of(features, tmp_path / "run", empty_config, **changes)
    with pytest.raises(InputError, match=said):
        train(config, StopSignals())
    assert not (tmp_path / "run").exists()


def test_a_run_evaluates_on_features_of_its_own_encoder_alone(scene_shards, features, tmp_path, empty_config):
    changes = {"train__total_steps": 1, "seed": 3}
    run = run_of(config_of(scene_shards, tmp_path / "run", empty_config, **changes))
    with pytest.raises(InputError, match="with other weights than this run's"):
        caption_run(
            Predictor.from_checkpoint(run, "latest", "cpu"),
            run,
            str(features / "val.json"),
            Ranks(0, 1),
            SearchOptions(),
        )


def test_a_file_that_is_no_such_feature_is_unreadable_and_costs_its_place_only(features, tmp_path, empty_config):
    index, extent = with_one_broken_image(features, tmp_path / "broken")
    batch = EvaluationBatches(index, preprocessing_of(Config()))[0, 16]
    assert [one.key for one in batch.unreadable] == [extent.key] and len(batch.inputs) == 15


def write_given(folder: Path, shards: Path, split: str, places: list[int] | None) -> tuple[Path, Path]:
    """Others' features of a split: ID.npz of ``places`` boxes [P, 6] in turn (None: vectors), and COCO captions."""
    folder.mkdir()
    generator, texts = np.random.default_rng(0), shard_index.load(shards / f"{split}.json").texts()
    for number, text in enumerate(texts):
        shape = (6,) if places is None else (places[number % len(places)], 6)
        np.savez(folder / f"{text.image_id}.npz", features=generator.normal(size=shape).astype(np.float32))
    images = [{"id": text.image_id, "file_name": f"COCO_{number}.jpg"} for number, text in enumerate(texts)]
    annotations = [{"image_id": text.image_id, "caption": caption} for text in texts for caption in text.captions]
    captions = folder.with_suffix(".json")
    captions.write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder, captions


def pack_given(folder: Path, captions: Path, out: Path, *more: str) -> Index:
    """``captioning pack features``, in this process."""
    from launch.cli import pack_arguments
    from launch.pack import _named

    line = ["features", "--features", folder, "--captions", captions, "--split", "train", "--out", out, *more]
    arguments = pack_arguments.parser("").parse_args(list(map(str, line)))
    source = _named(arguments.kind.read(arguments, out), arguments.split, None)["train"]
    return pack(source, "train", out, Settings(shard_mb=1))


GIVEN = {"encoder__name": "features", "encoder__feature_size": 6}


@pytest.mark.parametrize(
    ("places", "decoder"), [([3, 5, 1], "lstm"), (None, "lstm"), ([4], "attention"), ([3, 5, 1], "attention")]
)
def test_features_of_others_are_packed_and_trained_on(scene_shards, tmp_path, empty_config, places, decoder):
    folder, captions = write_given(tmp_path / "given", scene_shards, "train", places)
    index = pack_given(folder, captions, tmp_path / "out", "--dtype", "float32")
    shard_index.verify(index)
    assert len(index) == 44 and stored_features(index).weights_sha256 is None
    batch = EvaluationBatches(index, preprocessing_of(Config()))[0, 3]
    for row, text in enumerate(index.texts()[:3]):
        given = np.load(folder / f"{text.image_id}.npz")["features"]
        kept = batch.inputs[row].numpy()
        assert np.array_equal(kept[: len(given)], given) and not kept[len(given) :].any()
        if batch.valid is not None:
            assert batch.valid[row].tolist() == [place < len(given) for place in range(len(kept))]
    changes = GIVEN | {"decoder__name": decoder, "train__total_steps": 3}
    run = run_of(config_of(tmp_path / "out", tmp_path / "run", empty_config, **changes))
    predictor = Predictor.from_checkpoint(run, "latest", "cpu")
    assert len(caption_run(predictor, run, "train", ALONE, GREEDY).captions.captions) == 44
    image = next(read_samples(shard_index.load(scene_shards / "val.json"), [0])).image_bytes
    with pytest.raises(InputError, match="it cannot see an image"):
        predictor.caption(image)


def test_the_mean_is_over_the_places_that_there_are():
    config = Config(
        data=DataConfig("x"),
        encoder=EncoderConfig("features", feature_size=6, projection_batch_norm=False),
        decoder=DecoderConfig("lstm", 8, 8),
    )
    model, boxes = Captioner(config, 9).eval(), torch.randn(2, 5, 6)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    alone = model.encode(boxes[1:, :3])
    torch.testing.assert_close(model.encode(boxes, valid).grid[1], alone.grid[0])


def test_features_that_do_not_fit_are_told(scene_shards, tmp_path, empty_config):
    folder, captions = write_given(tmp_path / "given", scene_shards, "train", [3, 5])
    files = sorted(folder.iterdir())
    np.savez(files[1], features=np.ones((2, 7), np.float32))
    with files[2].open("wb") as file:
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    index = pack_given(folder, captions, tmp_path / "out")
    reasons = sorted(skip["reason"] for skip in index.document["skipped"])
    assert len(index) == 42 and reasons[0].startswith("Object arrays cannot be loaded")
    assert reasons[1] == "grid features of 7, not grid of 6 as others"
    for changes, said in (({"encoder__feature_size": 5}, "set encoder.feature_size=6"),):
        with pytest.raises(InputError, match=said):
            train(config_of(tmp_path / "out", tmp_path / "run", empty_config, **GIVEN | changes), StopSignals())
