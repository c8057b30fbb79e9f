"""String graders: `string_check`, and `text_similarity` measured by libraries.

OpenAI publishes the names of the metrics and no settings. These are ours. Two empty texts are alike (1), an empty and
a full one are not (0), whatever the metric; what else is equal is 1, but for what is said here.

- `fuzzy_match`: rapidfuzz `fuzz.WRatio` / 100 after `default_process` (lower case, letters and digits alone), without
  it where that leaves nothing of a text.
- `bleu`: sacrebleu `sentence_score` / 100: 13a tokens, case kept, exponential smoothing, effective order.
- `gleu`: NLTK `sentence_gleu` on words and punctuation, 1 to 4 grams, case kept.
- `meteor`: NLTK `meteor_score` on words and punctuation: Porter stems, WordNet synonyms, case ignored. Equal texts of n
  words give 1 - 0.5 / n^3.
- `rouge_1` to `rouge_5`, `rouge_l`: rouge-score, F-measure, no stems, case ignored, letters a to z and digits alone: in
  other scripts, and between texts of fewer than n words, it is 0.
- `cosine`: of the two embeddings, negative ones 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from graft.errors import GraderError
from graft.grading.libraries import import_library
from graft.grading.observe import Observation
from graft.grading.schema import StringCheck, TextSimilarity
from graft.grading.template import parse_template
from graft.types import Grade

Judge = Callable[[Observation], Grade]
Measure = Callable[[str, str], float]
"""(input, reference) -> similarity from 0 to 1; neither is empty."""

_WORDS = re.compile(r"\w+|[^\w\s]+")

OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


def string_check(spec: StringCheck) -> Judge:
    """1 if the operation holds between the two texts, else 0. Nothing is trimmed or normalised."""
    text, reference = parse_template(spec.input), parse_template(spec.reference)
    holds = OPERATIONS[spec.operation]

    def judge(seen: Observation) -> Grade:
        namespaces = seen.namespaces
        return Grade(float(holds(text.render(namespaces), reference.render(namespaces))))

    return judge


def text_similarity(spec: TextSimilarity, measure: Measure) -> Judge:
    """How alike the two texts are, by a measure of `load_measure`."""
    text, reference = parse_template(spec.input), parse_template(spec.reference)

    def judge(seen: Observation) -> Grade:
        namespaces = seen.namespaces
        return Grade(similarity(text.render(namespaces), reference.render(namespaces), measure))

    return judge


def similarity(text: str, reference: str, measure: Measure) -> float:
    """A measure with the rule for empty texts, within 0 and 1."""
    if not text or not reference:
        return float(text == reference)
    return min(1.0, max(0.0, measure(text, reference)))


def load_measure(metric: str) -> Measure:
    """The measure of a metric, its library imported. `cosine` is the judge client's.

    Raises:
        GraderError: the library, or WordNet for `meteor`, is missing; says how to get it.
    """
    if metric == "fuzzy_match":
        return _fuzzy_match()
    if metric == "bleu":
        return _bleu()
    if metric == "gleu":
        gleu = import_library("nltk.translate.gleu_score", metric)
        return lambda text, reference: gleu.sentence_gleu([words(reference)], words(text))
    if metric == "meteor":
        return _meteor()
    scorer = import_library("rouge_score.rouge_scorer", metric)
    kind = "rougeL" if metric == "rouge_l" else f"rouge{metric.removeprefix('rouge_')}"
    rouge = scorer.RougeScorer([kind], use_stemmer=False)
    return lambda text, reference: rouge.score(reference, text)[kind].fmeasure


def words(text: str) -> Sequence[str]:
    """Runs of letters and digits, and runs of punctuation."""
    return _WORDS.findall(text)


def _fuzzy_match() -> Measure:
    fuzz = import_library("rapidfuzz.fuzz", "fuzzy_match")
    process = import_library("rapidfuzz.utils", "fuzzy_match").default_process

    def measure(text: str, reference: str) -> float:
        left, right = process(text), process(reference)
        if not left or not right:
            left, right = text, reference
        return fuzz.WRatio(left, right) / 100

    return measure


def _bleu() -> Measure:
    metric = import_library("sacrebleu.metrics.bleu", "bleu").BLEU(effective_order=True)
    return lambda text, reference: metric.sentence_score(text, [reference]).score / 100


def _meteor() -> Measure:
    score = import_library("nltk.translate.meteor_score", "meteor").meteor_score
    corpus = import_library("nltk.corpus", "meteor").wordnet
    try:
        corpus.ensure_loaded()
    except (LookupError, OSError) as error:
        found = "" if isinstance(error, LookupError) else f". What was found is not whole: {error}"
        raise GraderError(
            "meteor needs WordNet, which NLTK does not bring: python -m nltk.downloader wordnet (once, with a "
            f"network), or unpack wordnet.zip into nltk_data/corpora and set NLTK_DATA to nltk_data{found}"
        ) from None
    return lambda text, reference: score([words(reference)], words(text), wordnet=corpus)
