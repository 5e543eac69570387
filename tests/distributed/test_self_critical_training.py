"""Self-critical runs as people start them: any cut of the batch, killed and continued, from another run's weights, by
any tokenizer."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioning import config as configuration
from captioning.data import vocabulary as vocab
from captioning.data.captions import captions_of
from captioning.data.tokenizer import TOKENIZERS
from captioning.data.vocabulary import Vocabulary
from captioning.metrics import references
from captioning.metrics.ptb import CHARACTERS, TOKENIZER
from captioning.runs import checkpoint
from captioning.runs.run_folder import RunFolder
from captioning.training.preparation import prepare
from captioning.training.reference_counts import count_references
from shards import index as shard_index
from shards import sources
from shards.errors import InputError
from shards.packing.packer import Settings, pack
from tests.conftest import (
    UNTRAINED_WORDS,
    settings,
    train_command,
    untrained_run,
    with_one_broken_image,
    write_coco,
)
from tests.distributed.test_train_step import run_config
from tests.distributed.test_training import SAME, assert_same_bits, distance, killed_at, parameters, trained
from tests.processes import in_processes
from tests.scripts import captions_in
from tests.system.test_pack import jpeg

SELF_CRITICAL = {
    "train__objective": "self_critical",
    "self_critical__samples": 3,
    "encoder__trainable": "none",
    "data__max_words": 6,
    "optim__decoder_lr": 1e-3,
}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory) -> Path:
    """A run whose vocabulary has a few of the scenes' words, so that some of what it says is rewarded."""
    changes = {"decoder__name": "lstm", "encoder__grid_size": "null", "encoder__trainable": "none"}
    # With seed 0 one weight's gradient cancels to rounding, which Adam makes a whole step: 1.07e-4 of all movement.
    return untrained_run(tmp_path_factory.mktemp("first") / "run", seed=1, **changes)


def curves(run: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_any_cut_of_the_batch_trains_the_same(scene_shards, first_stage, tmp_path, empty_config):
    """An epoch with a short last step, one image unreadable: four processes have nothing to do in some."""
    with_one_broken_image(scene_shards, tmp_path / "shards")
    changes = {
        **SELF_CRITICAL, "init_from": first_stage, "self_critical__cross_entropy": 0.2, "train__total_steps": 6,
        "self_critical__bleu4_weight": 1.0, "data__max_unreadable_fraction": 0.1, "checkpoint__every_steps": 6,
    }  # fmt: skip
    for processes, micro in ((1, 8), (1, 3), (4, 1)):
        run = tmp_path / f"run-{processes}-{micro}"
        own = settings(tmp_path / "shards", run, train__micro_batch_size=micro, **changes)
        in_processes(processes, run_config, own, empty_config)
    whole, *cut = [tmp_path / f"run-{name}" for name in ("1-8", "1-3", "4-1")]
    start = checkpoint.find(first_stage, "latest", pytest.fail).model()
    expected = curves(whole)
    assert len(set(expected["train/reward"])) == 6 and min(expected["train/reward"]) > 0
    for run in cut:
        assert distance(parameters(run, 6), parameters(whole, 6), start) < SAME["none"], run
        found = curves(run)
        for tag in ("reward", "baseline", "advantage", "objective", "gradient_norm", "caption_length", "cut_fraction"):
            assert found[f"train/{tag}"] == pytest.approx(expected[f"train/{tag}"], rel=1e-4, abs=1e-6), (run, tag)


@pytest.mark.parametrize("baseline", ["mean", pytest.param("greedy", marks=pytest.mark.sweep)])
def test_sigkill_and_the_same_command_end_bit_identical(scene_shards, first_stage, tmp_path, empty_config, baseline):
    """In bf16, on two processes, the encoder trained; the first stage's folder is gone when the run is continued."""
    begun = tmp_path / "begun"
    shutil.copytree(first_stage, begun)
    changes = {
        **SELF_CRITICAL, "init_from": begun, "precision": "bf16", "train__total_steps": 5, "checkpoint__every_steps": 2,
        "self_critical__baseline": baseline, "encoder__trainable": "layer4",
    }  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    in_processes(2, run_config, settings(scene_shards, whole, **changes), empty_config)
    overrides = settings(scene_shards, run, **changes)
    killed_at(2, signal.SIGKILL, train_command(2, overrides, empty_config), run, with_ranks=True)
    shutil.rmtree(begun)
    in_processes(2, run_config, overrides, empty_config)
    assert_same_bits(run, whole, 5)


@pytest.fixture
def chinese_shards(tmp_path) -> Path:
    captions = [caption.replace(" ", "") for caption in captions_in("Chinese", 24)]
    images = write_coco(tmp_path / "coco", {f"{n}.jpg": captions[2 * n : 2 * n + 2] for n in range(12)}, jpeg())
    pack(sources.coco(*images), "train", tmp_path / "shards", Settings())
    return tmp_path / "shards"


@pytest.mark.parametrize(
    ("tokenizer", "by"), [("bpe", TOKENIZER), ("characters", CHARACTERS)], ids=["bpe", "characters"]
)
def test_captions_of_characters_and_parts_of_words_are_rewarded(request, tmp_path, empty_config, tokenizer, by):
    """From a vocabulary of few tokens, so that some of what is said is rewarded."""
    shards = request.getfixturevalue("chinese_shards" if tokenizer == "characters" else "scene_shards")
    known = TOKENIZERS[tokenizer].train(captions_of(shard_index.load(shards / "train.json")), 80, 1)
    tokens = known.tokenize("一只黑狗在海边玩" if tokenizer == "characters" else "a red star")
    few = Vocabulary((*vocab.SPECIAL, *dict.fromkeys(tokens)), known)
    changes = {"decoder__name": "lstm", "encoder__grid_size": "null", "data__tokenizer": tokenizer}
    begun = untrained_run(tmp_path / "begun", 1, few, **changes, encoder__trainable="none")
    changes |= {**SELF_CRITICAL, "init_from": begun, "train__total_steps": 3}
    run_config(settings(shards, tmp_path / "run", **changes), empty_config)
    assert references.about_saved(tmp_path / "run" / "encoded-references")["tokenizer"] == by
    found = curves(tmp_path / "run")
    assert len(found["train/objective"]) == 3 and all(map(math.isfinite, found["train/objective"]))
    assert min(found["train/reward"]) > 0 and min(found["train/gradient_norm"]) > 0


def prepared(overrides: list[str], config: Path):
    loaded = configuration.load_config(config, overrides)
    with RunFolder(loaded.run) as folder:
        return prepare(loaded, folder, 1, lambda done, total: None)


def test_a_new_run_has_the_others_weights_and_vocabulary(scene_shards, first_stage, tmp_path, empty_config):
    run = tmp_path / "run"
    overrides = settings(scene_shards, run, **SELF_CRITICAL, init_from=first_stage, train__total_steps=1)
    experiment = prepared(overrides, empty_config)
    assert experiment.vocabulary == UNTRAINED_WORDS
    assert vocab.from_json((run / "vocabulary.json").read_text(), "") == UNTRAINED_WORDS
    model = experiment.build_model(configuration.load_config(empty_config, overrides), is_main=True).state_dict()
    theirs = checkpoint.find(first_stage, "latest", pytest.fail).model()
    assert all(torch.equal(model[name], theirs[name]) for name in theirs)
    counted = references.load(experiment.references)
    texts = shard_index.load(scene_shards / "train.json").texts()
    assert len(counted.reference_starts) == len(texts) + 1 and counted.documents == len(texts)
    about = experiment.references / "about.json"
    before = about.stat().st_mtime_ns
    count_references(experiment.train, experiment.references, True, lambda done, total: None)
    assert about.stat().st_mtime_ns == before, "counted once"
    shards = [replace(shard, sidecars=(*shard.sidecars[:-1], "0" * 64)) for shard in experiment.train.shards]
    with pytest.raises(InputError, match=r"captions\.json"):  # read again, and not what the index says
        other = replace(experiment.train, shards=tuple(shards))
        count_references(other, experiment.references, True, lambda done, total: None)
    with pytest.raises(InputError, match=r"init_from: .*\n.*\n?.*another run=FOLDER"):
        prepared([*overrides, "init_from=null"], empty_config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data__min_word_freq": 2}, "data.min_word_freq: 1 there, 2 here"),
        ({"decoder__hidden_size": 24}, "decoder.hidden_size: 16 there, 24 here"),
        ({"init_from": "nowhere"}, "nowhere"),
        ({"init_from": "own"}, "the run's own folder"),
    ],
)
def test_what_a_run_cannot_begin_with_is_refused(scene_shards, first_stage, tmp_path, empty_config, change, said):
    run = tmp_path / "run"
    changes = {**SELF_CRITICAL, "init_from": first_stage, "train__total_steps": 1, **change}
    if changes["init_from"] == "own":
        changes["init_from"] = run
    with pytest.raises(InputError, match=said):
        prepared(settings(scene_shards, run, **changes), empty_config)
    assert not run.exists()


def test_settings_that_cannot_be_are_refused(scene_shards, tmp_path, empty_config):
    wrong = {"self_critical__samples": 1, "self_critical__cider_weight": 0, "train__epochs": 1}
    with pytest.raises(InputError) as error:
        configuration.load_config(empty_config, settings(scene_shards, tmp_path, **wrong))
    assert "2 mistake(s)" in str(error.value) and "self_critical.samples: baseline=mean" in str(error.value)
    fine = {**wrong, "self_critical__baseline": "greedy", "self_critical__bleu4_weight": 1}
    configuration.load_config(empty_config, settings(scene_shards, tmp_path, **fine))


def test_curves_terminal_and_validation(scene_shards, first_stage, tmp_path, empty_config):
    run = tmp_path / "run"
    changes = {**SELF_CRITICAL, "init_from": first_stage, "train__total_steps": 2, "evaluate__every_steps": 2}
    done = trained(1, settings(scene_shards, run, **changes, data__val=scene_shards / "val.json"), empty_config)
    assert "reward " in done.stderr and "distinct " in done.stderr and "loss nan" not in done.stderr
    found = curves(run)
    for name in ("reward", "baseline", "advantage", "log_probability", "caption_length"):
        assert len(found[f"train/{name}"]) == 2
    for name in ("distinct", "bad_ending", "repetition", "cut"):
        assert all(0 <= value <= 1 for value in found[f"train/{name}_fraction"])
    assert found["train/reward"] == pytest.approx(found["train/baseline"]), "the mean of the others, so alike"
    assert json.loads((run / "scores.jsonl").read_text().splitlines()[-1])["CIDEr"] >= 0
