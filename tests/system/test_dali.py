"""NVIDIA DALI's webdataset reader, on a CPU, reads our shards by our .idx. Skipped where DALI is not there."""

import numpy as np
import pytest

from shards import sources
from shards.packing.packer import pack
from shards.packing.plan import Settings
from shards.reader import read_sample
from tests.conftest import write_coco
from tests.system.test_pack import jpeg

fn = pytest.importorskip("nvidia.dali.fn", reason="NVIDIA DALI is not installed: pip install nvidia-dali-cuda120")


def test_dali_reads_every_byte_by_our_idx(tmp_path, monkeypatch):
    from nvidia.dali import pipeline_def

    monkeypatch.setattr("shards.packing.plan.TAR_OVERHEAD", 200_000)
    names = {f"{n}.jpg": [f"Picture {n}, naïve."] for n in range(12)}
    source = sources.coco(*write_coco(tmp_path / "coco", names, jpeg()))
    index = pack(source, "train", tmp_path / "out", Settings(shard_mb=1))
    assert len(index.shards) > 1
    tars = [str(shard.path) for shard in index.shards]
    idx = [str(shard.path.with_suffix(".idx")) for shard in index.shards]

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def read():
        images, texts = fn.readers.webdataset(paths=tars, index_paths=idx, ext=["jpg", "json"])
        return images, texts

    pipe = read()
    pipe.build()
    read_by_dali = []
    for _ in range(3):
        images, texts = pipe.run()
        read_by_dali += [(np.array(images[i]).tobytes(), np.array(texts[i]).tobytes()) for i in range(4)]
    ours = [read_sample(index, number) for number in range(12)]
    assert [image for image, _ in read_by_dali] == [sample.image_bytes for sample in ours]
    assert all(sample.captions[0] in text.decode() for sample, (_, text) in zip(ours, read_by_dali, strict=True))
