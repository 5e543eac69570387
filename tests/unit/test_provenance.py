"""Scores carry where they come from."""

from captioning import __version__
from captioning.evaluation import provenance
from shards import index as shard_index
from shards.overlap import overlap


def test_scores_name_their_data_and_what_the_splits_share(scene_shards, tmp_path):
    train, val = (shard_index.load(scene_shards / f"{name}.json") for name in ("train", "val"))
    about = provenance.provenance(train.fingerprint, val, "words", overlap(train, val))
    assert about["train_fingerprint"] == train.fingerprint != about["split_fingerprint"] == val.fingerprint
    assert about["overlap"]["same"] == 0 and about["overlap"]["val_images"] == len(val)
    assert about["tokenizer"] == "words" and about["version"] == __version__
    provenance.keep(tmp_path, about)
    assert provenance.kept(tmp_path) == about
    said = provenance.in_words(about)
    assert "0 images are also in the training split" in said and val.fingerprint[:12] in said


def test_a_run_s_scores_on_another_split_are_compared_with_its_training_data(scene_shards, tmp_path):
    train, val = (shard_index.load(scene_shards / f"{name}.json") for name in ("train", "val"))
    provenance.keep(tmp_path, provenance.provenance(train.fingerprint, val, "words", None))
    assert provenance.of_run(tmp_path, train, val, "words")["overlap"] is None, "as the run itself noted it"
    (tmp_path / provenance.FILE).write_text("{cut")
    assert provenance.of_run(tmp_path, train, val, "words")["overlap"]["same"] == 0
    assert provenance.of_run(tmp_path, None, val, "words")["overlap"] is None
