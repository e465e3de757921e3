"""A demo model is scored on held-out source packages, through the product itself, beside two baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from complete_fn import Session
from complete_fn_workers.demo_model.corpus import AS_JSON, SECTION, SYNOPSIS, Package
from complete_fn_workers.quality_scores import exact_match, first_sentence, is_json_object, macro_f1, mean_rouge_l


@dataclass(frozen=True)
class Scores:
    """Scores between 0 and 1 over `rows` packages. The json_ scores judge the fields of JSON answers.

    An invalid JSON answer counts as empty fields.
    """

    rows: int
    section_accuracy: float
    section_macro_f1: float
    synopsis_rouge_l: float
    json_valid: float
    json_section_accuracy: float
    json_synopsis_rouge_l: float


def evaluate(model: str, packages: Sequence[Package], home: Path) -> Scores:
    """Ask the model all three instructions of each package, greedily.

    Args:
        model: a catalogue name or a checkpoint's folder.
        home: folder for the state of this evaluation, so that it does not enter the user's ledger.
    """
    session = Session(home=home)
    options = {"max_tokens": 128}

    def ask(instruction: str) -> list[str | None]:
        prompts = [instruction + p.description for p in packages]
        answers: list[str | None] = session.complete(model, prompts, options).text.to_pylist()
        return answers

    sections, synopses = [p.section for p in packages], [p.synopsis for p in packages]
    named, written, objects = ask(SECTION), ask(SYNOPSIS), ask(AS_JSON)
    session.close()
    valid = [is_json_object(o, ("section", "synopsis")) for o in objects]
    parsed = [
        json.loads(o or "") if ok else {"section": "", "synopsis": ""} for o, ok in zip(objects, valid, strict=True)
    ]
    return Scores(
        rows=len(packages),
        section_accuracy=exact_match(named, sections),
        section_macro_f1=macro_f1(named, sections),
        synopsis_rouge_l=mean_rouge_l(written, synopses),
        json_valid=sum(valid) / len(valid),
        json_section_accuracy=exact_match([p["section"] for p in parsed], sections),
        json_synopsis_rouge_l=mean_rouge_l([p["synopsis"] for p in parsed], synopses),
    )


def svm_baseline(train: Sequence[Package], test: Sequence[Package]) -> tuple[float, float]:
    """Section accuracy and macro-F1 of a linear SVM on TF-IDF of words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LinearSVC().fit(features.fit_transform([p.description for p in train]), [p.section for p in train])
    said = model.predict(features.transform([p.description for p in test])).tolist()
    expected = [p.section for p in test]
    return exact_match(said, expected), macro_f1(said, expected)


def first_sentence_baseline(packages: Sequence[Package]) -> float:
    """ROUGE-L of a baseline: the first sentence of the description as its synopsis."""
    return mean_rouge_l([first_sentence(p.description) for p in packages], [p.synopsis for p in packages])


def as_json(scores: Scores) -> str:
    return json.dumps(asdict(scores), indent=2)
