"""Configs: defaults, overrides, and every mistake told at once with the right name beside it."""

import sys

import pytest

from captioning.config import (
    IDENTITY,
    RENAMED,
    SETTINGS,
    Config,
    flat,
    from_dict,
    load_config,
    load_saved,
    save_text,
    to_dict,
)
from shards.errors import InputError
from tests.conftest import ROOT, run_command

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
    file.write_text("train: {epochs: 1, total_steps: 5}")
    with pytest.raises(InputError) as error:
        load_config(file, ["data.image_size=300", "decoder.dropout=1", "checkpoint.keep=1"])
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


def test_every_default_is_allowed_and_every_section_says_what_it_is():
    for key, setting in SETTINGS.items():
        assert setting.meaning and flat(Config())[key] == setting.default
        assert setting.required or setting.problem(setting.default, {}) is None, key
    assert set(SETTINGS) == set(flat(Config()))
    assert {"seed", "encoder.name", "train.global_batch_size"} < set(IDENTITY)
    assert not {"run", "train.micro_batch_size", "optim.decoder_lr"} & set(IDENTITY)


@pytest.mark.parametrize("old", [old for old in RENAMED if "." in old])
def test_an_old_key_names_the_new_one(file, old):
    with pytest.raises(InputError, match=rf"{old}: unknown key; it is {RENAMED[old]} now"):
        load_config(file, [*GOOD, f"{old}=1"])
    assert RENAMED[old] in SETTINGS


@pytest.mark.parametrize("old", [old for old in RENAMED if "." not in old])
def test_an_old_metric_names_the_new_one(file, old):
    with pytest.raises(InputError, match=f"it is {RENAMED[old]} now"):
        load_config(file, [*GOOD, f"evaluate.best_metric='{old}'"])
    assert load_config(file, [*GOOD, f"evaluate.best_metric={RENAMED[old]}"])


def test_the_later_of_epochs_and_total_steps_replaces_the_earlier(file):
    file.write_text("train: {epochs: 3}")
    data = ["run=r", "data.train=a.json"]
    for overrides, expected in (
        ([], (3, None)),
        (["train.total_steps=9"], (None, 9)),
        (["train.total_steps=9", "train.epochs=4"], (4, None)),
        (["train.epochs=4", "train.total_steps=9"], (None, 9)),
        (["train.total_steps=9", "train.epochs=null"], (None, 9)),
    ):
        train = load_config(file, [*data, *overrides]).train
        assert (train.epochs, train.total_steps) == expected
    with pytest.raises(InputError, match="exactly one"):
        load_config(file, [*data, "train.epochs=null"])


@pytest.mark.parametrize(
    "override",
    [
        "optim.encoder_lr=.inf",
        "optim.encoder_lr=.nan",
        "train.epochs=.inf",
        "train.epochs=12345678901234567890",
        "optim.weight_decay=1e300",
        "train.hang_seconds=999999999999",
        pytest.param(f"seed=0x{'f' * 9000}", id="thousands of digits"),
        pytest.param(f"data.train=0x{'f' * 9000}", id="thousands of digits for a text"),
    ],
)
def test_numbers_that_would_overflow_are_refused(file, override):
    with pytest.raises(InputError, match=override.split("=")[0]) as error:
        load_config(file, [*GOOD, override])
    assert len(str(error.value)) < 600


def test_the_environment_is_read_for_ones_own_file_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    text = "run: runs/${oc.env:SECRET}-${seed}\ndata: {train: a.json}\ntrain: {epochs: 1}\n"
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml", ["seed=7"]).run == "runs/s3cret-7"
    assert load_saved(tmp_path / "config.yaml").run == "runs/${oc.env:SECRET}-${seed}"
    (tmp_path / "vocabulary.json").write_text("{}")
    assert load_config(tmp_path / "config.yaml", ["train.epochs=2"]).run == "runs/${oc.env:SECRET}-${seed}"
    assert load_config(tmp_path / "config.yaml", ["train.epochs=2"]).train.epochs == 2
    (tmp_path / "config.yaml").write_text("seed: ${oc.env:SECRET}\n")
    with pytest.raises(InputError) as error:
        load_saved(tmp_path / "config.yaml")
    assert "s3cret" not in str(error.value)


BOMB = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"b{n}: &a{n + 1} [{f'*a{n}, ' * 9}]\n" for n in range(9))


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 12_000_000,
        b"\xff\xd8\xff\xe0" * 1000,
        b"run: " + b"x" * 200_000,
        b"run: [" + b"{a: b}, " * 500 + b"]",
        b"seed: " + b"[" * 5000,
        b"[" * 100_000,
        b"seed: !!int ''",
        b"seed: !!timestamp x",
        b"seed: !!python/object/apply:os.system ['true']",
        b"? [a, b]\n: 1",
        b"${oc.env:: 1",
        b"".join(b"k%d: 1\n" % n for n in range(500)),
        b"\n".join(b"key" * 1000 + b"%d: 1" % n for n in range(30)),
        b"hello",
        b"1",
    ],
)
def test_no_file_floods_the_terminal(tmp_path, content):
    path = tmp_path / "some.tar"
    path.write_bytes(content)
    readings = (lambda: load_config(path, ["train.total_steps=x"]), lambda: load_saved(path))
    for read in readings:
        with pytest.raises(InputError, match=str(path)) as error:
            read()
        assert len(str(error.value)) < 4000 and len(str(error.value).splitlines()) <= 24


def test_a_saved_config_that_grows_without_end_is_refused_at_once(tmp_path):
    (tmp_path / "config.yaml").write_text(BOMB)
    with pytest.raises(InputError, match="unknown key") as error:
        load_saved(tmp_path / "config.yaml")
    assert len(str(error.value)) < 2000
    (tmp_path / "config.yaml").write_text(BOMB + "run: *a9\n")
    with pytest.raises(InputError, match="text is wanted"):
        load_saved(tmp_path / "config.yaml")


def test_a_config_is_read_without_torch():
    code = "import sys, captioning.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert run_command([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_right(path):
    assert load_config(path).run
