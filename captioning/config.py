"""Every setting of a run, with its default. A config file holds only what differs; ``key.name=value`` overrides it."""

import difflib
import types
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shards.errors import InputError, listed


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # the training split's NAME.json, written by launch.pack: a path, a URL, or a pipe: command
    val: str | None = None  # the validation split's NAME.json; null: train without validating
    test: str | None = None  # the test split's NAME.json, scored once, at the end, with the best checkpoint; null: none
    captions_per_image: int = 5  # an image is encoded once for this many captions; more rotate over the epochs
    min_word_freq: int = 4  # a word must occur this often in the training captions, else it is <unk>
    vocabulary_size: int | None = None  # most words of the vocabulary, the most frequent; null: as many as there are
    tokenizer: str = "words"  # words, whitespace, characters or bpe; see captioning/data/tokenizer.py
    max_words: int = 20  # longest caption in tokens, <end> not counted: cut in training, the limit in search
    # crop: a square of the image, random in training, central elsewhere; squash: the whole image stretched to a square;
    # pad: the whole image in its own shape, on the mean colour, which no decoder looks at
    crop_mode: Literal["crop", "squash", "pad"] = "crop"
    resize_size: int = 256  # for crop: shorter side in pixels before the crop
    image_size: int = 224  # side of the square that the model sees, in pixels
    flip: bool = True  # mirror half of the training images; not for captions that say left and right
    random_resized_crop: float | None = None  # train on random regions of at least this share of the area; null: do not
    color_jitter: float = 0.0  # brightness, contrast and saturation change by up to this share in training
    rand_augment: bool = False  # two random operations of RandAugment on each training image
    num_workers: int | None = None  # loader processes a rank; null: the machine's cores shared out, at most 8
    ledger: bool = False  # write a line a sample to RUN/ledger, to audit exactly-once delivery
    cache_dir: str | None = None  # where whole shards of remote splits are kept; null: the machine's temporary folder
    cache_gb: float = 50.0  # most the cache may hold, shared by all processes of a machine
    max_unreadable_fraction: float = 0.001  # share of an epoch's samples that may be unreadable before the run stops


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
}


@dataclass(frozen=True)
class EncoderConfig:
    name: str = "resnet50"  # one of ENCODERS: torchvision's name of it
    weights: str | None = None  # a torchvision weights name (IMAGENET1K_V2), a .pth or .safetensors file, or null
    last_stage: str | None = None  # the stage whose output is the grid, those above it are dropped; null: the top
    trainable: str = "none"  # none, all, or a stage of the encoder (layer3, stage3, block9): it and those above it
    unfreeze_at_step: int = 0  # the whole backbone is frozen for this many steps, then trainable applies
    gradient_checkpointing: bool = False  # trained stages keep no activations and compute them twice: memory for time
    freeze_batch_norm: bool = False  # the backbone's BatchNorm uses its stored statistics, also in trained stages
    fold_batch_norm: bool = True  # where its statistics are fixed and no gradient is wanted: part of the convolutions
    projection_batch_norm: bool = True  # for lstm: normalise the projected feature over the micro-batch
    grid_size: int | None = None  # for decoders that look: pool the feature map to this side; null: as it comes


@dataclass(frozen=True)
class DecoderConfig:
    # lstm sees the image once, as one vector; attention (an LSTM), updown (two) and transformer look at its grid at
    # every word
    name: Literal["lstm", "attention", "transformer", "updown"] = "lstm"
    embedding_size: int = 256
    hidden_size: int = 512
    num_layers: int = 1
    encoder_layers: int = 0  # of the transformer: layers in which the grid's places look at each other first
    num_heads: int = 8  # of the transformer
    dropout: float = 0.0  # on the word embeddings, between layers, and before the word classifier
    dropout_at: Literal["all", "layers"] = "all"  # of lstm: layers, between layers alone
    doubly_stochastic_weight: float = 1.0  # for attention: weight of looking at every place once; less for a small grid


@dataclass(frozen=True)
class TrainConfig:
    objective: Literal["cross_entropy", "self_critical"] = "cross_entropy"  # what steps minimise
    global_batch_size: int = 128  # images per optimizer step, over all processes
    micro_batch_size: int = 64  # most images a process encodes at once; accumulation follows from it
    epochs: int | None = None  # give this or total_steps
    total_steps: int | None = None
    world_size: int | None = None  # refuse to start with another number of processes
    max_skipped_steps: int = 20  # this many steps in a row without a finite gradient end the run
    hang_seconds: int | None = 600  # so long without progress, and every rank says where it is; null: never
    scheduled_sampling: float = 0.0  # this share of the words read are the model's own at the end, growing from 0
    ema_decay: float | None = None  # keep an average of the weights that forgets at this rate, and caption with it
    sync_batch_norm: bool = False  # BatchNorm over the micro-batches of all ranks; GPUs only
    compile: bool = False  # torch.compile the encoder's stages
    deterministic: bool = False  # on GPUs: kernels that add in one order, for a resumed run that is the same to the bit


@dataclass(frozen=True)
class SelfCriticalConfig:
    samples: int = 5  # captions drawn of each image; with baseline=mean two or more
    baseline: Literal["mean", "greedy"] = "mean"  # reward of the image's other samples, or of its likeliest words
    cider_weight: float = 1.0  # of CIDEr, 0 to 10, in the reward
    bleu4_weight: float = 0.0  # of BLEU-4, 0 to 1, in the reward
    cross_entropy: float = 0.0  # share of the loss that stays cross-entropy on people's captions
    end_is_a_word: bool = True  # <end> counts in the reward's n-grams; false: captions learn to break off in "on a"


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adam", "sgd"] = "adamw"  # adam adds weight decay to the gradient, adamw to the update
    momentum: float = 0.9  # of sgd
    encoder_lr: float = 1e-4
    decoder_lr: float = 1e-3  # also for the projection of the image feature
    weight_decay: float = 0.0
    warmup_steps: int = 0  # the rates rise over this many steps
    encoder_warmup_steps: int = 0  # the encoder's rise again over this many, from the step that unfreezes it
    # After the warm-up. linear and cosine fall to 0 at the end; step falls by decay_factor every decay_steps; plateau
    # falls by it after every decay_patience validations in a row without a better one; noam as 1 / sqrt(step).
    schedule: Literal["constant", "linear", "cosine", "step", "plateau", "noam"] = "constant"
    decay_factor: float = 0.5  # for step, plateau: the rates are multiplied by this
    decay_steps: int | None = None  # for step
    decay_patience: int = 3  # for plateau; evaluate.best_metric says what is better
    layerwise_lr_decay: float = 1.0  # each encoder stage's rate is this times that of the stage above it
    max_grad_norm: float | None = 5.0  # largest norm of the whole gradient
    label_smoothing: float = 0.0  # this share of a target's probability goes to all words alike; not in perplexity


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 2  # newest checkpoints kept, the best besides
    background: bool = True  # write while training goes on; false: training waits, and needs less memory


@dataclass(frozen=True)
class EvaluateConfig:
    every_steps: int | None = None  # null: at every epoch's end
    best_metric: Literal[
        "CIDEr", "CIDEr-plain", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "NIST-4", "class_accuracy", "loss"
    ] = "CIDEr"  # makes a checkpoint the best: the highest, or the lowest teacher-forced loss
    patience: int | None = None  # stop after this many validations in a row without a better one; null: never
    top_k: int = 5  # under teacher forcing, how often the true word is among this many likeliest: top5_accuracy
    batch_size: int = 64  # images a process captions at once
    beam_size: int = 1  # captions kept while searching for the best; 1 is greedy search
    length_penalty: float = 0.0  # beams are ranked by log-probability / (words + 1) ** this; 1 is the mean per word
    min_words: int = 0  # no caption ends before
    no_repeat_ngram: int = 0  # no caption says so many words in a row twice; 0: it may


@dataclass(frozen=True)
class MonitorConfig:
    log_every_steps: int = 10
    trackers: Literal["none", "wandb"] = "none"  # besides TensorBoard, through Accelerate; wandb must be installed


@dataclass(frozen=True)
class Config:
    run: str = ""  # run folder: checkpoints, TensorBoard events, scores
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    resume: bool = True  # continue the run in the folder, if there is one; false refuses a folder that holds a run
    init_from: str | None = None  # run or exported folder whose best weights and vocabulary a new run begins with
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    self_critical: SelfCriticalConfig = field(default_factory=SelfCriticalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


# What a resumed run may not change: another value would be another experiment under the same name.
IDENTITY = (
    "seed",
    "init_from",
    "train.objective",
    "train.scheduled_sampling",
    "self_critical.samples",
    "self_critical.baseline",
    "self_critical.cider_weight",
    "self_critical.bleu4_weight",
    "self_critical.cross_entropy",
    "self_critical.end_is_a_word",
    "data.captions_per_image",
    "data.min_word_freq",
    "data.vocabulary_size",
    "data.tokenizer",
    "data.max_words",
    "data.resize_size",
    "data.image_size",
    "data.flip",
    "data.crop_mode",
    "data.random_resized_crop",
    "data.color_jitter",
    "data.rand_augment",
    "encoder.name",
    "encoder.last_stage",
    "encoder.trainable",
    "encoder.unfreeze_at_step",
    "encoder.freeze_batch_norm",
    "encoder.projection_batch_norm",
    "encoder.grid_size",
    "decoder.name",
    "decoder.embedding_size",
    "decoder.hidden_size",
    "decoder.num_layers",
    "decoder.encoder_layers",
    "decoder.num_heads",
    "decoder.dropout",
    "decoder.dropout_at",
    "decoder.doubly_stochastic_weight",
    "evaluate.best_metric",
    "optim.name",
    "train.global_batch_size",
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and apply ``key.name=value`` overrides.

    Raises:
        InputError: listing every unknown key (with the nearest right one), ill-typed and impossible value at once.
    """
    malformed = [item for item in overrides or [] if "=" not in item or item.startswith(("=", "-"))]
    if malformed:
        raise InputError(f"Overrides are written key.name=value; these are not:\n{listed(map(repr, malformed))}")
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ValueError("it holds a list; lines of key: value are wanted")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides or []))
        values = OmegaConf.to_container(merged, resolve=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"There is no config file {path}. The shipped ones are in configs/.") from error
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from error
    except Exception as error:  # PyYAML's errors share no importable base with OmegaConf's
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise InputError(f"{path} is not YAML: {error}") from error
    return from_dict(values, str(path))


def from_dict(values: Any, where: str) -> Config:
    """A Config from nested dictionaries; see ``load_config``.

    Raises:
        InputError: listing every mistake at once.
    """
    mistakes: list[str] = []
    config = _build(Config, values, "", mistakes)
    told = {mistake.split(":")[0] for mistake in mistakes}
    mistakes += [mistake for mistake in _impossible(config) if mistake.split(":")[0] not in told]
    if mistakes:
        raise InputError(f"{len(mistakes)} mistake(s) in {where} and its overrides:\n{listed(mistakes, limit=20)}")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    return asdict(config)


def save_text(config: Config) -> str:
    """The whole config as YAML, defaults and all."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every setting."""
    return {
        f"{section}.{name}" if isinstance(value, dict) else section: inner
        for section, value in to_dict(config).items()
        for name, inner in (value.items() if isinstance(value, dict) else [("", value)])
    }


def _build(kind: Any, values: Any, prefix: str, mistakes: list[str]) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        mistakes.append(f"{prefix.rstrip('.') or 'the file'}: a section of key: value lines is wanted, not {values!r}")
        return kind()
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            mistakes.append(f"{prefix}{name}: unknown key{_nearest(f'{prefix}{name}')}")
    built = {}
    for name, hint in hints.items():
        if name not in values:
            continue
        if is_dataclass(hint):
            built[name] = _build(hint, values[name], f"{prefix}{name}.", mistakes)
            continue
        value = values[name]
        if value is False and "no" in get_args(hint):
            value = "no"  # which YAML reads as false
        if problem := _mismatch(value, hint):
            mistakes.append(f"{prefix}{name}: {problem}")
        else:
            built[name] = float(value) if hint is float else value
    return kind(**built)


def _mismatch(value: Any, hint: Any) -> str | None:
    """Why a value does not fit a type hint; None when it does."""
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        return (
            None
            if value in allowed and not isinstance(value, bool)
            else f"{value!r} is not one of {', '.join(allowed)}"
        )
    if get_origin(hint) in (Union, types.UnionType):
        if value is None or any(arm is not type(None) and _mismatch(value, arm) is None for arm in get_args(hint)):
            return None
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number if hint is float else isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    return None if fits else f"{wanted} is wanted, not {value!r}"


def _nearest(key: str) -> str:
    """A hint at the right key: the closest spelling, else the same name in another section."""
    known = [*flat(Config()), *(f.name for f in fields(Config))]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    name = key.rsplit(".", 1)[-1]
    close = close or [k for k in known if k.rsplit(".", 1)[-1] == name]
    close = close or difflib.get_close_matches(name, [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def _impossible(config: Config) -> list[str]:
    """Settings that are well typed and still cannot be."""
    at_least_one = [
        "data.captions_per_image",
        "data.min_word_freq",
        "data.vocabulary_size",
        "data.max_words",
        "data.image_size",
        "decoder.embedding_size",
        "decoder.hidden_size",
        "decoder.num_layers",
        "decoder.num_heads",
        "encoder.grid_size",
        "train.global_batch_size",
        "train.micro_batch_size",
        "train.epochs",
        "train.total_steps",
        "train.world_size",
        "train.max_skipped_steps",
        "train.hang_seconds",
        "self_critical.samples",
        "checkpoint.every_steps",
        "evaluate.every_steps",
        "evaluate.batch_size",
        "evaluate.beam_size",
        "evaluate.patience",
        "evaluate.top_k",
        "monitor.log_every_steps",
        "optim.decay_steps",
        "optim.decay_patience",
    ]
    at_least_zero = [
        "seed",
        "data.num_workers",
        "data.max_unreadable_fraction",
        "optim.weight_decay",
        "optim.warmup_steps",
    ]
    at_least_zero += ["decoder.doubly_stochastic_weight", "evaluate.min_words", "evaluate.no_repeat_ngram"]
    at_least_zero += ["encoder.unfreeze_at_step", "decoder.encoder_layers", "optim.encoder_warmup_steps"]
    at_least_zero += ["self_critical.cider_weight", "self_critical.bleu4_weight"]
    positive = ["optim.encoder_lr", "optim.decoder_lr", "optim.layerwise_lr_decay", "optim.max_grad_norm"]
    positive += ["data.cache_gb", "optim.decay_factor"]
    below_one = [
        "optim.momentum",
        "data.color_jitter",
        "train.scheduled_sampling",
        "decoder.dropout",
        "optim.label_smoothing",
        "train.ema_decay",
    ]
    below_one += ["self_critical.cross_entropy"]
    values = flat(config)
    mistakes = [f"{k}: {values[k]} must be at least 1" for k in at_least_one if values[k] is not None and values[k] < 1]
    mistakes += [f"{k}: {values[k]} must not be negative" for k in at_least_zero if (values[k] or 0) < 0]
    mistakes += [f"{k}: {values[k]} must be positive" for k in positive if values[k] is not None and not values[k] > 0]
    mistakes += [f"{key}: must be given" for key in ("run", "data.train") if not values[key]]
    mistakes += [f"{k}: {values[k]} is not in [0, 1)" for k in below_one if not 0 <= (values[k] or 0) < 1]
    mistakes += _unfitting_encoder(config.encoder)
    mistakes += _unfitting_decoder(config)
    mistakes += _unfitting_schedule(config)
    if config.train.scheduled_sampling and config.train.objective != "cross_entropy":
        mistakes.append("train.scheduled_sampling: only train.objective=cross_entropy reads captions of people")
    mistakes += _unfitting_self_critical(config.self_critical)
    if config.evaluate.patience is not None and config.data.val is None:
        mistakes.append("evaluate.patience: needs data.val, a validation split to watch")
    if config.checkpoint.keep < 2:
        mistakes.append(
            "checkpoint.keep: at least 2, so that a damaged newest checkpoint costs one interval, not the run"
        )
    if config.data.crop_mode == "crop" and config.data.resize_size < config.data.image_size:
        mistakes.append("data.resize_size: must not be smaller than data.image_size, the crop taken from it")
    if config.data.random_resized_crop is not None and not 0 < config.data.random_resized_crop <= 1:
        mistakes.append("data.random_resized_crop: a share of the area is wanted, more than 0 and at most 1")
    if (config.train.epochs is None) == (config.train.total_steps is None):
        mistakes.append("train.epochs, train.total_steps: give exactly one of the two")
    return mistakes


def _unfitting_schedule(config: Config) -> list[str]:
    """A schedule that lacks what it goes by."""
    optim, mistakes = config.optim, []
    if (optim.schedule == "step") != (optim.decay_steps is not None):
        mistakes.append("optim.decay_steps: optim.schedule=step needs it, and no other does")
    if optim.schedule == "plateau" and config.data.val is None:
        mistakes.append("optim.schedule: plateau needs data.val, a validation split to watch")
    if optim.schedule == "noam" and not optim.warmup_steps:
        mistakes.append("optim.warmup_steps: optim.schedule=noam needs a warm-up, whose end is its peak")
    return mistakes


def _unfitting_encoder(encoder: EncoderConfig) -> list[str]:
    """An unknown encoder, or one that has no such stage."""
    if encoder.name not in ENCODERS:
        return [f"encoder.name: {encoder.name!r} is not one of {', '.join(ENCODERS)}"]
    stages = ENCODERS[encoder.name].stages
    if encoder.last_stage is not None:
        if encoder.last_stage not in stages:
            return [f"encoder.last_stage: {encoder.last_stage!r} is not one of {encoder.name}'s: {', '.join(stages)}"]
        stages = stages[: stages.index(encoder.last_stage) + 1]
    choices = ("none", "all", *stages)
    if encoder.trainable not in choices:
        up_to = "" if encoder.last_stage is None else f" up to encoder.last_stage={encoder.last_stage}"
        listing = ", ".join(choices)
        return [f"encoder.trainable: {encoder.trainable!r} is not one of {encoder.name}'s{up_to}: {listing}"]
    return []


def _unfitting_self_critical(asked: SelfCriticalConfig) -> list[str]:
    mistakes = []
    if asked.baseline == "mean" and asked.samples == 1:
        mistakes.append("self_critical.samples: baseline=mean compares an image's samples: 2 or more, or set greedy")
    if not asked.cider_weight + asked.bleu4_weight > 0:
        mistakes.append("self_critical.cider_weight, self_critical.bleu4_weight: one of the two must be positive")
    return mistakes


def _unfitting_decoder(config: Config) -> list[str]:
    """Settings the decoder of this kind cannot have."""
    decoder, mistakes = config.decoder, []
    if decoder.name == "lstm" and config.encoder.grid_size is not None:
        mistakes.append("encoder.grid_size: decoder.name=lstm sees no grid; this is for those that look")
    if decoder.name in ("attention", "updown") and decoder.num_layers != 1:
        mistakes.append(f"decoder.num_layers: decoder.name={decoder.name} has its own layers; leave it at 1")
    if decoder.name != "transformer" and decoder.encoder_layers:
        mistakes.append("decoder.encoder_layers: only decoder.name=transformer has them")
    if decoder.dropout_at != "all" and (decoder.name != "lstm" or decoder.num_layers == 1):
        mistakes.append("decoder.dropout_at: layers is for decoder.name=lstm with decoder.num_layers of 2 or more")
    if decoder.name == "transformer":
        if decoder.embedding_size != decoder.hidden_size:
            mistakes.append("decoder.embedding_size: must equal decoder.hidden_size, the transformer's width")
        if decoder.num_heads > 0 and (decoder.hidden_size % decoder.num_heads or decoder.hidden_size % 4):
            mistakes.append("decoder.hidden_size: must be a multiple of decoder.num_heads, and of 4 for the positions")
    return mistakes
