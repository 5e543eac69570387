"""What a run is made of, once it has been prepared."""

from dataclasses import dataclass
from pathlib import Path

import torch

from captioning.config import Config
from captioning.data.captions import EncodedCaptions
from captioning.data.dataset import train_dataset
from captioning.data.transforms import preprocessing_of
from captioning.data.vocabulary import Vocabulary
from captioning.distributed.ranks import Ranks
from captioning.model.captioner import Captioner
from captioning.runs.checkpoint import Checkpoint, RunState
from captioning.training.checks import total_steps
from captioning.training.init_weights import init_weights, put
from shards.dataset import ShardDataset
from shards.hashing import key_of
from shards.index import Index
from shards.order import step_range, steps_per_epoch


@dataclass(frozen=True)
class Experiment:
    """What rank 0 found and settled, the same on every rank."""

    train: Index
    val: Index | None
    vocabulary: Vocabulary
    captions: EncodedCaptions
    val_captions: EncodedCaptions | None
    references: Path | None  # the training captions' n-grams, where the objective needs them
    checkpoint: Checkpoint | None
    state: RunState
    changed: list[str]  # settings that differ from the ones the run began with
    workers: int  # loader processes a rank

    def step_range(self, step: int, config: Config) -> tuple[int, int, int]:
        return step_range(step, len(self.train), config.train.global_batch_size)

    def steps_per_epoch(self, config: Config) -> int:
        return steps_per_epoch(len(self.train), config.train.global_batch_size)

    def total_steps(self, config: Config) -> int:
        return total_steps(config, len(self.train))

    def train_batches(self, config: Config, ranks: Ranks, pin_memory: bool) -> ShardDataset:
        return train_dataset(
            self.train,
            self.captions,
            preprocessing_of(config),
            config.data.captions_per_image,
            seed=config.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=self.workers,
            pin_memory=pin_memory,
        )

    def build_model(self, config: Config, is_main: bool) -> Captioner:
        """The model to start from; weights of others on rank 0 alone, since DDP hands its parameters to all.

        Raises:
            InputError: when the checkpoint to continue from holds another model.
        """
        torch.manual_seed(key_of("model", config.seed) >> 1)
        model = Captioner(config, len(self.vocabulary))
        if self.checkpoint is not None:
            try:
                model.load_state_dict(self.checkpoint.model())
            except RuntimeError as error:
                raise self.checkpoint.unfitting(error) from error
        elif is_main and (other := init_weights(config)):
            put(other, config, model)
        elif is_main:
            model.encoder.load_pretrained(config.encoder.weights)
        return model
