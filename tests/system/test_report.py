"""The report of a run: what it says is what the run's files say, and it opens anywhere."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from captioning.config import from_dict
from captioning.evaluation.results import Reference, ScoredCaptions
from captioning.evaluation.scores import evaluate
from captioning.inference import cost_profile as profile
from captioning.inference.pointing import Pointing
from captioning.inference.predictor import Predictor
from captioning.report import page
from captioning.report.charts import chart
from captioning.report.class_tables import class_section
from captioning.report.facts import Facts, curves_of, read_run, validations_of
from captioning.report.reward_charts import reward_charts
from shards import index as shard_index
from shards.errors import InputError
from shards.files import sha256_of
from shards.reader import read_sample
from tests.conftest import module, run_command, untrained_run


def test_a_self_critical_run_has_its_own_curves():
    points = [(step, 0.1 * step) for step in range(1, 9)]
    tags = ("reward", "baseline", "advantage", "caption_length", "distinct_fraction", "bad_ending_fraction")
    charts = reward_charts({f"train/{tag}": points for tag in tags})
    assert len(charts) == 4 and all("<svg" in drawn for drawn in charts)
    assert "distinct" in charts[3] and "bad ending" in charts[3] and "repetition" not in charts[3]
    assert reward_charts({"train/loss": points}) == []


VOID = {"meta", "link", "img", "br", "line"}


class Checked(HTMLParser):
    """Reads a page and notes tags left open, images without words for them, and addresses outside the page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.outside = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.images += [values.get("alt")] if tag == "img" else []
        self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith(("data:", "#"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory, scene_shards):
    """An untrained run with what training leaves beside its checkpoint."""
    run = untrained_run(
        tmp_path_factory.mktemp("report") / "a run & <more>",
        data__train=scene_shards / "train.json",
        data__val=scene_shards / "val.json",
    )
    val = shard_index.load(scene_shards / "val.json")
    said = Predictor.from_checkpoint(run, device="cpu").caption(
        [read_sample(val, n).image_bytes for n in range(len(val))]
    )
    results = [{"image_id": t.image_id, "caption": c.text} for t, c in zip(val.texts(), said, strict=True)]
    (run / "captions-val-step-1.json").write_text(json.dumps(results))
    (run / "captions-val-step-1-of-mine.json").write_text("not to be read")
    (run / "scores.jsonl").write_text('{"step": 1, "BLEU-4": 0.1, "CIDEr": 0.5}\n{"step": 2, "BLE')
    (run / "status").write_text("finished\nstep 1 of 1\n")
    board = SummaryWriter(str(run / "tensorboard"))
    for step in range(1, 9):
        board.add_scalar("train/loss", 3 / step, step)
        board.add_scalar("train/lr/decoder", 1e-3, step)
        board.add_scalar("train/top5_accuracy", 0.5, step)
    board.close()
    return run


@pytest.fixture(scope="module")
def facts(run) -> Facts:
    return read_run(run, examples=2, device="cpu")


def test_a_page_says_what_the_files_say(run, facts):
    written = page.write(facts, None)
    assert [path.name for path in written] == ["report.html", "loss.png", "attention.png"]
    assert all(Image.open(path).width > 400 for path in written[1:])
    text = written[0].read_text()
    checked = Checked(text)
    assert not checked.outside and "@import" not in text and "<script" not in text
    assert all(checked.images), "every image has words for those who do not see it"
    assert "a run &amp; &lt;more&gt;" in text and "<more>" not in text
    for name, value in facts.evaluation.scores.items():
        assert f"<td>{name}</td>" in text and f"{value:.4f}</td>" in text
    for name in ("encoder.name", "decoder.hidden_size"):
        assert text.count(f"<code>{name}</code>") == 2, "among the differences, and among all settings"
    assert text.count("<code>optim.max_grad_norm</code>") == 1, "as by default"
    assert len(facts.best) == len(facts.typical) == len(facts.worst) == 2
    scores = [example.score for example in facts.examples]
    assert scores == sorted(scores, reverse=True) or facts.worst[0].score <= facts.worst[1].score
    assert len({example.image_id for example in facts.examples}) == 6
    for example in facts.examples:
        assert all(reference in text for reference in example.references[:5])
    assert text.count('class="looks"') == sum(bool(example.caption.words) for example in facts.examples)
    assert "<strong>Top-5 accuracy</strong>" in text and " of “" not in text
    other = replace(facts, best=[replace(facts.best[0], scored="Other & words.")])
    assert f"CIDEr {facts.best[0].score:.2f} of “Other &amp; words.”" in page.html(other, None)
    assert "44 images" in text and "10 images" in text, "the model card knows the data"


def test_attention_that_points_beside_is_not_drawn(run, facts):
    misses, hits = Pointing(30, 100, 0.25, 2, 2), Pointing(92, 100, 0.25, 8, 8)
    believed = replace(facts, pointing=hits)
    assert run / "attention.png" in page.write(believed, None)
    assert f"{page.capital(hits)}." in page.html(believed, None)
    doubted = replace(facts, pointing=misses)
    assert run / "attention.png" not in page.write(doubted, None)
    assert not (run / "attention.png").exists(), "that of the report before would be believed"
    text = page.html(doubted, None)
    assert 'class="looks"' not in text and "30.0% of 100 words" in text and "2 x 2" in text
    page.write(facts, None)


def test_curves_are_those_that_tensorboard_shows(run, tmp_path):
    """A killed run wrote on to step 8; resumed from step 5 it wrote other values, which are the ones that count."""
    assert [step for step, _ in curves_of(run)["train/loss"]] == list(range(1, 9))
    shutil.copytree(run / "tensorboard", tmp_path / "tensorboard")
    board = SummaryWriter(str(tmp_path / "tensorboard"), purge_step=6, filename_suffix=".z")
    for step in (6, 7):
        board.add_scalar("train/loss", 10.0 + step, step)
    board.close()
    assert curves_of(tmp_path)["train/loss"] == [
        (1, 3.0),
        (2, 1.5),
        (3, 1.0),
        (4, 0.75),
        (5, pytest.approx(0.6)),
        (6, 16),
        (7, 17),
    ]
    assert validations_of(run) == [{"step": 1, "BLEU-4": 0.1, "CIDEr": 0.5}], "half a line is no line"
    assert curves_of(tmp_path / "nowhere") == {}


def test_a_run_whose_data_are_gone_still_gets_a_page(run, scene_shards, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = next(moved.glob("checkpoints/*/config.yaml"))
    manifest = config.with_name("manifest.json")
    document = json.loads(manifest.read_text())
    config.write_text(config.read_text().replace(str(scene_shards), str(tmp_path / "gone")))
    document["config.yaml"] = {"size": config.stat().st_size, "sha256": sha256_of(config)}
    manifest.write_text(json.dumps(document))
    found = read_run(moved, device="cpu")
    text = page.html(found, None)
    Checked(text)
    assert found.evaluation is None and len(found.notes) >= 2 and "gone" in found.notes[0]
    assert 'id="curves"' in text and 'id="scores"' not in text and 'id="card"' in text
    with pytest.raises(InputError, match="not a run folder"):
        read_run(tmp_path)


def labelled(facts, count, per_class=3) -> Facts:
    """The facts of images of ``count`` classes, whose captions name the class, but for the last of each, one off."""
    names = [f"kind_{number}" for number in range(count)]
    rows = [(k, k if i < per_class - 1 else (k + 1) % count) for k in range(count) for i in range(per_class)]
    captioned = ScoredCaptions(
        tuple(range(len(rows))),
        tuple(f"A photo of a kind {said}." for _, said in rows),
        tuple(Reference((f"A photo of a kind {k}.",), names[k]) for k, _ in rows),
    )
    return Facts(facts.run, facts.predictor, ("", ""), {}, [], None, None, evaluate(captioned), 1)


def test_classes(facts):
    assert class_section(facts) == "", "scenes have none"
    text = class_section(labelled(facts, 4))
    Checked(text)
    cells = [int(n) for n in re.findall(r'<td style="[^"]*" title="[^"]*">(\d*)</td>', text) if n]
    assert sum(cells) == 12 and cells.count(2) == 4 and cells.count(1) == 4
    assert "class_accuracy" in text and "0.6667" in text and "Every class" in text
    assert len(re.findall(r'<th scope="row">', class_section(labelled(facts, 60)))) == 60
    many = class_section(labelled(facts, 300))
    Checked(many)
    assert "Most frequent confusions" in many and "Best 10 classes" in many and "Worst 10" in many
    assert len(re.findall(r'<th scope="row">', many)) == 60 and "another class" in many
    cells = [int(n) for n in re.findall(r'<td style="[^"]*" title="[^"]*">(\d*)</td>', many) if n]
    assert sum(cells) == 180, "every image of the classes that are shown"


def test_what_was_not_scored_is_said(facts):
    found = facts.evaluation.captioned
    some = replace(found, captions=(" . ", *found.captions[1:]), missing=("7", "8"))
    text = page.html(replace(facts, evaluation=evaluate(some)), None)
    assert "2 images could not be read or have no references" in text and "1 captions have no word" in text
    assert "could not be read" not in page.html(facts, None)


def test_charts_take_what_runs_leave():
    assert chart("Loss", {"a": []}) == "" and chart("Loss", {"a": [(1, float("nan"))]}) == ""
    for values in ([(5, 1.0)], [(1, 0.0), (2, 0.0)], [(1, -2.5), (9, 1e7)], [(n, 1e-7 * n) for n in range(5000)]):
        svg = chart("A & B", {"one": values, "two": values[:1]}, "unit", may_be_log=True)
        Checked(svg)
        assert "nan" not in svg and "inf" not in svg and "A &amp; B" in svg and len(svg) < 40_000
        places = [float(n) for n in re.findall(r"[ML](-?[\d.]+),", svg)]
        assert all(40 <= place <= 400 for place in places)
    logarithmic = chart("P", {"p": [(1, 2000.0), (2, 3.0)]}, may_be_log=True)
    assert "logarithmic" in logarithmic and ">1000<" in logarithmic and ">10k<" in logarithmic


def test_parameters_and_flops_of_a_backbone():
    """ResNet-18 without its classifier: 11,176,512 parameters; 1.814 G multiply-adds at 224 pixels are known."""
    values = {"run": "x", "data": {"train": "x"}, "train": {"epochs": 1}}
    cost = profile.backbone_cost("resnet18", from_dict(values, ""), torch.device("cpu"))
    assert cost.parameters == 11_176_512 and cost.flops == pytest.approx(2 * 1.8136e9, rel=1e-3) and cost.latency_ms > 0


def test_the_command(run):
    done = run_command(module("launch.report", run, "--examples", 1))
    assert done.returncode == 0, done.stderr
    text = (run / "report.html").read_text()
    Checked(text)
    assert all(name in text for name in profile.BACKBONES) and '<tr class="own"><td>resnet18' in text


def test_it_fits_a_telephone(facts, tmp_path):
    """Laid out by Chromium at 380 pixels: nothing hangs over the side, light and dark differ."""
    if not (browser := shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")):
        pytest.skip("Chromium is not here: apt-get install chromium")
    report = page.html(labelled(facts, 12), None).replace("</main>", page.html(facts, None).split("<main>")[1])
    inner = report.replace("&", "&amp;").replace("'", "&#39;")
    frame = f"<iframe id=f width=380 height=900 style='border:0' srcdoc='{inner}'></iframe>"
    script = "onload=()=>{const d=f.contentDocument;document.title=[d.documentElement.scrollWidth,"
    script += "getComputedStyle(d.body).backgroundColor].join('|')}"
    path = tmp_path / "frame.html"
    path.write_text(f"<!doctype html><body>{frame}<script>{script}</script>")
    colours = set()
    for scheme in (0, 1):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        flags += [f"--user-data-dir={tmp_path / 'user'}", f"--blink-settings=preferredColorScheme={scheme}"]
        done = subprocess.run(
            [browser, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=180
        )
        found = re.search(r"<title>(\d+)\|([^<]*)</title>", done.stdout)
        assert found and int(found[1]) <= 380, done.stdout[:300]
        colours.add(found[2])
    assert len(colours) == 2
