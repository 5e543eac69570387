"""Weights and vocabulary of another run to begin with: ``init_from``."""

from pathlib import Path

from captioning.config import Config, flat
from captioning.inference.model_bundle import ModelBundle
from captioning.inference.predictor import loaded
from captioning.model.captioner import Captioner
from shards.errors import InputError, listed

# Settings that make a vocabulary or give weights their shape or their meaning.
OF_THE_MODEL = (
    "data.tokenizer",
    "data.vocabulary_size",
    "data.min_word_freq",
    "encoder.name",
    "encoder.last_stage",
    "encoder.projection_batch_norm",
    "encoder.grid_size",
    "decoder.name",
    "decoder.embedding_size",
    "decoder.hidden_size",
    "decoder.initial_state",
    "decoder.encoder_layers",
    "decoder.num_layers",
    "decoder.num_heads",
)


def init_weights(config: Config) -> ModelBundle | None:
    """The best checkpoint of the run, or the exported folder, that ``init_from`` names; None where it names none.

    Raises:
        InputError: when it cannot be read, or is of another model or vocabulary than the config's.
    """
    if config.init_from is None:
        return None
    if Path(config.init_from).resolve() == Path(config.run).resolve():
        raise InputError(f"init_from={config.init_from} is the run's own folder. Give the new run another run=FOLDER.")
    bundle = loaded(Path(config.init_from))
    theirs, ours = flat(bundle.config), flat(config)
    differing = [f"{key}: {theirs[key]} there, {ours[key]} here" for key in OF_THE_MODEL if theirs[key] != ours[key]]
    if differing:
        raise InputError(
            f"init_from={config.init_from} was trained with another model or vocabulary than this config asks for:\n"
            f"{listed(differing, limit=20)}\nSet these as they are there."
        )
    return bundle


def put(bundle: ModelBundle, config: Config, model: Captioner) -> None:
    """The weights into a model of the config's.

    Raises:
        InputError: when they do not fit it.
    """
    try:
        model.load_state_dict(bundle.weights)
    except RuntimeError as error:
        why = listed((line[:160] for line in str(error).splitlines()), limit=6)
        raise InputError(f"init_from={config.init_from}: its weights do not fit this config's model:\n{why}") from error
