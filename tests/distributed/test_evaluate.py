"""launch.evaluate: exact under any number of processes, anyone's results files, comparisons, and bad input."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from captioning import config
from captioning.data import loader
from captioning.data import vocabulary as vocab
from captioning.data.collate import ImageBatch, pad_captions
from captioning.data.tokenizer import Words
from captioning.data.vocabulary import Vocabulary
from captioning.distributed.ranks import Ranks
from captioning.evaluation.caption_split import CaptionSplit
from captioning.evaluation.results import in_common, match_references, read_references, read_results
from captioning.inference.evaluate_run import caption_run
from captioning.inference.predictor import Predictor
from captioning.model.captioner import Captioner
from captioning.model.search import SearchOptions
from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from launch import evaluate
from shards import index as shard_index
from shards.errors import InputError
from tests.conftest import ROOT, run_command, settings, train_command

REFERENCES = {1: ["A cat sits.", "One cat."], 2: ["Two dogs run."], 3: ["A red bus."], 4: ["A man eats."]}
GOOD = {1: "A cat sits.", 2: "Two dogs.", 3: "A red bus.", 4: "A man eats lunch."}
BAD = {1: "A dog.", 2: "Two dogs.", 3: "Trees.", 4: "A man sleeps."}


def coco(path: Path, references: dict[int, list[str]]) -> Path:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in references]
    annotations = [{"image_id": i, "caption": caption} for i, captions in references.items() for caption in captions]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def results(path: Path, captions: dict) -> Path:
    path.write_text(json.dumps([{"image_id": i, "caption": caption} for i, caption in captions.items()]))
    return path


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    return {
        "references": coco(tmp_path / "references.json", REFERENCES),
        "good": results(tmp_path / "good.json", GOOD),
        "bad": results(tmp_path / "bad.json", BAD),
    }


def command(monkeypatch, *arguments: object) -> None:
    """What ``python -m launch.evaluate`` does, in this process."""
    monkeypatch.setattr(sys, "argv", ["launch.evaluate", *map(str, arguments), "--java-seconds", "0"])
    evaluate.main()


@pytest.fixture
def one_thread():
    """Tiny models, several threads and a busy machine go ill together."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_without_training(run: Path, shards: Path, vocabulary: Vocabulary, step: int) -> None:
    """A run folder whose model has never been trained."""
    path = run.parent / "empty.yaml"
    path.write_text("{}\n")
    overrides = settings(shards, run, train__total_steps=1, data__val=shards / "val.json", evaluate__batch_size=2)
    loaded = config.load_config(path, overrides)
    texts = {"config.yaml": config.save_text(loaded), "vocabulary.json": vocabulary.to_json()}
    model = Captioner(loaded, len(vocabulary)).state_dict()
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.save(run, RunState(step, 0, 1, "x"), model, {}, texts, keep=2)


@pytest.fixture
def shards_and_runs(scene_shards, tmp_path) -> tuple[Path, list[Path]]:
    """Validation scenes, the image of one of them broken, and two runs."""
    shards = tmp_path / "shards"
    shutil.copytree(scene_shards, shards)
    index = shard_index.load(shards / "val.json")
    extent = shard_index.read_extents(index.shards[0])[3]
    with index.shards[0].path.open("r+b") as file:
        file.seek(extent.offset)
        file.write(b"\0" * 200)
    counts = {word: 1 for text in index.texts() for caption in text.captions for word in Words().tokenize(caption)}
    vocabulary = vocab.build(counts, 1)  # type: ignore[arg-type]
    runs = [tmp_path / "run-1", tmp_path / "run-2"]
    for number, run in enumerate(runs):
        run_without_training(run, shards, vocabulary, step=5 + number)
    return shards, runs


def evaluated_by(processes: int, run: Path, out: Path) -> dict:
    """The scores of a run evaluated by real processes; Gloo between them."""
    path = out / f"scores-{processes}.json"
    words = train_command(processes, ["--java-seconds", "0", "--json", str(path)], run)
    done = run_command([str(ROOT / "launch" / "evaluate.py") if w.endswith("train.py") else w for w in words])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "9 images" in done.stdout and "1 images not scored" in done.stdout and "perplexity" in done.stdout
    return json.loads(path.read_text())


def assert_equal_for(counts: list[int], shards: Path, run: Path, out: Path) -> None:
    found = [evaluated_by(count, run, out) for count in counts]
    ids = [text.image_id for text in shard_index.load(shards / "val.json").texts()]
    assert [entry["image_id"] for entry in found[0]["per_image"]] == ids[:3] + ids[4:], "each image once"
    assert len(found[0]["unreadable"]) == len(found[0]["missing"]) == 1
    assert found[0]["scores"]["BLEU-1"] > 0
    losses = [of.pop("teacher_forcing")["loss"] for of in found]
    assert losses == pytest.approx([losses[0]] * len(losses)) and losses[0] > 0
    for other in found[1:]:
        assert other == found[0], "scores, captions, intervals and unreadable images are those of one process"


def test_two_processes_score_as_one(shards_and_runs, tmp_path):
    shards, runs = shards_and_runs
    assert_equal_for([1, 2], shards, runs[0], tmp_path)


@pytest.mark.sweep
def test_one_to_four_processes_score_alike(shards_and_runs, tmp_path):
    shards, runs = shards_and_runs
    assert_equal_for([1, 2, 3, 4], shards, runs[0], tmp_path)


def test_runs_and_result_files_are_compared(shards_and_runs, tmp_path, monkeypatch, capsys, caplog, one_thread):
    shards, runs = shards_and_runs
    (runs[1] / "captions-val-beam3-step-6.json").mkdir()  # as where a run's folder is not ours to write to
    command(monkeypatch, "--compare", *runs, "--beam-size", 3, "--json", tmp_path / "runs.json")
    printed = capsys.readouterr().out
    assert "step-6.json cannot be written: Is a directory" in caplog.text
    assert "9 images" in printed and "CIDEr" in printed and "B - A" in printed
    by_name = {entry["name"]: entry for entry in json.loads((tmp_path / "runs.json").read_text())["differences"]}
    assert by_name["BLEU-4"].keys() == {"name", "a", "b", "interval", "p_value"}
    # The same run from its folder and from the results file its evaluation wrote: no difference.
    assert not (runs[0] / "captions-val-step-5.json").exists(), "searched for otherwise than the run says"
    written = runs[0] / "captions-val-beam3-step-5.json"
    assert len(json.loads(written.read_text())) == 9
    arguments = ["--captions", shards / "val.json", "--beam-size", 3, "--json", tmp_path / "same.json"]
    command(monkeypatch, "--compare", runs[0], written, *arguments)
    same = json.loads((tmp_path / "same.json").read_text())
    assert same["images"] == 9 and all(entry["p_value"] == 1 for entry in same["differences"])


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_an_image_is_encoded_once_for_its_captions_and_the_loss(kind, shards_and_runs, monkeypatch, one_thread):
    shards, runs = shards_and_runs
    predictor = Predictor.from_checkpoint(runs[0], device="cpu")
    config = replace(predictor.config, decoder=replace(predictor.config.decoder, name=kind))
    model = Captioner(config, len(predictor.vocabulary)).eval()
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda inputs, valid=None: encoded.append(inputs) or encode(inputs, valid))
    predictor = replace(predictor, models=(model,), config=config)
    about = caption_run(predictor, runs[0], "val", Ranks(0, 1), SearchOptions(2)).about
    assert sum(len(inputs) for inputs in encoded) == 9, "each image that can be read, once"
    total = targets = 0
    ids, limit = predictor.vocabulary.ids, config.data.max_words
    texts = [text for i, text in enumerate(shard_index.load(shards / "val.json").texts()) if i != 3]
    with torch.no_grad():
        for image, text in zip(torch.cat(encoded), texts, strict=True):
            words = [[ids[word] for word in Words().tokenize(caption)][:limit] for caption in text.captions]
            captions = pad_captions([[np.array(caption) for caption in words]])
            logits, _ = model(image[None], captions)
            total += float(torch.nn.functional.cross_entropy(logits, captions.targets, reduction="sum"))
            targets += len(captions.targets)
    assert about["teacher_forcing"]["loss"] == pytest.approx(total / targets, rel=1e-5)


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_for_a_gpu_are_pinned(device, pinned, shards_and_runs, monkeypatch):
    shards, runs = shards_and_runs
    predictor, asked = Predictor.from_checkpoint(runs[0], device="cpu"), []
    monkeypatch.setattr(loader, "read_ahead", lambda *arguments: asked.append(arguments[-1]) or iter(()))
    index = shard_index.load(shards / "val.json")
    place = torch.device(device)
    work = CaptionSplit(predictor.model, predictor.vocabulary, index, predictor.config, Ranks(0, 1), place)
    assert list(work) == [None] * 5 and asked == [pinned]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = ImageBatch(torch.zeros(2, 3), (4, 5), (), torch.zeros(2, 4)).pin_memory()
    assert batch.inputs.sum() == 6 and batch.valid.sum() == 8 and batch.samples == (4, 5)


def test_captions_are_drawn_by_their_seed(shards_and_runs, tmp_path, monkeypatch, one_thread):
    _, runs = shards_and_runs

    def drawn(seed: int) -> list[dict]:
        command(monkeypatch, runs[0], "--temperature", 2, "--top-k", 9, "--seed", seed, "--json", tmp_path / "s.json")
        return json.loads((runs[0] / f"captions-val-drawn-seed{seed}-step-5.json").read_text())

    assert drawn(3) == drawn(3) != drawn(4)
    assert json.loads((tmp_path / "s.json").read_text())["search"] == "drawn at temperature 2, top-k 9, seed 4"
    with pytest.raises(InputError, match="give --temperature"):
        command(monkeypatch, runs[0], "--top-p", 0.5)
    with pytest.raises(InputError, match=r"top_p=1\.5"):
        command(monkeypatch, runs[0], "--temperature", 1, "--top-p", 1.5)


def test_anyones_results_are_scored(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scores.json"
    command(monkeypatch, "--results", files["good"], "--captions", files["references"], "--json", out)
    assert "4 images" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["scores"].keys() == found["intervals"].keys() and found["scores"]["BLEU-1"] > 0.8
    assert [entry["image_id"] for entry in found["per_image"]] == [1, 2, 3, 4]
    assert found["per_image"][2]["ROUGE-L"] == pytest.approx(1) and found["per_image"][2]["caption"] == "A red bus."
    assert found["tokenizer"] == "PTB rules in Python"
    command(monkeypatch, "--compare", files["good"], files["bad"], "--captions", files["references"])
    assert "-0." in capsys.readouterr().out


def test_missing_images_and_empty_captions_are_counted_and_listed(files, tmp_path, monkeypatch, capsys):
    some = results(tmp_path / "some.json", {3: "A red bus.", 1: " . "})
    out = tmp_path / "scores.json"
    command(monkeypatch, "--results", some, "--captions", files["references"], "--json", out)
    printed = capsys.readouterr().out
    assert "2 images not scored:\n  2\n  4" in printed and "1 captions without a word" in printed
    found = json.loads(out.read_text())
    assert found["missing"] == ["2", "4"] and found["empty_captions"] == [1] and found["images"] == 2
    assert found["per_image"][0]["BLEU-1"] < 1e-6


def test_a_split_s_image_without_references_is_listed_and_the_others_are_scored(scene_shards, tmp_path):
    """A run captions such an image too: its results file must be readable beside the very split."""
    shutil.copytree(scene_shards, tmp_path / "shards")
    path = tmp_path / "shards" / "val-000000.captions.json"
    before = path.read_bytes()
    document = json.loads(before)
    document["samples"][3]["captions"] = []
    path.write_text(json.dumps(document))
    index = tmp_path / "shards" / "val.json"
    digests = [hashlib.sha256(data).hexdigest() for data in (before, path.read_bytes())]
    index.write_text(index.read_text().replace(*digests))
    ids = [sample["image_id"] for sample in document["samples"]]
    said = read_results(results(tmp_path / "all.json", dict.fromkeys(ids[:9], "A red star.")))
    found = match_references(said, read_references(tmp_path / "shards" / "val.json"), tmp_path)
    assert found.image_ids == (*ids[:3], *ids[4:9])
    assert found.missing == (str(ids[9]), f"{ids[3]}: it has no references")
    with pytest.raises(InputError, match="nothing to score"):
        match_references({ids[3]: "A red star."}, read_references(tmp_path / "shards" / "val.json"), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "cannot be read as JSON"),
        ('{"image_id": 1}', "holds no list"),
        ("[]", "holds no caption"),
        ("[1]", "entry 0 is 1"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 2}]', "entry 1"),
        ('[{"image_id": 1.5, "caption": "a"}]', "entry 0"),
        ('[{"image_id": true, "caption": "a"}]', "entry 0"),
        ('[{"image_id": 1, "caption": null}]', "entry 0"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]', "several captions:\n  1"),
        ('[{"image_id": 9, "caption": "a"}]', "1 of its 1 images have no references"),
        ('[{"image_id": "1", "caption": "a"}]', "these ids are texts"),
    ],
)
def test_a_bad_results_file_is_refused(files, tmp_path, monkeypatch, text, said):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        command(monkeypatch, "--results", path, "--captions", files["references"])
    assert said in str(error.value) and str(path) in str(error.value)


def test_an_image_whose_references_are_missing_is_named(files, tmp_path):
    references = coco(tmp_path / "fewer.json", REFERENCES | {2: []})
    with pytest.raises(InputError, match=r"1 of its 4 images have no references(.|\n)*\n  2\n"):
        match_references(read_results(files["good"]), read_references(references), files["good"])


def test_other_bad_input(files, tmp_path, monkeypatch):
    for arguments, said in [
        (["--results", files["good"]], "needs --captions"),
        (["--results", tmp_path / "no.json", "--captions", files["references"]], "No such file"),
        (["--results", files["good"], "--captions", files["good"]], "not COCO captions"),
        (["--results", files["good"], "--captions", tmp_path / "no.json"], "No such file"),
        (["--compare", files["good"], tmp_path / "no", "--captions", files["references"]], "No such file"),
        ([tmp_path / "no-run"], "not a run folder"),
    ]:
        with pytest.raises(InputError, match=said):
            command(monkeypatch, *arguments)
    for arguments in (
        [],
        [tmp_path, "--beam-size", "0"],
        [tmp_path, "--results", files["good"]],
        ["--compare", files["good"]],
    ):
        with pytest.raises(SystemExit) as stopped:
            command(monkeypatch, *arguments)
        assert stopped.value.code == 2


def test_only_captions_of_the_same_images_are_compared(files, tmp_path):
    references = read_references(files["references"])
    a = match_references({1: "A cat.", 2: "Dogs.", 3: "A bus."}, references, tmp_path)
    b = match_references({4: "A man.", 3: "A red bus.", 2: "A dog."}, references, tmp_path)
    common = in_common(a, b)
    assert [side.image_ids for side in common] == [(2, 3), (2, 3)]
    assert [side.captions for side in common] == [("Dogs.", "A bus."), ("A dog.", "A red bus.")]
    with pytest.raises(InputError, match="no image in common"):
        in_common(match_references({1: "A cat."}, references, tmp_path), b)
    other = read_references(coco(tmp_path / "other.json", REFERENCES | {3: ["Something else."]}))
    with pytest.raises(InputError, match=r"other references(.|\n)*  3"):
        in_common(a, match_references({3: "A bus."}, other, tmp_path))
