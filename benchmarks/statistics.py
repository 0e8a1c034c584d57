"""How often the report's intervals hold the truth, and how often a winner is false: by simulation.

    python -m benchmarks.statistics

Examples are drawn whose losses look like real ones: uneven lengths, skewed, and shared by all trials for the
greater part. The truth is known, since it is what they are drawn from. Minutes on one core.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from analysis.choice import LossTable, chances_to_be_best, optimism, summarize_seeds
from analysis.stats import difference_interval

RESULTS = Path(__file__).with_name("results")
NUM_STUDIES = 1000
SIZES = (24, 48, 256)
NUM_TRIALS = 9


def draw(
    rng: np.random.Generator, num_examples: int, means: np.ndarray, noise: float = 0.25
) -> LossTable:
    """Per-example losses of trials whose true losses are `means`, nats a token."""
    tokens = rng.integers(8, 200, num_examples).astype(float)
    shared = rng.gamma(4.0, 0.5, num_examples) - 2.0  # hard and easy examples, for all trials alike
    own = rng.gamma(2.0, noise / 2**0.5, (num_examples, len(means))) - noise * 2**0.5
    return LossTable((means + shared[:, None] + own) * tokens[:, None], tokens)


def frames(table: LossTable) -> list[pd.DataFrame]:
    ids = [str(number) for number in range(len(table.tokens_N))]
    tokens = table.tokens_N.astype(int)
    return [
        pd.DataFrame({"example_id": ids, "loss_sum": sums, "num_tokens": tokens})
        for sums in table.sums_NM.T
    ]


def coverage(num_examples: int, seed: int) -> dict[str, float]:
    """Share of 95 % intervals of a difference that hold it: ours, and scipy's BCa."""
    rng = np.random.default_rng(seed)
    held = {"ours": 0, "BCa": 0}
    truth = 0.05
    for _ in range(NUM_STUDIES):
        a, b = frames(draw(rng, num_examples, np.array([3.0 + truth, 3.0])))
        ours = difference_interval(a, b, num_resamples=1000)
        held["ours"] += ours.low <= truth <= ours.high
        low, high = _bca((a["loss_sum"] - b["loss_sum"]).to_numpy(), a["num_tokens"].to_numpy())
        held["BCa"] += low <= truth <= high
    return {way: number / NUM_STUDIES for way, number in held.items()}


def _bca(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    ratio: Callable = lambda total, count, axis: total.sum(axis) / count.sum(axis)  # noqa: E731
    result = bootstrap(
        (sums, tokens),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=1000,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    return result.confidence_interval


def winners(num_examples: int, seed: int) -> dict[str, float]:
    """Of nine trials that are all equally good: how often one is called better than it is."""
    rng = np.random.default_rng(seed)
    best_refused = false_winner = uncorrected = flattered = expected = 0.0
    for _ in range(NUM_STUDIES):
        table = draw(rng, num_examples, np.full(NUM_TRIALS, 3.0))
        chances = chances_to_be_best(table, num_resamples=500)
        best_refused += (chances < 0.05).mean()  # each of them is a best one
        false_winner += (chances >= 0.05).sum() == 1
        # What a reader does who looks at the best against one other one, once.
        order = table.losses.argsort()
        best, worst = frames(LossTable(table.sums_NM[:, [order[0], order[-1]]], table.tokens_N))
        uncorrected += difference_interval(best, worst, num_resamples=500).excludes_zero
        flattered += (table.losses.mean() - table.losses.min()) / NUM_STUDIES
        expected += optimism(table, num_resamples=500) / NUM_STUDIES
    return {
        "a best one is refused": best_refused / NUM_STUDIES,
        "one winner is left": false_winner / NUM_STUDIES,
        "best against worst, not corrected": uncorrected / NUM_STUDIES,
        "the winner looks better by": flattered,
        "of which our estimate says": expected,
    }


def power(num_examples: int, seed: int, lead: float = 0.15) -> float:
    """How often the true winner, `lead` nats a token ahead of eight equal ones, is the only one left."""
    rng = np.random.default_rng(seed)
    means = np.full(NUM_TRIALS, 3.0)
    means[0] -= lead
    found = 0
    for _ in range(NUM_STUDIES // 4):
        chances = chances_to_be_best(draw(rng, num_examples, means), num_resamples=1000)
        found += bool(chances[0] >= 0.05 and (chances >= 0.05).sum() == 1)
    return found / (NUM_STUDIES // 4)


def seeds(num_seeds: int, seed: int) -> float:
    """Share of t-intervals over seeds that hold the mean."""
    rng = np.random.default_rng(seed)
    held = 0
    for _ in range(NUM_STUDIES):
        summary = summarize_seeds(rng.normal(3.0, 0.01, num_seeds).tolist())
        held += summary.low <= 3.0 <= summary.high
    return held / NUM_STUDIES


def main() -> None:
    results: dict[str, dict[str, object]] = {"examples": {}, "seeds": {}}
    for size in SIZES:
        results["examples"][str(size)] = {
            "coverage": coverage(size, seed=1),
            "equal trials": winners(size, seed=2),
            "power": power(size, seed=3),
        }
        print(size, results["examples"][str(size)], flush=True)
    for number in (2, 3, 5):
        results["seeds"][str(number)] = seeds(number, seed=4)
    print("seeds", results["seeds"])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "statistics.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
