"""Configs: defaults, overrides, and every mistake told at once with the right name beside it."""

import pytest

from captioning.config import IDENTITY, Config, flat, from_dict, load_config, save_text, to_dict
from shards.errors import InputError
from tests.conftest import ROOT

GOOD = ["run=runs/x", "data.train=a.json", "train.epochs=2"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 5\nencoder:\n  name: resnet34\n")
    return path


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(file):
    config = load_config(file, [*GOOD, "encoder.name=resnet18", "optim.decoder_lr=1", "optim.max_grad_norm=null"])
    assert (config.seed, config.encoder.name, config.decoder.hidden_size) == (5, "resnet18", 512)
    assert config.optim.decoder_lr == 1.0 and config.optim.max_grad_norm is None


def test_all_mistakes_come_at_once_with_the_nearest_name(file):
    overrides = [
        *GOOD,
        "encoder.nmae=resnet18",
        "decoder.hiden_size=5",
        "learning_rate=1",
        "global_batch_size=3",
        "train.micro_batch_size=many",
        "data.flip=1",
        "encoder.name=vgg16",
        "data.num_workers=1.5",
    ]
    with pytest.raises(InputError) as error:
        load_config(file, overrides)
    message = str(error.value)
    for expected in (
        "8 mistake(s)",
        "encoder.nmae: unknown key (did you mean encoder.name?)",
        "decoder.hiden_size: unknown key (did you mean decoder.hidden_size?)",
        "global_batch_size: unknown key (did you mean train.global_batch_size?)",
        "train.micro_batch_size: a whole number is wanted, not 'many'",
        "data.flip: true or false is wanted, not 1",
        "encoder.name: 'vgg16' is not one of resnet18",
        "data.num_workers: a whole number is wanted, not 1.5",
    ):
        assert expected in message


def test_precision_no_is_what_yaml_calls_false(file):
    assert load_config(file, [*GOOD, "precision=no"]).precision == "no"
    with pytest.raises(InputError, match="precision: True is not one of no, bf16, fp16"):
        load_config(file, [*GOOD, "precision=yes"])


def test_ill_typed_and_impossible_values_come_together(file):
    with pytest.raises(InputError, match="2 mistake") as error:
        load_config(file, [*GOOD, "encoder.nmae=x", "train.micro_batch_size=0"])
    assert "nmae" in str(error.value) and "train.micro_batch_size: 0 must be at least 1" in str(error.value)


def test_impossible_values_come_at_once(file):
    with pytest.raises(InputError) as error:
        load_config(
            file,
            ["train.epochs=1", "train.total_steps=5", "data.image_size=300", "decoder.dropout=1", "checkpoint.keep=1"],
        )
    message = str(error.value)
    for expected in (
        "run: must be given",
        "data.train: must be given",
        "exactly one",
        "resize_size",
        "dropout",
        "keep",
    ):
        assert expected in message


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "encoder: resnet18\n"])
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=str(path)):
        load_config(path, GOOD)


def test_a_missing_file_and_a_malformed_override_are_refused(file, tmp_path):
    with pytest.raises(InputError, match="configs/"):
        load_config(tmp_path / "nowhere.yaml", GOOD)
    with pytest.raises(InputError, match="'--epochs'"):
        load_config(file, [*GOOD, "--epochs"])


def test_a_saved_config_reads_back(file, tmp_path):
    config = load_config(file, GOOD)
    (tmp_path / "saved.yaml").write_text(save_text(config))
    assert load_config(tmp_path / "saved.yaml") == config == from_dict(to_dict(config), "memory")


def test_identity_names_real_settings():
    assert set(IDENTITY) <= set(flat(Config()))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_right(path):
    assert load_config(path).run
