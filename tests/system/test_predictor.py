"""Captions of whatever people hand over: files, bytes, images, arrays, folders; and of what is no image among them."""

import io
import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.data.vocabulary import Vocabulary
from captioning.inference.predictor import Caption, Predictor
from captioning.model.search import SearchOptions
from captioning.report.pictures import annotated, caption_sheet, shade
from launch import caption as command
from launch.cli.captions import _say
from launch.cli.images import images_at, random_images
from shards.errors import InputError
from shards.sources import scenes
from tests.conftest import ROOT, UNTRAINED_WORDS, module, run_command, untrained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("predict") / "run")


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor.from_checkpoint(run, device="cpu")


@pytest.fixture(scope="module")
def pictures():
    return [scenes.draw(scenes.scene(7, "train", number)).convert("RGB") for number in range(5)]


def test_a_caption_of_any_kind_of_image(predictor, pictures, tmp_path):
    """A file, its bytes, the image and arrays give one caption, one probability, one attention."""
    picture = pictures[0]
    picture.save(tmp_path / "a.png")
    array = np.array(picture)
    data = (tmp_path / "a.png").read_bytes()
    lazy = Image.open(tmp_path / "a.png")
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), data, picture, lazy, array, torch.from_numpy(array)]
    captions = predictor.caption(kinds, batch_size=3)
    first = captions[0]
    assert isinstance(first, Caption) and str(first) == first.text and len(first.words) > 1
    assert (
        first.text == UNTRAINED_WORDS.decode([UNTRAINED_WORDS.ids[word] for word in first.words])
        and first.log_probability < 0
    )
    for caption in captions:
        assert caption.words == first.words
        assert caption.log_probability == pytest.approx(first.log_probability, abs=1e-4)
        assert caption.attention.shape == (len(first.words), 3, 3)
        torch.testing.assert_close(caption.attention.sum(dim=(1, 2)), torch.ones(len(first.words)))


def test_one_image_gives_one_caption_and_pixels_come_in_any_layout(predictor, pictures):
    array = np.array(pictures[0])
    expected = predictor.caption(pictures[0])
    assert isinstance(expected, Caption)
    for pixels in (array.transpose(2, 0, 1), array / 255, torch.from_numpy(array / 255).permute(2, 0, 1)):
        assert predictor.caption(pixels).text == expected.text
    with pytest.raises(InputError, match="float from 0 to 1"):
        predictor.caption(array * 1.5)


def test_a_url_is_captioned_and_a_command_is_refused(predictor, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    assert predictor.caption((tmp_path / "a.png").as_uri()).text == predictor.caption(pictures[0]).text
    with pytest.raises(InputError, match="not as a command"):
        predictor.caption(f"pipe:cat {tmp_path}/a.json")


def test_an_embedding_is_the_mean_of_the_encoder_s_grid(predictor, pictures):
    embedded = predictor.embed(pictures, batch_size=2)
    assert embedded.shape == (len(pictures), predictor.model.encoder.feature_size) and embedded.dtype == torch.float32
    torch.testing.assert_close(predictor.embed(pictures[3]), embedded[3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(embedded[0], embedded[1]) and predictor.embed([]).shape == (0, embedded.shape[1])


def test_the_public_names_come_without_torch_until_they_are_used():
    code = (
        "import sys, captioning, shards; assert 'torch' not in sys.modules; assert 'Predictor' in dir(captioning); "
        "config = captioning.load_config('configs/demo.yaml'); assert 'torch' not in sys.modules; "
        "captioning.Predictor; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_predictor_says_what_it_is(predictor):
    assert repr(predictor).startswith("Predictor(resnet18 + attention, ") and "on cpu)" in repr(predictor)


def test_a_camera_s_rotation_and_transparency_count_for_opened_images_too(predictor, tmp_path):
    tall = Image.linear_gradient("L").resize((64, 128)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    tall.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    see_through = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    buffer = io.BytesIO()
    see_through.save(buffer, "PNG")
    given = [tmp_path / "turned.png", Image.open(tmp_path / "turned.png"), buffer.getvalue(), see_through]
    tensors = [predictor._read(image).pixels for image in given]
    assert torch.equal(tensors[0], tensors[1]) and torch.equal(tensors[2], tensors[3])
    assert tensors[2].min() == 255, "transparent is white"


def test_what_is_no_image_stops_nothing(predictor, pictures, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    given = [
        pictures[0],
        tmp_path / "text.jpg",
        pictures[1],
        tmp_path / "missing.jpg",
        np.zeros((4, 4)),
        b"",
        "null\0byte.jpg",
        *pictures,
    ]
    found = list(predictor.each(iter(given), batch_size=2))
    wrong = {number: str(one) for number, one in enumerate(found) if isinstance(one, InputError)}
    assert list(wrong) == [1, 3, 4, 5, 6] and len(found) == len(given)
    assert (
        "text.jpg cannot be read" in wrong[1]
        and "No such file" in wrong[3]
        and "[H, W, 3] or [3, H, W] is wanted" in wrong[4]
    )
    assert [str(found[number]) for number in (0, 2)] == [c.text for c in predictor.caption(pictures[:2])]
    with pytest.raises(InputError, match=r"text\.jpg"):
        predictor.caption(given)


def test_an_output_that_is_not_finite_stops_nothing(predictor, pictures):
    broken = deepcopy(predictor.model)
    broken.decoder.classifier.bias.data[4] = torch.nan
    for options in (SearchOptions(), SearchOptions(beam_size=2), SearchOptions(temperature=1.0)):
        found = list(replace(predictor, models=(broken,)).each(pictures[:2], options=options))
        assert len(found) == 2 and all("not finite" in str(one) for one in found)


def test_samples_are_the_same_in_batches_of_any_size_and_past_images_that_cannot_be_read(predictor, pictures):
    options = SearchOptions(beam_size=2, temperature=2.0, seed=5)
    images = [pictures[0], "nowhere.jpg", *pictures[1:5]]
    expected = [str(one) for one in predictor.each(images, options=options)]
    assert len(set(expected)) > 3
    for size in (1, 2, 4):
        assert [str(one) for one in predictor.each(images, batch_size=size, options=options)] == expected


def test_images_are_read_ahead_by_a_batch_and_no_further(predictor, pictures):
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield pictures[len(asked) % 5]

    captions = predictor.each(endless(), batch_size=4)
    next(captions)
    assert len(asked) == 8
    captions.close()


def test_a_cpu_captions_what_a_gpu_trained_in_half_precision(predictor, pictures):
    half = replace(predictor, config=replace(predictor.config, precision="fp16"))
    assert half.caption(pictures)[0].log_probability == predictor.caption(pictures)[0].log_probability
    with half.autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_beams_and_ensembles(run, predictor, pictures, tmp_path):
    beams = predictor.caption(pictures, options=SearchOptions(beam_size=3))
    for caption in beams:
        assert len(caption.others) == 2
        scores = [one.log_probability for one in (caption, *caption.others)]
        assert scores == sorted(scores, reverse=True)
    twice = Predictor.from_checkpoint([run, run], device="cpu").caption(pictures)
    for one, two in zip(predictor.caption(pictures), twice, strict=True):
        assert one.words == two.words and one.log_probability == pytest.approx(two.log_probability, abs=1e-4)
    other = Predictor.from_checkpoint([run, untrained_run(tmp_path / "b", seed=1)], device="cpu").caption(pictures)
    assert [c.log_probability for c in other] != [c.log_probability for c in twice]
    with pytest.raises(InputError, match="'gpu' cannot be used here"):
        Predictor.from_checkpoint(run, device="gpu")
    words = Vocabulary(UNTRAINED_WORDS.words[:-1])
    with pytest.raises(InputError, match="another vocabulary"):
        Predictor.from_checkpoint([run, untrained_run(tmp_path / "c", vocabulary=words)])
    with pytest.raises(InputError, match="sees images otherwise"):
        Predictor.from_checkpoint([run, untrained_run(tmp_path / "d", data__resize_size=64, data__image_size=64)])


def test_images_as_people_name_them(tmp_path, monkeypatch, scene_shards):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "notes.txt"):
        (folder / name).write_bytes(b"")

    def names(place):
        return [name.removeprefix(f"{folder}/") for name, _ in images_at(place)]

    assert names(str(folder)) == ["a.jpg", "b.PNG", "deep/c.webp"]
    assert names(f"{folder}/*.jpg") == ["a.jpg"] and names(f"{folder}/**/*.webp") == ["deep/c.webp"]
    assert images_at("gone.jpg") == [("gone.jpg", "gone.jpg")], "counted when it is opened, not before"

    def standard_input(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    standard_input(b"x y.jpg\n\nz.png\r\ncaf\xe9.png")
    assert names("-") == ["x y.jpg", "z.png", "caf\udce9.png"]
    standard_input(b"x\ny.jpg\0z.png\0")
    assert names("-") == ["x\ny.jpg", "z.png"], "as find -print0 writes them"
    standard_input(b"\n")
    (tmp_path / "empty").mkdir()
    for place, expected in (
        (str(tmp_path / "empty"), "holds no images"),
        (f"{folder}/*.gif", "matches no file"),
        (str(scene_shards / "val.json"), "--random"),
        ("-", "names no images"),
    ):
        with pytest.raises(InputError, match=expected):
            images_at(place)
    chosen = random_images(str(scene_shards / "val.json"), 4, seed=1)
    assert len({name for name, _ in chosen}) == 4 and chosen == random_images(str(scene_shards / "val.json"), 4, seed=1)
    assert all(Image.open(io.BytesIO(data)).format == "JPEG" for _, data in chosen)


def test_an_annotated_image_keeps_the_image_and_adds_all_words():
    image = Image.new("RGB", (320, 200), "navy")
    sheet, longer = annotated(image, "A cat."), annotated(image, "A cat " * 30)
    assert sheet.width == 320 and sheet.crop((0, 0, 320, 200)).tobytes() == image.tobytes()
    assert sheet.crop((0, 200, 320, sheet.height)).getextrema()[0][0] < 100, "dark letters"
    assert longer.height > sheet.height > 200
    assert annotated(Image.new("RGB", (4000, 100)), "A cat.").width == 1600
    narrow = annotated(Image.new("RGB", (1, 9000)), "A cat.")
    assert narrow.width == 240 and narrow.height < 1700, "a JPEG has at most 65,535 rows"


def test_dollar_signs_are_no_formula(tmp_path):
    caption_sheet([Image.new("RGB", (64, 64))], ["A $\\frac{ of 5 $."], [None], tmp_path / "a.png", "run $\\x$")
    assert Image.open(tmp_path / "a.png").width > 100


def test_shade_leaves_the_place_looked_at():
    weights = np.zeros((4, 4), dtype=np.float32)
    weights[1, 2] = 0.5
    cover = shade(weights, 64)
    row, column = np.unravel_index(cover.argmin(), cover.shape)
    assert 16 <= row < 32 and 32 <= column < 48 and cover.min() < 0.05 and cover[60, 4] > 0.8


def test_a_reader_that_has_enough_ends_it_quietly(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        with pytest.raises(SystemExit) as end:
            _say("a.jpg: A cat.")
    assert end.value.code == 141, "as a shell says of SIGPIPE"


def test_the_command(run, pictures, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    # A page's own signs, bytes that are no UTF-8, and as long as a name can be.
    names = ["0 <b>&.png", "1\udce9.png", f"2{'x' * 250}.png"]
    for name, picture in zip(names, pictures, strict=False):
        picture.save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    lines, page, notes = tmp_path / "c.jsonl", tmp_path / "page", tmp_path / "notes"
    extra = ["--json", lines, "--html", page, "--annotate", notes, "--beam-size", 2, "--all-beams", "--batch", 2]
    done = run_command(module("launch.caption", run, f"{folder}/*.png", folder / "broken.jpg", *extra))
    assert done.returncode == 0 and "1 of 4 could not be captioned" in done.stderr, done.stderr
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [entry["image"] for entry in entries] == [f"{folder}/{name}" for name in (*names, "broken.jpg")]
    assert (
        all(e["log_probability"] < 0 and len(e["others"]) == 1 for e in entries[:3]) and "broken" in entries[3]["error"]
    )
    html = (page / "index.html").read_text()
    assert "0 &lt;b&gt;&amp;.png" in html and "<b>" not in html
    assert html.count("<article") == 3 and html.count('class="looks"') == 3 and "1 could not be captioned" in html
    assert len(list(notes.glob("*.jpg"))) == 3 and len(list((page / "images").glob("*.jpg"))) == 6
    done = run_command(module("launch.caption", run, folder / "broken.jpg"))
    assert done.returncode == 2 and "1 of 1 could not be captioned" in done.stderr


def test_the_command_draws_captions(run, pictures, tmp_path, monkeypatch, capsys):
    for number, picture in enumerate(pictures[:3]):
        picture.save(tmp_path / f"{number}.png")

    def drawn(*arguments: object) -> list[str]:
        monkeypatch.setattr("sys.argv", ["caption", str(run), str(tmp_path / "*.png"), *map(str, arguments)])
        assert command.main() == 0
        return capsys.readouterr().out.splitlines()

    drawing = ["--temperature", 3, "--sample", 4, "--json", tmp_path / "c.jsonl"]
    lines = drawn(*drawing, "--seed", 1)
    assert len(lines) == 12 and len(set(lines)) > 6
    entries = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [len(entry["others"]) for entry in entries] == [3, 3, 3]
    assert drawn(*drawing, "--seed", 1, "--batch", 1) == lines != drawn(*drawing, "--seed", 2)
    with pytest.raises(InputError, match="--temperature"):
        drawn("--sample", 4)
