"""Every kind of file that is read, with bytes flipped, cut, inserted, and values put in that JSON allows and nobody
means: an InputError, or a right result; never another exception, never a file outside. `make sweep`: 20,000 cases."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioning import config as configuration
from captioning.data import captions as encoded
from captioning.data import vocabulary as vocab
from captioning.data.captions import EncodedCaptions
from captioning.evaluation.results import read_references, read_results
from captioning.inference import model_bundle
from captioning.inference.model_bundle import ModelBundle
from captioning.report.facts import validations_of
from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from captioning.runs.run_folder import RunFolder
from shards import index as shard_index
from shards import sources
from shards.errors import InputError
from shards.packing.index_tars import Options, index_tars
from shards.sources.table import captions_by_image
from shards.storage import SIDECAR_SUFFIXES

NASTY = (
    b"[" * 3000, b"{" * 50, b"1e999", b"-1", b"99999999999999999999", b"NaN", b"null", b'""', b"[]", b"{}", b"true",
    b'"../../etc/passwd"', b'"zip://x::y"', b'"reference://x"', b'"pipe:touch canary train.json"', b'"\\u0000"',
    b'"\\ud800"', b"\x00", b"\xff\xfe", b"\x1b[2J", b"\n", b",", b'"', b"9" * 5000, b"0.5", b"4398046511104",
)  # fmt: skip
mutation = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1 << 30), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 30), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 1 << 30), st.integers(1, 600)),
    st.tuples(st.just("insert"), st.integers(0, 1 << 30), st.integers(0, len(NASTY) - 1)),
    st.tuples(st.just("value"), st.integers(0, 1 << 30), st.integers(0, len(NASTY) - 1)),
)


def mutated(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    for how, where, what in changes:
        at = where % (len(data) + 1)
        if how == "flip" and data:
            at %= len(data)
            data = data[:at] + bytes([data[at] ^ 1 << what]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at]
        elif how == "drop":
            data = data[:at] + data[at + what :]
        elif how == "insert":
            data = data[:at] + NASTY[what] + data[at:]
        elif how == "value":
            data = with_value(data, where, NASTY[what])
    return data


def with_value(data: bytes, where: int, value: bytes) -> bytes:
    """A JSON document with one of its values replaced; other files as they are."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in entries:
            places.append((node, key))
            collect(inner)

    collect(document)
    if not places:
        return value
    node, key = places[where % len(places)]
    node[key] = "@@here@@"
    return json.dumps(document).encode().replace(b'"@@here@@"', value)


@dataclass(frozen=True)
class Kind:
    """A file below a folder of good ones, and what reads it: it raises AssertionError for a result that is wrong."""

    file: str
    read: Callable[[Path], None]


def read_index(folder: Path) -> None:
    index = shard_index.load(folder / "train.json")
    index.check_files()
    for shard in index.shards:
        assert shard.local.resolve().is_relative_to(folder.resolve())
    assert index.fingerprint == shard_index.fingerprint_of(index.shards)
    if index.fingerprint == GOOD["fingerprint"]:
        assert index.texts() == GOOD["texts"]


def read_foreign_sidecar(folder: Path) -> None:
    """A file beside a tar whose hash is in the index: made so by whoever wrote both."""
    index = shard_index.load(folder / "train.json")
    shard = index.shards[0]
    hashes = [hashlib.sha256(shard.local.with_suffix(suffix).read_bytes()).hexdigest() for suffix in SIDECAR_SUFFIXES]
    shard = replace(shard, sidecars=tuple(hashes))
    assert len(shard_index.read_texts(shard)) == shard.nsamples
    for number in range(shard.nsamples):
        extent = shard_index.extent_of(shard, number)
        assert 0 <= extent.offset <= extent.offset + extent.size <= shard.filesize
        shard_index.files_of(shard, number)


def read_sidecar(folder: Path) -> None:
    index = shard_index.load(folder / "train.json")
    shard_index.read_extents.cache_clear()
    assert index.texts() == GOOD["texts"]
    assert [shard_index.extent_of(index.shards[0], n) for n in range(5)] == GOOD["extents"]


def read_tars(folder: Path) -> None:
    shard_index.read_extents.cache_clear()
    for path in folder.glob("train-*"):
        if path.suffix != ".tar":
            path.unlink()
    (folder / "train.json").unlink()
    index = index_tars([folder / "train-000000.tar"], "train", lambda done, total: None, Options())
    assert len(index) <= len(GOOD["texts"]) + 1


def read_encoded(folder: Path) -> None:
    index = shard_index.load(folder / "train.json")
    vocabulary = encoded.encode(index, folder / "encoded", 1, 20)
    assert vocabulary.words == GOOD["words"]
    assert [ids.tolist() for ids in EncodedCaptions(folder / "encoded").of(3)] == GOOD["ids"]


def read_checkpoint(folder: Path) -> None:
    run = folder / "run"
    if checkpoint.damage(run / "checkpoints" / "step-00000001") is None:
        found = checkpoint.find(run, "latest", lambda _: None)
        assert found.state == GOOD["state"] and found.model()["weight"].tolist() == [1.0, 2.0]
    checkpoint.latest_state(run)


def read_foreign_checkpoint(folder: Path) -> None:
    """Its manifest fits: made so by whoever wrote both."""
    step = folder / "run" / "checkpoints" / "step-00000001"
    files = [path for path in step.iterdir() if path.name != "manifest.json"]
    manifest = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    }
    (step / "manifest.json").write_text(json.dumps(manifest))
    if checkpoint.damage(step) is not None:
        return
    found = checkpoint.find(folder / "run", "latest", lambda _: None)
    assert isinstance(found.state.step, int)
    found.model(), found.optimizer()
    configuration.load_saved(found.folder / "config.yaml")
    vocab.from_json(found.text("vocabulary.json"), "vocabulary.json")


def read_run_folder(folder: Path) -> None:
    run = RunFolder(folder / "run")
    assert isinstance(run.last_saved_step(), int) and len(run.status()) == 2
    run.cut_logs(1, 1)
    assert all(isinstance(entry, dict) for entry in validations_of(folder / "run"))


def read_config(folder: Path) -> None:
    config = configuration.load_config(folder / "config.yaml", ["run=x"])
    assert configuration.from_dict(configuration.to_dict(config), "itself") == config
    saved = configuration.load_saved(folder / "config.yaml")
    assert "SECRET" not in configuration.save_text(saved)


def read_vocabulary(folder: Path) -> None:
    words = vocab.from_json((folder / "vocabulary.json").read_bytes().decode(errors="replace"), "vocabulary.json")
    assert words.words[:4] == vocab.SPECIAL and isinstance(words.decode(range(len(words))), str)


def read_model_folder(folder: Path) -> None:
    """An exported folder whose hashes fit."""
    model = folder / "model"
    try:
        document = json.loads((model / "config.json").read_bytes())
        names = ("model.safetensors", "vocabulary.json")
        document["sha256"] = {name: hashlib.sha256((model / name).read_bytes()).hexdigest() for name in names}
        (model / "config.json").write_text(json.dumps(document))
    except (ValueError, TypeError, RecursionError):
        pass
    bundle = model_bundle.read(model)
    assert isinstance(bundle.step, int) and bundle.vocabulary.words[:4] == vocab.SPECIAL


def read_captions_of_results(folder: Path) -> None:
    assert all(isinstance(caption, str) for caption in read_results(folder / "results.json").values())


def read_coco(folder: Path) -> None:
    assert all(reference.captions for reference in read_references(folder / "coco.json").values())


def read_karpathy(folder: Path) -> None:
    for source in sources.karpathy([folder], folder / "karpathy.json").values():
        assert all(record.captions for record in source.records)


def read_table(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        by_image, _ = captions_by_image(folder / name)
        assert all(isinstance(image, str) and image for image in by_image)

    return read


CHECKPOINT = "run/checkpoints/step-00000001/"
KINDS = {
    "NAME.json": Kind("train.json", read_index),
    "idx": Kind("train-000000.idx", read_sidecar),
    "crc32": Kind("train-000000.crc32", read_sidecar),
    "captions": Kind("train-000000.captions.json", read_sidecar),
    "foreign idx": Kind("train-000000.idx", read_foreign_sidecar),
    "foreign captions": Kind("train-000000.captions.json", read_foreign_sidecar),
    "tar": Kind("train-000000.tar", read_tars),
    "encoded": Kind("encoded/ids.npy", read_encoded),
    "encoded, about": Kind("encoded/about.json", read_encoded),
    "config": Kind("config.yaml", read_config),
    "vocabulary": Kind("vocabulary.json", read_vocabulary),
    "manifest": Kind(CHECKPOINT + "manifest.json", read_checkpoint),
    "state": Kind(CHECKPOINT + "state.json", read_checkpoint),
    "foreign state": Kind(CHECKPOINT + "state.json", read_foreign_checkpoint),
    "foreign weights": Kind(CHECKPOINT + "model.safetensors", read_foreign_checkpoint),
    "foreign optimizer": Kind(CHECKPOINT + "optimizer.pt", read_foreign_checkpoint),
    "foreign config": Kind(CHECKPOINT + "config.yaml", read_foreign_checkpoint),
    "foreign vocabulary": Kind(CHECKPOINT + "vocabulary.json", read_foreign_checkpoint),
    "status": Kind("run/status", read_run_folder),
    "saved-step": Kind("run/saved-step", read_run_folder),
    "ledger": Kind("run/ledger/rank-0.txt", read_run_folder),
    "scores": Kind("run/scores.jsonl", read_run_folder),
    "model folder, config": Kind("model/config.json", read_model_folder),
    "model folder, weights": Kind("model/model.safetensors", read_model_folder),
    "model folder, vocabulary": Kind("model/vocabulary.json", read_model_folder),
    "results": Kind("results.json", read_captions_of_results),
    "coco": Kind("coco.json", read_coco),
    "karpathy": Kind("karpathy.json", read_karpathy),
    "CSV": Kind("table.csv", read_table("table.csv")),
    "TSV": Kind("table.tsv", read_table("table.tsv")),
    "JSON lines": Kind("table.jsonl", read_table("table.jsonl")),
}
GOOD: dict[str, Any] = {}
ROWS = [("a.jpg", 'a cat, "so called"'), ("a.jpg", "naïve"), ("b.jpg", "a dog|cat"), ("c.jpg", "猫")]


@pytest.fixture(scope="module")
def good(scene_shards, tmp_path_factory) -> Path:
    """A folder with a good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    for path in scene_shards.glob("val*"):
        shutil.copy(path, folder / path.name.replace("val", "train"))
    index = (folder / "train.json").read_text().replace("val-", "train-").replace('"val"', '"train"')
    (folder / "train.json").write_text(index)
    opened = shard_index.load(folder / "train.json")
    words = encoded.encode(opened, folder / "encoded", 1, 20)
    (folder / "vocabulary.json").write_text(words.to_json())
    config = configuration.from_dict({"run": "x", "data": {"train": "train.json"}, "train": {"epochs": 1}}, "test")
    (folder / "config.yaml").write_text(configuration.save_text(config) + "# ${oc.env:HOME}\n")
    shutil.move(folder / "vocabulary.json", folder / "words.json")  # beside a vocabulary nothing is resolved
    run = folder / "run"
    (run / "ledger").mkdir(parents=True)
    texts = {"config.yaml": configuration.save_text(config), "vocabulary.json": words.to_json()}
    GOOD["state"] = RunState(1, 8, 1, "f", 0.5, 1)
    optimizer = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}}
    checkpoint.save(run, GOOD["state"], {"weight": torch.tensor([1.0, 2.0])}, optimizer, texts, 2)
    shutil.move(folder / "words.json", folder / "vocabulary.json")
    model_bundle.write(ModelBundle(config, words, {"weight": torch.zeros(2)}, 1, "of a test"), folder / "model")
    (run / "status").write_text("preempted\nstep 1 of 6, stopped by SIGTERM\n")
    (run / "ledger" / "rank-0.txt").write_text("1\t0\tkey\t1\n2\t0\tkey\t1\n")
    (run / "scores.jsonl").write_text('{"step": 1, "epoch": 0.1, "CIDEr": 0.5, "teacher_forcing": {"loss": 1.0}}\n')
    results = [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}]
    (folder / "results.json").write_text(json.dumps(results))
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": results}))
    sentences = [{"raw": "a cat", "tokens": ["a", "cat"]}]
    karpathy = [{"filename": f"{n}.jpg", "split": "train", "sentences": sentences, "imgid": n} for n in range(2)]
    (folder / "karpathy.json").write_text(json.dumps({"images": karpathy, "dataset": "flickr8k"}))
    quoted = [(image, '"' + caption.replace('"', '""') + '"') for image, caption in ROWS]
    (folder / "table.csv").write_text("image,caption\n" + "".join(f"{i},{c}\n" for i, c in quoted))
    (folder / "table.tsv").write_text("image\tcaption\n" + "".join(f"{i}\t{c}\n" for i, c in ROWS))
    (folder / "table.jsonl").write_text("".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in ROWS))
    GOOD.update(fingerprint=opened.fingerprint, texts=opened.texts(), words=words.words)
    GOOD["extents"] = [shard_index.extent_of(opened.shards[0], n) for n in range(5)]
    GOOD["ids"] = [ids.tolist() for ids in EncodedCaptions(folder / "encoded").of(3)]
    return folder


def fuzz(kind: Kind, good: Path, work: Path, cases: int) -> None:
    original = (good / kind.file).read_bytes()

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(mutation, min_size=1, max_size=3))
    def case(changes: list[tuple[str, int, int]]) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(good, work)
        (work / kind.file).write_bytes(mutated(original, changes))
        try:
            kind.read(work)
        except InputError as error:
            assert len(str(error)) < 20_000
        finally:
            shard_index.read_extents.cache_clear()

    case()


@pytest.mark.parametrize("name", KINDS)
def test_every_good_file_is_read(good, tmp_path, name):
    shutil.copytree(good, tmp_path / "work")
    KINDS[name].read(tmp_path / "work")


@pytest.mark.parametrize("cases", [12, pytest.param(20_000 // len(KINDS) + 1, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_or_read_right(good, tmp_path, name, cases, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz(KINDS[name], good, tmp_path / "work", cases)
    assert not (tmp_path / "canary").exists()
