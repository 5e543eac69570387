"""Every setting of a run, with its default.

A setting is one line here, and only here: what its value may be, what it means, and whether it identifies the run.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from captioning.config.settings import setting, settings_of

DECODERS = ("lstm", "attention", "transformer", "updown")  # here, since a config is checked without torch


@dataclass(frozen=True)
class DataConfig:
    """Splits, words, images, and how they are read."""

    train: str = setting("", "training split's NAME.json: a path, a URL, or a pipe: command", required=True)
    val: str | None = setting(None, "validation split's NAME.json; null: train without validating")
    test: str | None = setting(
        None, "test split's NAME.json, scored once, at the end, with the best checkpoint; null: none"
    )
    captions_per_image: int = setting(
        5, "an image is encoded once for this many captions; more rotate over the epochs", at_least=1, identity=True
    )
    min_word_freq: int = setting(
        4, "a word occurs at least this often in the training captions, else it is <unk>", at_least=1, identity=True
    )
    vocabulary_size: int | None = setting(
        None, "most words of the vocabulary, the most frequent; null: as many as there are", at_least=1, identity=True
    )
    tokenizer: str = setting(
        "words", "words, whitespace, characters or bpe; see captioning/data/tokenizer.py", identity=True
    )
    max_words: int = setting(
        20,
        "longest caption in tokens, without <end>: cut in training, the limit in search",
        at_least=1,
        identity=True,
    )
    crop_mode: Literal["crop", "squash", "pad"] = setting(
        "crop",
        "crop: a square of the image, random in training, central elsewhere; squash: the whole image stretched to a "
        "square; pad: the whole image in its own shape, on the mean colour, which no decoder looks at",
        identity=True,
    )
    resize_size: int = setting(256, "for crop: shorter side in pixels before the crop", at_least=1, identity=True)
    image_size: int = setting(224, "side of the square that the model sees, in pixels", at_least=1, identity=True)
    flip: bool = setting(
        True, "mirror half of the training images; not for captions that say left and right", identity=True
    )
    random_resized_crop: float | None = setting(
        None,
        "train on random regions of at least this share of the area; null: do not",
        above=0,
        at_most=1,
        identity=True,
    )
    color_jitter: float = setting(
        0.0,
        "brightness, contrast and saturation change by up to this share in training",
        at_least=0,
        below=1,
        identity=True,
    )
    rand_augment: bool = setting(False, "two random operations of RandAugment on each training image", identity=True)
    num_workers: int | None = setting(
        None,
        "loader processes a rank; null: its share of the machine's cores, less one; fewer where shared memory is short",
        at_least=0,
    )
    ledger: bool = setting(False, "write a line a sample to RUN/ledger, to audit exactly-once delivery")
    cache_dir: str | None = setting(None, "folder for whole shards of remote splits; null: the machine's temporary one")
    storage_patience_seconds: float = setting(
        600.0, "wait so long for storage that does not answer, train.hang_seconds at most", above=0
    )
    trust_urls: bool = setting(False, "let a NAME.json name shards outside its own folder, and on other hosts")
    cache_gb: float = setting(50.0, "most the cache may hold, shared by all processes of a machine", above=0)
    allow_overlap: bool = setting(False, "validate on images that are trained on too: scores mean little then")
    max_unreadable_fraction: float = setting(
        0.001, "share of an epoch's samples that may be unreadable before the run stops", at_least=0
    )


class EncoderEntry(NamedTuple):
    """A line of the table of encoders."""

    builder: str  # MODULE:CLASS in captioning.model.encoders, imported when the encoder is built
    stages: tuple[str, ...]  # bottom to top: what encoder.trainable may name


def _encoders(names: str, builder: str, stage: str, count: int) -> dict[str, EncoderEntry]:
    stages = tuple(f"{stage}{number}" for number in range(1, count + 1))
    return dict.fromkeys(names.split(), EncoderEntry(builder, stages))


# encoder.name -> who builds it, and its stages. It stands here because a config is checked without importing torch.
ENCODERS: dict[str, EncoderEntry] = {
    **_encoders("resnet18 resnet34 resnet50 resnet101 resnet152", "resnet:ResNet", "layer", 4),
    **_encoders("resnext50_32x4d resnext101_32x8d resnext101_64x4d", "resnet:ResNet", "layer", 4),
    **_encoders("wide_resnet50_2 wide_resnet101_2", "resnet:ResNet", "layer", 4),
    **_encoders("mobilenet_v2 mobilenet_v3_small mobilenet_v3_large", "mobilenet:MobileNet", "layer", 4),
    **_encoders("convnext_tiny convnext_small convnext_base convnext_large", "convnext:ConvNeXt", "stage", 4),
    **_encoders("swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b", "swin:Swin", "stage", 4),
    **_encoders("vit_b_16 vit_b_32", "vit:VisionTransformer", "block", 12),
    **_encoders("vit_l_16 vit_l_32", "vit:VisionTransformer", "block", 24),
    **_encoders("vit_h_14", "vit:VisionTransformer", "block", 32),
    "features": EncoderEntry("given:GivenFeatures", ()),  # of encoders that are not here: captioning pack features
}


@dataclass(frozen=True)
class EncoderConfig:
    """Image to grid of features."""

    name: str = setting("resnet50", "torchvision's name of the backbone; captioning/model/README.md", identity=True)
    weights: str | None = setting(
        None, "a torchvision weights name (IMAGENET1K_V2), a .pth or .safetensors file; null: random"
    )
    feature_size: int | None = setting(
        None, "for name=features, others' features in place of images: how wide they are", at_least=1, identity=True
    )
    last_stage: str | None = setting(
        None, "the stage whose output is the grid, those above it are dropped; null: the top", identity=True
    )
    trainable: str = setting(
        "none", "none, all, or a stage (layer3, stage3, block9): it and those above it are trained", identity=True
    )
    unfreeze_at_step: int = setting(
        0, "the whole backbone is frozen for this many steps, then trainable applies", at_least=0, identity=True
    )
    gradient_checkpointing: bool = setting(
        False, "trained stages keep no activations and compute them twice: memory for time"
    )
    freeze_batch_norm: bool = setting(
        False, "the backbone's BatchNorm uses its stored statistics, also in trained stages", identity=True
    )
    fold_batch_norm: bool = setting(
        True, "BatchNorm of fixed statistics becomes part of its convolution, where no gradient is wanted"
    )
    projection_batch_norm: bool = setting(
        True, "for lstm: normalise the projected feature over the micro-batch", identity=True
    )
    grid_size: int | None = setting(
        None,
        "for decoders that look: pool the feature map to this side; null: keep the encoder's",
        at_least=1,
        identity=True,
    )


@dataclass(frozen=True)
class DecoderConfig:
    """Features to words."""

    name: str = setting(
        "lstm",
        "lstm sees the image once, as one vector; attention (an LSTM), updown (two) and transformer look at its grid "
        "at every word",
        choices=DECODERS,
        identity=True,
    )
    embedding_size: int = setting(256, "width of a word's embedding", at_least=1, identity=True)
    hidden_size: int = setting(512, "width of the LSTM's or transformer's state", at_least=1, identity=True)
    num_layers: int = setting(1, "layers of the LSTM or transformer", at_least=1, identity=True)
    encoder_layers: int = setting(
        0, "of the transformer: layers in which the grid's places look at each other first", at_least=0, identity=True
    )
    num_heads: int = setting(8, "for transformer: attention heads", at_least=1, identity=True)
    dropout: float = setting(
        0.0,
        "on the word embeddings, between layers, and before the word classifier",
        at_least=0,
        below=1,
        identity=True,
    )
    dropout_at: Literal["all", "layers"] = setting("all", "of lstm: everywhere, or between layers alone", identity=True)
    initial_state: Literal["mean", "zero"] = setting(
        "mean",
        "for attention: begin from the mean feature, as in the paper, or from zero, knowing only what is looked at",
        identity=True,
    )
    doubly_stochastic_weight: float = setting(
        1.0,
        "for attention: weight of looking at every place once; less for a small grid",
        at_least=0,
        identity=True,
    )


@dataclass(frozen=True)
class TrainConfig:
    """Batches, length, and the processes that train."""

    objective: Literal["cross_entropy", "self_critical"] = setting(
        "cross_entropy", "what steps minimise", identity=True
    )
    global_batch_size: int = setting(128, "images per optimizer step, over all processes", at_least=1, identity=True)
    micro_batch_size: int = setting(
        64, "most images a process encodes at once; accumulation follows from it", at_least=1
    )
    epochs: int | None = setting(None, "passes over the split; give this or total_steps", at_least=1)
    total_steps: int | None = setting(None, "optimizer steps; give this or epochs", at_least=1)
    world_size: int | None = setting(None, "refuse to start with another number of processes", at_least=1)
    max_skipped_steps: int = setting(20, "this many steps in a row without a finite gradient end the run", at_least=1)
    hang_seconds: int | None = setting(
        600, "after this long without progress every rank says where it is; null: never", at_least=1, at_most=10**7
    )
    scheduled_sampling: float = setting(
        0.0,
        "this share of the words read are the model's own at the end, growing from 0",
        at_least=0,
        below=1,
        identity=True,
    )
    ema_decay: float | None = setting(
        None, "keep an average of the weights that forgets at this rate, and caption with it", at_least=0, below=1
    )
    sync_batch_norm: bool = setting(False, "BatchNorm over the micro-batches of all ranks; GPUs only")
    compile: bool = setting(False, "torch.compile the encoder's stages and additive attention")
    tf32: bool = setting(
        True, "on GPUs: float32 products, convolutions and recurrences alike, with factors rounded to TF32"
    )
    deterministic: bool = setting(
        False, "on GPUs: kernels that add in one order, for a resumed run that is the same to the bit"
    )


@dataclass(frozen=True)
class SelfCriticalConfig:
    """The objective self_critical."""

    samples: int = setting(5, "captions drawn of each image; with baseline=mean two or more", at_least=1, identity=True)
    baseline: Literal["mean", "greedy"] = setting(
        "mean", "reward of the image's other samples, or of its greedy caption", identity=True
    )
    cider_weight: float = setting(1.0, "of CIDEr, 0 to 10, in the reward", at_least=0, identity=True)
    bleu4_weight: float = setting(0.0, "of BLEU-4, 0 to 1, in the reward", at_least=0, identity=True)
    cross_entropy: float = setting(
        0.0, "share of the loss that stays cross-entropy on people's captions", at_least=0, below=1, identity=True
    )
    end_is_a_word: bool = setting(
        True, "<end> counts in the reward's n-grams; false: captions learn to break off in 'on a'", identity=True
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rates."""

    name: Literal["adamw", "adam", "sgd"] = setting(
        "adamw", "adam adds weight decay to the gradient, adamw to the update", identity=True
    )
    momentum: float = setting(0.9, "of sgd", at_least=0, below=1)
    encoder_lr: float = setting(1e-4, "learning rate of the encoder's trained stages", above=0)
    decoder_lr: float = setting(1e-3, "learning rate of the decoder and the projection of the image feature", above=0)
    weight_decay: float = setting(0.0, "of weight matrices", at_least=0)
    warmup_steps: int = setting(0, "steps in which the learning rate rises from 0", at_least=0)
    encoder_warmup_steps: int = setting(
        0, "steps in which the encoder's learning rate rises again, from the step that unfreezes it", at_least=0
    )
    schedule: Literal["constant", "linear", "cosine", "step", "plateau", "noam"] = setting(
        "constant",
        "after the warm-up: linear and cosine fall to 0 at the end; step falls by decay_factor every decay_steps; "
        "plateau falls by it after every decay_patience validations in a row without a better; noam as 1 / sqrt(step)",
    )
    decay_factor: float = setting(0.5, "for step, plateau: learning rates are multiplied by this", above=0)
    decay_steps: int | None = setting(None, "for step: steps between two falls", at_least=1)
    decay_patience: int = setting(3, "for plateau; evaluate.best_metric says what is better", at_least=1)
    layerwise_lr_decay: float = setting(
        1.0, "each encoder stage's learning rate is this times that of the stage above it", above=0
    )
    max_grad_norm: float | None = setting(5.0, "largest norm of the whole gradient; null: not clipped", above=0)
    label_smoothing: float = setting(
        0.0, "this share of a target's probability goes to all words alike; not in perplexity", at_least=0, below=1
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When and how a run is saved."""

    every_steps: int = setting(1000, "steps between two checkpoints", at_least=1)
    keep: int = setting(
        2, "newest checkpoints kept, the best besides; two, so that a damaged one costs an interval", at_least=2
    )
    mirror: str | None = setting(
        None, "a second place for checkpoints, a path or a URL that fsspec opens; a start without any fetches from it"
    )
    background: bool = setting(True, "write while training goes on; false: training waits, and needs less memory")


@dataclass(frozen=True)
class EvaluateConfig:
    """Validation, and how captions are searched for."""

    every_steps: int | None = setting(None, "steps between two validations; null: at every epoch's end", at_least=1)
    best_metric: Literal[
        "CIDEr", "CIDEr-plain", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "NIST-4", "class_accuracy", "loss"
    ] = setting("CIDEr", "makes a checkpoint the best: the highest, or the lowest teacher-forced loss", identity=True)
    patience: int | None = setting(
        None, "stop after this many validations in a row without a better one; null: never", at_least=1
    )
    top_k: int = setting(
        5, "under teacher forcing, how often the true word is among this many likeliest: top5_accuracy", at_least=1
    )
    batch_size: int = setting(64, "images a process captions at once", at_least=1)
    beam_size: int = setting(1, "captions kept while searching for the best; 1 is greedy search", at_least=1)
    length_penalty: float = setting(
        0.0, "beams are ranked by log-probability / (words + 1) ** this; 1 is the mean per word"
    )
    min_words: int = setting(0, "no caption ends before it has this many words", at_least=0)
    no_repeat_ngram: int = setting(0, "no caption repeats this many words in a row; 0: it may", at_least=0)


@dataclass(frozen=True)
class MonitorConfig:
    """What a run shows of itself."""

    log_every_steps: int = setting(10, "steps between two readings of loss and rates", at_least=1)
    trackers: Literal["none", "wandb"] = setting(
        "none", "besides TensorBoard, through Accelerate; wandb must be installed"
    )


@dataclass(frozen=True)
class Config:
    """The run itself."""

    run: str = setting("", "run folder: checkpoints, TensorBoard events, scores", required=True)
    seed: int = setting(0, "of initial weights, order, crops, flips and dropout", at_least=0, identity=True)
    precision: Literal["no", "bf16", "fp16"] = setting("no", "autocast of the forward pass; no: float32")
    resume: bool = setting(
        True, "continue the run in the folder, if there is one; false refuses a folder that holds a run"
    )
    init_from: str | None = setting(
        None, "run or exported folder whose best weights and vocabulary a new run begins with", identity=True
    )
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    self_critical: SelfCriticalConfig = field(default_factory=SelfCriticalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


SETTINGS = settings_of(Config)
# What a resumed run may not change: another value would be another experiment under the same name.
IDENTITY = tuple(key for key, one in SETTINGS.items() if one.identity)
