"""Captions for any image, with the preprocessing and vocabulary of the checkpoint that writes them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from captioning import checkpoint, interchange
from captioning import config as configuration
from captioning.config import Config
from captioning.data import vocabulary as vocab
from captioning.data.transforms import preprocessing_of
from captioning.data.vocabulary import Vocabulary
from captioning.interchange import Exported
from captioning.model.captioner import Captioner
from captioning.model.search import SearchOptions, options_of, search
from shards.errors import InputError
from shards.images import UnreadableImageError, open_rgb

ImageLike = str | Path | Image.Image


@dataclass(frozen=True)
class Predictor:
    """A trained captioner. ``Predictor.from_checkpoint("runs/demo").caption(["photo.jpg"])`` -> ``["A ..."]``."""

    model: Captioner
    vocabulary: Vocabulary
    config: Config
    step: int
    device: torch.device

    @classmethod
    def from_checkpoint(cls, run: str | Path, which: str = "best", device: str | None = None) -> "Predictor":
        """Load checkpoint ``best``, ``latest`` or ``step-N`` of a run folder, or a folder that launch.export
        wrote; on a GPU where there is one.

        Raises:
            InputError: when the run has no such checkpoint, or it does not verify.
        """
        exported = loaded(Path(run), which)
        model = Captioner(exported.config, len(exported.vocabulary))
        try:
            model.load_state_dict(exported.weights)
        except RuntimeError as error:
            raise InputError(f"{run}: model.safetensors does not fit its config:\n{error}") from error
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model.eval().to(place), exported.vocabulary, exported.config, exported.step, place)

    def caption(
        self, images: Sequence[ImageLike], batch_size: int = 32, options: SearchOptions | None = None
    ) -> list[str]:
        """Captions of files or PIL images, in their order; searched for as in validation unless ``options`` say how.

        Raises:
            InputError: naming the first file that is missing or is no image.
        """
        options = options or options_of(self.config.evaluate)
        preprocessing, captions = preprocessing_of(self.config), list[str]()
        for start in range(0, len(images), batch_size):
            tensors = [preprocessing.for_evaluation(opened(image)) for image in images[start : start + batch_size]]
            batch = torch.stack(tensors).to(self.device)
            found = search([self.model], batch, options, self.config.data.max_words)
            captions += [self.vocabulary.decode(best[0].ids) for best in found]
        return captions


def loaded(run: Path, which: str = "best") -> Exported:
    """The weights of a run's checkpoint ``best``, ``latest`` or ``step-N``, or of a folder that launch.export wrote.

    Raises:
        InputError: when there is no such checkpoint, or it does not verify.
    """
    if interchange.is_model_folder(run):
        return interchange.read(run)
    found = checkpoint.find(run, which, lambda message: warnings.warn(message, stacklevel=2))
    config = configuration.load(found.folder / "config.yaml")
    vocabulary = vocab.from_json(found.text("vocabulary.json"), str(found.folder / "vocabulary.json"))
    origin = f"Step {found.state.step:,} of the run {run.resolve().name}."
    return Exported(config, vocabulary, found.model(), found.state.step, origin)


def opened(image: ImageLike) -> Image.Image:
    """An upright RGB image from a file or a PIL image.

    Raises:
        InputError: when the file is missing or is no image.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return open_rgb(Path(image).read_bytes())
    except (OSError, UnreadableImageError) as error:
        raise InputError(f"{image} cannot be read as an image: {error}") from error
