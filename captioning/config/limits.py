"""Settings that are right by themselves and cannot be together."""

from collections.abc import Callable

from captioning.config.sections import ENCODERS, Config, DecoderConfig, EncoderConfig, SelfCriticalConfig


def impossible(config: Config) -> list[str]:
    """The mistakes in a config, each "key: what is wrong"."""
    mistakes = _unfitting_encoder(config.encoder) + _unfitting_options(config.decoder)
    mistakes += _OF_DECODERS[config.decoder.name](config) if config.decoder.name in _OF_DECODERS else []
    mistakes += _unfitting_self_critical(config.self_critical) + _unfitting_schedule(config)
    if config.train.scheduled_sampling and config.train.objective != "cross_entropy":
        mistakes.append("train.scheduled_sampling: only train.objective=cross_entropy reads captions of people")
    if config.evaluate.patience is not None and config.data.val is None:
        mistakes.append("evaluate.patience: needs data.val, a validation split to watch")
    if config.data.crop_mode == "crop" and config.data.resize_size < config.data.image_size:
        mistakes.append("data.resize_size: must not be smaller than data.image_size, the crop taken from it")
    if (config.train.epochs is None) == (config.train.total_steps is None):
        mistakes.append("train.epochs, train.total_steps: give exactly one of the two")
    return mistakes


def _unfitting_options(decoder: DecoderConfig) -> list[str]:
    """Options of another decoder than the one that is named."""
    mistakes = []
    if decoder.name != "transformer" and decoder.encoder_layers:
        mistakes.append("decoder.encoder_layers: only decoder.name=transformer has them")
    if decoder.dropout_at != "all" and (decoder.name != "lstm" or decoder.num_layers == 1):
        mistakes.append("decoder.dropout_at: layers is for decoder.name=lstm with decoder.num_layers of 2 or more")
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


def _unfitting_self_critical(asked: SelfCriticalConfig) -> list[str]:
    mistakes = []
    if asked.baseline == "mean" and asked.samples == 1:
        mistakes.append("self_critical.samples: baseline=mean compares an image's samples: 2 or more, or set greedy")
    if not asked.cider_weight + asked.bleu4_weight > 0:
        mistakes.append("self_critical.cider_weight, self_critical.bleu4_weight: one of the two must be positive")
    return mistakes


def _unfitting_encoder(encoder: EncoderConfig) -> list[str]:
    """An unknown encoder, or one that has no such stage."""
    if encoder.name not in ENCODERS:
        return [f"encoder.name: {encoder.name!r} is not one of {', '.join(ENCODERS)}"]
    if (encoder.name == "features") != (encoder.feature_size is not None):
        return ["encoder.feature_size: is for encoder.name=features, and needed there"]
    if encoder.name == "features" and (encoder.weights or encoder.trainable != "none"):
        return ["encoder.weights, encoder.trainable: encoder.name=features has nothing that learns; null, none"]
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


def _lstm_limits(config: Config) -> list[str]:
    if config.encoder.grid_size is not None:
        return ["encoder.grid_size: decoder.name=lstm sees no grid; this is for those that look"]
    return []


def _attention_limits(config: Config) -> list[str]:
    decoder = config.decoder
    if decoder.num_layers != 1:
        return [f"decoder.num_layers: decoder.name={decoder.name} has its own layers; leave it at 1"]
    return []


def _transformer_limits(config: Config) -> list[str]:
    decoder, mistakes = config.decoder, []
    if decoder.embedding_size != decoder.hidden_size:
        mistakes.append("decoder.embedding_size: must equal decoder.hidden_size, the transformer's width")
    if decoder.hidden_size % decoder.num_heads or decoder.hidden_size % 4:
        mistakes.append("decoder.hidden_size: must be a multiple of decoder.num_heads, and of 4 for the positions")
    return mistakes


# decoder.name -> the mistakes it sees in a config, "key: what is wrong". Here, since a config is checked without torch.


_OF_DECODERS: dict[str, Callable[[Config], list[str]]] = {
    "lstm": _lstm_limits,
    "attention": _attention_limits,
    "transformer": _transformer_limits,
    "updown": _attention_limits,
}
