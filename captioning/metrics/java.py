"""METEOR and SPICE, which exist in Java only: pycocoevalcap's, in a process of their own that cannot outlive its time.

``python -m captioning.metrics.java meteor|spice IN.json OUT.json`` is that process.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from captioning.metrics.metric import Metric, mean_of
from captioning.metrics.ngrams import Floats, Tokens

_ROOT = Path(__file__).resolve().parents[2]
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_FETCH = 'python -c "from pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; get()"'
# SPICE's serializer looks into Java's own classes, which Java 16 and newer must be told to allow.
_OPENED = ("lang", "lang.reflect", "util", "util.concurrent", "io", "math", "time", "nio", "net", "text")
_JAVA = {"JDK_JAVA_OPTIONS": " ".join(f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in _OPENED)}
_STATISTICS = 23  # numbers METEOR keeps of a caption


class UnavailableError(Exception):
    """A metric cannot be had here; the message says why, and what would help."""


def measure_in_java(
    candidates: list[Tokens], references: list[list[Tokens]], seconds: float
) -> tuple[list[Metric], dict[str, str]]:
    """METEOR and SPICE, at most ``seconds`` each; and for each that is not to be had, the reason."""
    metrics, skipped = [], {}
    for name, metric in (("METEOR", meteor), ("SPICE", spice)):
        try:
            metrics.append(metric(candidates, references, seconds))
        except UnavailableError as reason:
            skipped[name] = str(reason)
    return metrics, skipped


def meteor(candidates: list[Tokens], references: list[list[Tokens]], seconds: float) -> Metric:
    """METEOR 1.5 (Denkowski & Lavie, WMT 2014), English.

    Raises:
        UnavailableError: when Java or pycocoevalcap is missing, fails, or takes longer than ``seconds``.
    """
    sums = np.array(_run("meteor", candidates, references, seconds), dtype=np.float64)
    # METEOR counts a caption matched whole and in order as no chunk, not one.
    whole = (sums[:, -2] == sums[:, 0]) & (sums[:, -1] == sums[:, 1]) & (sums[:, -3] == 1)
    sums[whole, -3] = 0
    return Metric("METEOR", _meteor(sums), sums, _meteor)


def _meteor(sums: Floats) -> Floats:
    """The score from METEOR's own statistics [..., 23]: lengths, function words, matches of four kinds, chunks, matched
    words; equal to what the Java program makes of them."""
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)  # exact, stem, synonym, paraphrase
    kinds = np.array([1.0, 0.6, 0.8, 0.6])

    def matched(side: int) -> Floats:  # 0: precision of the caption, 1: recall of the reference
        content, function = matches[..., side], matches[..., side + 2]
        weighted = ((delta * content + (1 - delta) * function) * kinds).sum(axis=-1)
        words, function_words = sums[..., side], sums[..., side + 2]
        return _over(weighted, delta * (words - function_words) + (1 - delta) * function_words)

    precision, recall = matched(0), matched(1)
    mean = _over(precision * recall, alpha * precision + (1 - alpha) * recall)
    fragmentation = _over(sums[..., 20], (sums[..., 21] + sums[..., 22]) / 2)
    return mean * (1 - gamma * fragmentation**beta)


def _over(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def spice(candidates: list[Tokens], references: list[list[Tokens]], seconds: float) -> Metric:
    """SPICE (Anderson et al., https://arxiv.org/abs/1607.08822).

    Raises:
        UnavailableError: as ``meteor``; also when Stanford's models, which pycocoevalcap does not bring, are missing.
    """
    return mean_of("SPICE", _run("spice", candidates, references, seconds))


def _why_not(name: str) -> str | None:
    if shutil.which("java") is None:
        return "there is no Java here"
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        return "pycocoevalcap is not installed: pip install pycocoevalcap"
    library = Path(package.submodule_search_locations[0]) / "spice" / "lib"
    if name == "spice" and not all((library / jar).is_file() for jar in _SPICE_MODELS):
        return f"Stanford's models are not installed; this fetches them from nlp.stanford.edu: {_FETCH}"
    return None


def _run(name: str, candidates: list[Tokens], references: list[list[Tokens]], seconds: float) -> list:
    """What the process wrote; it and all its children are gone afterwards, however it went."""
    if reason := _why_not(name):
        raise UnavailableError(reason)
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        source, target, errors = (Path(folder) / file for file in ("in.json", "out.json", "errors.txt"))
        captions = [" ".join(words) for words in candidates], [[" ".join(ref) for ref in refs] for refs in references]
        source.write_text(json.dumps(captions), encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "captioning.metrics.java", name, str(source), str(target)]
        with errors.open("wb") as file:
            process = subprocess.Popen(
                command, env={**os.environ, **_JAVA, "PYTHONPATH": path}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise UnavailableError(f"no result within {seconds:g} seconds; --java-seconds sets the limit") from None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code or not target.is_file():
            raise UnavailableError(f"it failed: {_last_line(errors)}")
        return json.loads(target.read_text(encoding="utf-8"))


def _last_line(errors: Path) -> str:
    lines = [line.strip() for line in errors.read_text(encoding="utf-8", errors="replace").splitlines()]
    telling = [line for line in lines if "Error" in line or "Exception" in line]
    return (telling or [line for line in lines if line] or ["it said nothing"])[-1]


def _meteor_statistics(hypotheses: dict[int, list[str]], references: dict[int, list[str]]) -> list[list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        statistics = [[float(x) for x in scorer._stat(hypotheses[i][0], references[i]).split()] for i in hypotheses]
        if any(len(of_image) != _STATISTICS for of_image in statistics):
            raise BrokenPipeError
    except (BrokenPipeError, ValueError):
        scorer.meteor_p.kill()
        last_words = scorer.meteor_p.stderr.read().decode(errors="replace")
        sys.stderr.write(last_words or "Java ended without a word")
        sys.stderr.flush()
        os._exit(1)  # past Meteor's own clean-up, which would complain of the broken pipe
    return statistics


def _spice_scores(hypotheses: dict[int, list[str]], references: dict[int, list[str]]) -> list[float]:
    from pycocoevalcap.spice.spice import Spice

    _, scores = Spice().compute_score(references, hypotheses)
    return np.nan_to_num([score["All"]["f"] for score in scores]).tolist()  # NaN: no proposition in either


def main(name: str, source: str, target: str) -> None:
    candidates, references = json.loads(Path(source).read_text(encoding="utf-8"))
    hypotheses, known = {i: [c] for i, c in enumerate(candidates)}, dict(enumerate(references))
    scores = _meteor_statistics(hypotheses, known) if name == "meteor" else _spice_scores(hypotheses, known)
    Path(target).write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
