"""A rank's copy of the model under DDP: what ranks begin with alike, and what each keeps to itself."""

from pathlib import Path

import torch

from captioning.distributed.ranks import init_distributed
from captioning.training.objectives import CrossEntropy, StepScope
from captioning.training.train_step import TrainStep
from tests.distributed.test_train_step import batch_of, tiny
from tests.processes import in_processes


def averages_of_pretrained_weights(folder: Path) -> None:
    accelerator, ranks = init_distributed("no")
    config, captioner = tiny(ema_decay=0.9)
    if ranks.is_main:  # which alone reads encoder.weights
        torch.nn.init.ones_(captioner.encoder.stages["layer4"][0].conv1.weight)
    train_step = TrainStep(captioner, CrossEntropy(), config, accelerator, ranks, total_steps=9)
    with train_step.averaged():
        assert (captioner.encoder.stages["layer4"][0].conv1.weight == 1).all()
    (folder / f"{ranks.rank}").touch()
    ranks.barrier()
    train_step.replica.release()
    accelerator.end_training()


def test_averages_begin_with_the_weights_that_rank_0_read(tmp_path):
    in_processes(2, averages_of_pretrained_weights, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def statistics_of_ranks() -> None:
    accelerator, ranks = init_distributed("no")
    config, captioner = tiny()
    norm = captioner.encoder.stages["layer4"][0].bn1
    norm.running_mean.fill_(ranks.rank + 1.0)
    train_step = TrainStep(captioner, CrossEntropy(), config, accelerator, ranks, 9)

    def of_ranks() -> list[list[float]]:
        return ranks.all_gather(norm.running_mean.tolist())

    assert of_ranks() == [[1.0] * 512] * 2, "both begin with rank 0's"
    for step in range(2):
        train_step.step(StepScope(step, 4, 12.0, 2), [batch_of([4, 5, 6], ranks.rank)])
        mine, other = of_ranks()
        assert mine != other, "each collects its own: nothing is broadcast at each step"
    train_step.replica.share_buffers()
    assert of_ranks() == [mine] * 2
    ranks.barrier()
    train_step.replica.release()
    accelerator.end_training()


def test_ranks_begin_with_one_batch_norm_and_share_it_where_it_is_used():
    in_processes(2, statistics_of_ranks)


def frozen_stages_are_folded_once() -> None:
    accelerator, ranks = init_distributed("no")
    config, captioner = tiny()
    train_step = TrainStep(captioner, CrossEntropy(), config, accelerator, ranks, 9)
    twins = []
    for step in range(3):
        train_step.step(StepScope(step, 2, 24.0, 2), [batch_of([4, 5, 6], ranks.rank)] * 2)
        train_step.replica.share_buffers()
        twins.append([captioner.encoder._folded[stage]._twin for stage in captioner.encoder.frozen])
    assert len(twins[0]) == 3 and all(twin is not None for twin in twins[0])
    assert all(one is other for later in twins[1:] for one, other in zip(twins[0], later, strict=True))
    ranks.barrier()
    train_step.replica.release()
    accelerator.end_training()


def test_frozen_stages_are_folded_once_though_ranks_share_their_statistics():
    in_processes(2, frozen_stages_are_folded_once)
