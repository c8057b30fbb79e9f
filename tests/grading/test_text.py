"""String graders by hand and against the libraries' own functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nltk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz import fuzz, utils
from rouge_score.rouge_scorer import RougeScorer

from graft.errors import GraderError
from graft.grading.build import Services, build_grader
from graft.grading.check import parse_grader
from graft.grading.observe import Observer
from graft.grading.text import OPERATIONS, load_measure, similarity
from graft.types import Grade
from tests.grading.samples import sample

FREE = ["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"]
"""Metrics that need no data."""

LONG = "the quick brown fox jumps over the lazy dog"


@pytest.mark.parametrize(
    ("operation", "text", "reference", "holds"),
    [
        ("eq", "Paris", "Paris", True),
        ("eq", "Paris", "paris", False),
        ("eq", "Paris ", "Paris", False),  # nothing is trimmed
        ("eq", "é", "e\u0301", False),  # nor normalised
        ("ne", "Paris", "paris", True),
        ("ne", "Paris", "Paris", False),
        ("like", "It is Paris.", "Paris", True),  # the input contains the reference
        ("like", "Paris", "It is Paris.", False),
        ("like", "It is Paris.", "paris", False),
        ("like", "anything", "", True),
        ("like", "100 percent", "%", False),  # no wildcards
        ("ilike", "It is PARIS.", "paris", True),
        ("ilike", "STRASSE", "straße", True),
        ("ilike", "Rome", "paris", False),
    ],
)
def test_operations(operation, text, reference, holds):
    assert OPERATIONS[operation](text, reference) is holds
    spec = {"type": "string_check", "input": "{{sample.output_text}}", "operation": operation}
    grader = build_grader(parse_grader({**spec, "reference": "{{item.answer}}"}), Services(), Observer())
    assert grader([sample(text, answer=reference)])[0].score == float(holds)


def test_a_number_in_the_row_compares_as_its_text():
    spec = {
        "type": "string_check",
        "input": "{{sample.output_text}}",
        "reference": "{{item.n}}",
        "operation": "eq",
    }
    grader = build_grader(parse_grader(spec), Services(), Observer())
    assert [
        grader([sample(text, n=n)])[0].score
        for text, n in [("4", 4), ("4.0", 4), ("0.5", 0.5), ("true", True)]
    ] == [
        1.0,
        0.0,
        1.0,
        1.0,
    ]


@pytest.mark.parametrize("metric", FREE)
def test_empty_texts(metric):
    measure = load_measure(metric)
    assert [similarity(*pair, measure) for pair in [("", ""), ("", "x"), ("x", "")]] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("metric", FREE)
def test_equal_and_different_texts(metric):
    measure = load_measure(metric)
    assert similarity(LONG, LONG, measure) == pytest.approx(1.0)
    assert similarity("zzz", LONG, measure) <= 0.2
    words = LONG.split()
    scores = [similarity(" ".join(words[:n]), LONG, measure) for n in (9, 7, 5)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("metric", "text", "reference", "score"),
    [
        # 2 of 3 and 2 of 2 words: F = 2 * 2/3 * 1 / (5/3)
        ("rouge_1", "The cat sat", "the cat", 0.8),
        ("rouge_2", "The cat sat", "the cat", 2 / 3),  # 1 of 2 and 1 of 1
        ("rouge_l", "a b c d", "a c d e", 0.75),  # a c d
        ("rouge_3", "a b", "a b", 0.0),  # too short
        # 1- to 4-grams of 3 words: 3 + 2 + 1 = 6 of the reference's 3 + 2 + 1; of "a b c d": 10
        ("gleu", "a b c", "a b c d", 0.6),
        ("gleu", "a B c", "a b c", 2 / 6),  # a and c; case counts
        ("bleu", "a b c d", "a b c d", 1.0),
        ("bleu", "a", "a", 1.0),  # effective order
        ("bleu", "A", "a", 0.0),
    ],
)
def test_by_hand(metric, text, reference, score):
    assert similarity(text, reference, load_measure(metric)) == pytest.approx(score)


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_fuzzy_match_is_rapidfuzz(text, reference):
    found = similarity(text, reference, load_measure("fuzzy_match"))
    if utils.default_process(text) and utils.default_process(reference):
        assert found == fuzz.WRatio(text, reference, processor=utils.default_process) / 100
    else:
        assert found == fuzz.WRatio(text, reference) / 100


@given(st.text(alphabet="ab ,.", min_size=1, max_size=20), st.text(alphabet="ab ,.", min_size=1, max_size=20))
def test_rouge_is_its_library(text, reference):
    for metric, kind in [("rouge_2", "rouge2"), ("rouge_l", "rougeL")]:
        wanted = RougeScorer([kind]).score(reference, text)[kind].fmeasure
        assert similarity(text, reference, load_measure(metric)) == wanted


@pytest.mark.parametrize("metric", FREE)
@given(text=st.text(max_size=30), reference=st.text(max_size=30))
def test_any_texts_have_a_similarity_within_0_and_1(metric, text, reference):
    assert 0.0 <= similarity(text, reference, load_measure(metric)) <= 1.0


# -- METEOR ---------------------------------------------------------------------------------------------------

NOUNS = {"car": 0, "auto": 0}
"""Word -> offset of its meaning: the two are synonyms."""

LICENCE = "  1 WordNet 3.0 Copyright nobody: two words in the format of its files\n"


def write_wordnet(folder: Path) -> Path:
    """The smallest WordNet that NLTK reads: car and auto share one meaning."""
    corpus = folder / "corpora" / "wordnet"
    corpus.mkdir(parents=True)
    offset = len(LICENCE)
    meaning = f"{offset:08d} 06 n 02 car 0 auto 0 000 | it drives\n"
    (corpus / "data.noun").write_text(LICENCE + meaning)
    (corpus / "index.noun").write_text(
        LICENCE + "".join(f"{word} n 1 0 1 0 {offset:08d}\n" for word in sorted(NOUNS))
    )
    for kind in ("verb", "adj", "adv"):
        (corpus / f"data.{kind}").write_text(LICENCE)
        (corpus / f"index.{kind}").write_text(LICENCE)
    for kind in ("noun", "verb", "adj", "adv"):
        (corpus / f"{kind}.exc").write_text("")
    (corpus / "lexnames").write_text("".join(f"{n:02d}\tnoun.{n}\t1\n" for n in range(7)))
    (corpus / "cntlist.rev").write_text("")
    senses = "".join(f"{word}%1:06:00:: {offset:08d} 1 0\n" for word in sorted(NOUNS))
    (corpus / "index.sense").write_text(senses)
    return folder


@pytest.fixture
def no_corpora(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NLTK that finds no data, and has forgotten what it found before."""
    import nltk.corpus
    from nltk.corpus.reader import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [])
    lazy = LazyCorpusLoader("wordnet", WordNetCorpusReader, LazyCorpusLoader("omw-1.4", WordNetCorpusReader))
    monkeypatch.setattr(nltk.corpus, "wordnet", lazy)
    yield
    for stream in vars(lazy).get("_data_file_map", {}).values():  # which NLTK keeps open
        stream.close()


@pytest.mark.usefixtures("no_corpora")
def test_meteor_without_wordnet_says_what_to_do():
    with pytest.raises(GraderError, match=r"meteor needs WordNet.*nltk\.downloader wordnet.*NLTK_DATA"):
        load_measure("meteor")


@pytest.mark.usefixtures("no_corpora")
def test_meteor_with_half_a_wordnet_says_what_is_missing(tmp_path, monkeypatch):
    folder = write_wordnet(tmp_path)
    (folder / "corpora" / "wordnet" / "lexnames").unlink()
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    with pytest.raises(GraderError, match=r"meteor needs WordNet.*not whole: .*lexnames"):
        load_measure("meteor")


@pytest.mark.usefixtures("no_corpora")
def test_meteor_knows_synonyms_and_stems(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(write_wordnet(tmp_path))])
    measure = load_measure("meteor")
    one_word = 1 - 0.5  # a match in one chunk of one word
    assert similarity("car", "auto", measure) == pytest.approx(one_word)
    assert similarity("car", "bicycle", measure) == 0.0
    assert similarity("Jumping", "jumps", measure) == pytest.approx(one_word)
    assert similarity("a b c", "a b c", measure) == pytest.approx(1 - 0.5 / 27)
    grader = build_grader(
        parse_grader(
            {
                "type": "text_similarity",
                "input": "{{sample.output_text}}",
                "reference": "auto",
                "evaluation_metric": "meteor",
            }
        ),
        Services(),
        Observer(),
    )
    assert grader([sample("car")]) == [Grade(pytest.approx(one_word))]  # pyright: ignore[reportArgumentType]


def test_cosine_without_an_embedding_model_says_how_to_name_one():
    spec = {"type": "text_similarity", "input": "a", "reference": "b", "evaluation_metric": "cosine"}
    with pytest.raises(GraderError, match=r'\[grading\.judge\.models\."text-embedding-3-large"\]'):
        build_grader(parse_grader(spec), Services(), Observer())
