"""Captions for any image, with the preprocessing and vocabulary of the checkpoint that writes them."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning import config as configuration
from captioning.config import Config
from captioning.data import vocabulary as vocab
from captioning.data.transforms import Preprocessing, View, preprocessing_of
from captioning.data.vocabulary import Vocabulary
from captioning.inference import model_bundle
from captioning.inference.model_bundle import ModelBundle
from captioning.model.captioner import Captioner
from captioning.model.hypotheses import Hypothesis
from captioning.model.search import SearchOptions, options_of, search
from captioning.runs import checkpoint
from shards import storage
from shards.errors import InputError
from shards.images import UnreadableImageError, open_rgb, upright_rgb
from shards.storage.urls import place_of

# A path or URL, a file's bytes, an opened image, or an array of pixels: uint8, or float from 0 to 1, [H, W, 3] or
# [3, H, W].
ImageLike = str | Path | bytes | Image.Image | np.ndarray | Tensor
ImageList = list[ImageLike] | tuple[ImageLike, ...]
_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Caption:
    """What a model says of an image; ``str`` of it is the text.

    ``log_probability`` is the natural logarithm of the caption's probability, its end counted in. ``attention``
    float32 [len(words), rows, columns] says where in the preprocessed (square) image the model looked for each word,
    each word's summing to 1; None where the decoder does not look. ``others`` are the beams it was chosen from.
    """

    text: str
    log_probability: float
    words: tuple[str, ...]
    attention: Tensor | None = None
    others: tuple["Caption", ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, repr=False)
class Predictor:
    """Trained captioners that caption together, most often one.

    ``Predictor.from_checkpoint("runs/demo/run").caption("photo.jpg")`` -> ``Caption("A ...", ...)``.
    """

    models: tuple[Captioner, ...]
    vocabulary: Vocabulary
    config: Config  # of the first
    step: int
    device: torch.device

    @property
    def model(self) -> Captioner:
        return self.models[0]

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return preprocessing_of(self.config)

    @classmethod
    def from_checkpoint(
        cls, run: str | Path | Sequence[str | Path], which: str = "best", device: str | None = None
    ) -> "Predictor":
        """Load checkpoint ``best``, ``latest`` or ``step-N`` of a run folder, or a folder that ``captioning export``
        wrote; on a GPU where there is one. Several runs make an ensemble: they vote on every word.

        Raises:
            InputError: when there is no such checkpoint, or it does not verify; when the runs of an ensemble differ
                in their vocabulary or preprocessing.
        """
        runs = [Path(run)] if isinstance(run, str | Path) else [Path(one) for one in run]
        bundles = [loaded(path, which) for path in runs]
        first = bundles[0]
        for path, other in zip(runs[1:], bundles[1:], strict=True):
            if other.vocabulary != first.vocabulary:
                raise InputError(f"{path} has another vocabulary than {runs[0]}: they cannot vote on words.")
            if not preprocessing_of(other.config).evaluates_like(preprocessing_of(first.config)):
                raise InputError(
                    f"{path} sees images otherwise than {runs[0]}: see data.image_size, crop_mode and resize_size."
                )
        place = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        models = tuple(_model_of(one, path).to(place) for one, path in zip(bundles, runs, strict=True))
        return cls(models, first.vocabulary, first.config, first.step, place)

    @overload
    def caption(self, images: ImageLike, batch_size: int = 32, options: SearchOptions | None = None) -> Caption: ...

    @overload
    def caption(
        self, images: ImageList, batch_size: int = 32, options: SearchOptions | None = None
    ) -> list[Caption]: ...

    def caption(
        self, images: ImageLike | ImageList, batch_size: int = 32, options: SearchOptions | None = None
    ) -> Caption | list[Caption]:
        """The caption of an image, or of each of a list of images in their order; searched for as in validation unless
        ``options`` say how.

        Raises:
            InputError: naming the first that is missing or no image. ``each`` goes on with the rest.
        """
        if isinstance(images, ImageLike):
            return self.caption([images], batch_size, options)[0]
        captions = []
        for said in self.each(images, batch_size, options):
            if isinstance(said, InputError):
                raise said
            captions.append(said)
        return captions

    @torch.inference_mode()
    def embed(self, images: ImageLike | ImageList, batch_size: int = 32) -> Tensor:
        """What the first model's encoder makes of an image, pooled: float32 [D] on the CPU, or [N, D] of N images.

        Raises:
            InputError: naming the first that is missing or no image.
        """
        if isinstance(images, ImageLike):
            return self.embed([images])[0]
        vectors = [torch.empty(0, self.model.encoder.feature_size)]
        for start in range(0, len(images), batch_size):
            views = [self.preprocessing.for_evaluation(opened(image)) for image in images[start : start + batch_size]]
            with self.autocast():
                pooled = self.model.encoder.pooled(*self._batch(views))
            vectors.append(pooled.float().cpu())
        return torch.cat(vectors)

    def __repr__(self) -> str:
        decoder, size = self.config.decoder.name, self.config.data.image_size
        models = "" if len(self.models) == 1 else f"ensemble of {len(self.models)}, "
        return (
            f"Predictor({models}{self.config.encoder.name} + {decoder}, {len(self.vocabulary):,} words, "
            f"{size} x {size} pixels, step {self.step:,}, on {self.device})"
        )

    def each(
        self, images: Iterable[ImageLike], batch_size: int = 32, options: SearchOptions | None = None
    ) -> Iterator[Caption | InputError]:
        """For each of any number of images its caption, or why there is none. The next batch is decoded by
        threads while one is captioned; no more than these two are held. What is sampled for an image depends on the
        seed and its number among ``images``, whatever the batches and unreadable images before it."""
        options, images = options or options_of(self.config.evaluate), iter(images)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

            def begun() -> list[Future[View | InputError]]:
                return [pool.submit(self._read, image) for image in islice(images, batch_size)]

            waiting, first = begun(), 0
            while waiting:
                following = begun()
                yield from self._captioned([one.result() for one in waiting], options, first)
                first += len(waiting)
                waiting = following

    def autocast(self) -> torch.autocast:
        """The precision the run was trained in, on a GPU; a CPU captions in full precision, having no fp16 LSTM."""
        dtype = _AUTOCAST[self.config.precision] if self.device.type == "cuda" else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _batch(self, views: list[View]) -> tuple[Tensor, Tensor | None]:
        """Images uint8 [B, 3, S, S] on the device, and where they are in the pixels int [B, 4]; None: everywhere."""
        valid = [view.valid for view in views if view.valid is not None]
        images = torch.stack([view.pixels for view in views]).to(self.device)
        return images, torch.tensor(valid, device=self.device) if valid else None

    def _read(self, image: ImageLike) -> View | InputError:
        try:
            return self.preprocessing.for_evaluation(opened(image))
        except InputError as error:
            return error

    def _captioned(
        self, read: list[View | InputError], options: SearchOptions, first: int
    ) -> Iterator[Caption | InputError]:
        good = [one for one in read if isinstance(one, View)]
        numbers = [first + i for i, one in enumerate(read) if isinstance(one, View)]
        results: Iterator[list[Hypothesis]] = iter(())
        if good:
            with self.autocast():
                images, valid = self._batch(good)
                results = iter(search(self.models, images, options, self.config.data.max_words, numbers, valid))
        for one in read:
            yield self._said(next(results)) if isinstance(one, View) else one

    def _said(self, hypotheses: list[Hypothesis]) -> Caption | InputError:
        if not hypotheses:
            return InputError(
                "The model's output is not finite. Where it is so for every image, take an earlier checkpoint; where "
                "for some, half precision may be too small for them: a CPU captions in full precision."
            )
        best, *others = [self._one(hypothesis) for hypothesis in hypotheses]
        return Caption(best.text, best.log_probability, best.words, best.attention, tuple(others))

    def _one(self, hypothesis: Hypothesis) -> Caption:
        words = tuple(self.vocabulary.words[i] for i in hypothesis.ids)
        attention = hypothesis.attention
        if attention is not None:
            side = math.isqrt(attention.shape[1])  # a square image gives a square grid
            attention = attention.unflatten(1, (side, side))
        return Caption(self.vocabulary.decode(hypothesis.ids), hypothesis.log_probability, words, attention)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch's word for a device it does not know, or that is not here
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0][:120]}") from error


def _model_of(bundle: ModelBundle, run: Path) -> Captioner:
    model = Captioner(bundle.config, len(bundle.vocabulary))
    try:
        model.load_state_dict(bundle.weights)
    except RuntimeError as error:
        lines = "\n".join(line[:160] for line in str(error).splitlines()[:6])
        raise InputError(
            f"{run}: its weights are of another architecture or vocabulary than its config says:\n{lines}"
        ) from error
    return model.eval()


def loaded(run: Path, which: str = "best") -> ModelBundle:
    """The weights of a run's checkpoint ``best``, ``latest`` or ``step-N``, or those that ``captioning export`` wrote.

    Raises:
        InputError: when there is no such checkpoint, or it does not verify.
    """
    if model_bundle.is_model_folder(run):
        return model_bundle.read(run)
    saved = checkpoint.find(run, which, lambda message: warnings.warn(message, stacklevel=2))
    config = configuration.load_saved(saved.folder / "config.yaml")
    vocabulary = vocab.from_json(saved.text("vocabulary.json"), str(saved.folder / "vocabulary.json"))
    origin = f"Step {saved.state.step:,} of the run {run.resolve().name}."
    return ModelBundle(config, vocabulary, saved.captioner(), saved.state.step, origin)


def opened(image: ImageLike) -> Image.Image:
    """An upright RGB image.

    Raises:
        InputError: when a file is missing or no image, or an array holds no pixels (see ``ImageLike``).
    """
    try:
        match image:
            case Image.Image():
                return upright_rgb(image)
            case bytes():
                return open_rgb(image)
            case np.ndarray() | Tensor():
                return _from_array(image)
            case _:
                return open_rgb(_bytes_of(image))
    except (OSError, ValueError, UnreadableImageError) as error:  # ValueError: no name of a file at all
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        name = image if isinstance(image, str | Path) else f"An image given as {type(image).__name__}"
        raise InputError(f"{name} cannot be read as an image: {why}") from error


def _bytes_of(place: str | Path) -> bytes:
    """A file's bytes; a text with :// is a URL. A command is refused: names of images come from anywhere."""
    if isinstance(place, str) and place.startswith("pipe:"):
        raise InputError(f"{place[:120]}: an image is given as a path or a URL, not as a command.")
    if isinstance(place, str) and "://" in place:
        return storage.read_all(place_of(place))
    return Path(place).read_bytes()


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if values.ndim == 3 and values.shape[0] == 3 and values.shape[2] != 3:
        values = values.transpose(1, 2, 0)
    if np.issubdtype(values.dtype, np.floating) and values.size and values.min() >= 0 and values.max() <= 1:
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3 or not values.size:
        raise InputError(
            f"An array of {values.dtype} {list(values.shape)} is no image: uint8, or float from 0 to 1, "
            "[H, W, 3] or [3, H, W] is wanted."
        )
    return Image.fromarray(np.ascontiguousarray(values))
