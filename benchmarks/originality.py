"""Time of the exact search for the nearest training text, against the `rouge_score` package on every pair.

`python benchmarks/originality.py` compares 300 completions with 25,000 descriptions: LongDesc in `hub_cards/`, and
others composed of their sentences. The package is timed on one completion, and the time is scaled.
"""

import time
from pathlib import Path

import numpy as np
from datasets import load_dataset
from rouge_score import rouge_scorer

from nanovlm_hf.evaluation.originality import TrainingTexts

TEXTS, COMPLETIONS = 25_000, 300
DATASET = Path(__file__).parent.parent / "hub_cards" / "datasets" / "LongDesc"


def main() -> None:
    known = [row["description"] for row in load_dataset(str(DATASET), split="train")]
    rng = np.random.default_rng(0)
    # Texts of sentences from different descriptions: as many as the paper had, with a realistic vocabulary.
    sentences = [sentence.strip() + "." for text in known for sentence in text.split(".") if sentence.strip()]
    texts = known + [" ".join(rng.choice(sentences, 5)) for _ in range(TEXTS - len(known))]
    completions = [" ".join(rng.choice(sentences, 4)) for _ in range(COMPLETIONS)]

    start = time.perf_counter()
    index = TrainingTexts(texts)
    indexed = time.perf_counter()
    nearest = [index.nearest(text) for text in completions]
    compared = time.perf_counter()
    copied = [index.longest_copy(text) for text in completions]
    done = time.perf_counter()

    scorer = rouge_scorer.RougeScorer(["rouge1"])
    package_start = time.perf_counter()
    scores = [scorer.score(text, completions[0])["rouge1"].fmeasure for text in texts]
    package = (time.perf_counter() - package_start) * COMPLETIONS
    assert abs(max(scores) - nearest[0].score) < 1e-9

    print(f"{COMPLETIONS} completions against {len(texts):,} descriptions of {index.sizes.mean():.0f} words")
    print(f"index            {indexed - start:8.2f} s")
    print(f"nearest, ROUGE-1 {compared - indexed:8.2f} s   mean {np.mean([one.score for one in nearest]):.3f}")
    print(f"longest copy     {done - compared:8.2f} s   mean {np.mean([len(one) for one in copied]):.1f} words")
    ratio = package / (compared - start)
    print(f"rouge_score      {package:8.0f} s   scaled from one completion: {ratio:.0f} times")


if __name__ == "__main__":
    main()
