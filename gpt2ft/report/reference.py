"""What stored log-probs tell of preferences, before training and after: pure functions of arrays.

Shape letters: R replies, P pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2ft.errors import SettingsError
from gpt2ft.files import read_json

SATURATED = 0.95  # sigmoid(beta x margin) from which a pair's gradient is below a twentieth of its largest
BETAS = (0.01, 0.05, 0.1, 0.3, 1.0, 5.0)
MOST_LISTED = 10  # suspicious pairs whose texts are shown

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StoredPairs:
    """Pairs of replies with the log-probs of the start.

    Attributes:
        pairs: [P, 2] chosen and rejected reply.
        lengths: [R] targets of each reply.
        log_probs: [R] of whole replies under the start.
    """

    pairs: NDArray[np.int64]
    lengths: NDArray[np.int64]
    log_probs: Floats

    @property
    def per_token(self) -> Floats:
        """[P] how much likelier a token of the chosen reply is than one of the rejected, in nats."""
        chosen, rejected = (self.log_probs / self.lengths)[self.pairs].T
        return chosen - rejected

    def little_to_learn(self, margin: float) -> NDArray[np.bool_]:
        """[P] true where the start already orders the pair by more than `margin` nats per token."""
        return self.per_token > margin

    def likely_mislabelled(self, margin: float) -> NDArray[np.bool_]:
        """[P] true where it orders it the other way by more than that."""
        return self.per_token < -margin


def length_bias(stored: StoredPairs) -> dict[str, float | None]:
    """Return how the lengths of replies go with the labels, and with what the start prefers.

    `correlation` is Pearson's, of the difference of lengths and of whole log-probs; None where one does not vary.
    """
    chosen, rejected = stored.lengths[stored.pairs].T
    longer = np.sign(chosen - rejected)
    margins = stored.log_probs[stored.pairs] @ np.array([1.0, -1.0])
    varies = len(longer) > 1 and np.ptp(chosen - rejected) > 0 and np.ptp(margins) > 0
    return {
        "chosen_tokens": float(chosen.mean()),
        "rejected_tokens": float(rejected.mean()),
        "chosen_is_longer": float((longer + 1).mean() / 2),
        "correlation": float(np.corrcoef(chosen - rejected, margins)[0, 1]) if varies else None,
    }


def saturation(stored: StoredPairs, beta: float, later: Floats | None = None) -> dict[str, float]:
    """Return the margin, in nats of whole replies, from which the sigmoid loss learns little more from a pair.

    Args:
        later: [R] log-probs under a later model; with them the share of pairs that are beyond that margin.
    """
    margin = math.log(SATURATED / (1 - SATURATED)) / beta
    found = {"beta": beta, "margin": margin, "margin_per_token": margin / float(stored.lengths[stored.pairs].mean())}
    if later is not None:
        changes = (later - stored.log_probs)[stored.pairs]
        found["saturated"] = float((changes[:, 0] - changes[:, 1] > margin).mean())
    return found


def divergence(start: Sequence[Sequence[float]], later: Sequence[Sequence[float]]) -> float:
    """Return KL(start || later) in nats per token, estimated on these replies as if the start had written them.

    Of each token the estimate is x - 1 - log x, x being the ratio of the two probabilities: never negative, and
    unbiased on samples of the start (Schulman 2020, "Approximating KL divergence", k3).

    Args:
        start, later: log-prob of each token of each reply.
    """
    change = np.concatenate([np.asarray(b) - np.asarray(a) for a, b in zip(start, later, strict=True)])
    return float(np.mean(np.expm1(change) - change))


def figures(stored: StoredPairs, margin: float, later: Floats | None) -> dict[str, Any]:
    """Return all figures but the divergence: JSON for a report."""
    return {
        "pairs": len(stored.pairs),
        "margin": margin,
        "ordered": float((np.sign(stored.per_token) + 1).mean() / 2),
        "little_to_learn": int(stored.little_to_learn(margin).sum()),
        "likely_mislabelled": int(stored.likely_mislabelled(margin).sum()),
        "length": length_bias(stored),
        "saturation": [saturation(stored, beta, later) for beta in BETAS],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """Return the figures for people."""
    pairs, margin, length = report["pairs"], report["margin"], report["length"]
    correlation = length["correlation"]
    together = "" if correlation is None else f"; the start's margins go with length: correlation {correlation:.2f}"
    text = [
        f"ordered   {report['ordered']:.1%} of {pairs:,} pairs as labelled by the start, by log-prob per token",
        f"          {report['little_to_learn']:,} by more than {margin:g} nats/token: little to learn",
        f"          {report['likely_mislabelled']:,} the other way by more than that: likely mislabelled",
        f"length    chosen {length['chosen_tokens']:.0f} tokens, rejected {length['rejected_tokens']:.0f}; chosen is "
        f"longer in {length['chosen_is_longer']:.0%}{together}",
        f"beta      margin at which a pair's gradient is below {1 - SATURATED:.0%} of the largest",
    ]
    for row in report["saturation"]:
        beyond = f"; beyond it {row['saturated']:.1%} of pairs of the last model" if "saturated" in row else ""
        text.append(
            f"  {row['beta']:<7g} {row['margin']:,.1f} nats a reply, {row['margin_per_token']:.3f} a token{beyond}"
        )
    for row in report.get("later", []):
        text.append(f"later     {row['model']}: {row['divergence']:.4f} nats/token from the start (KL, estimated)")
    for pair in report.get("suspicious", []):
        text += [
            f"? {pair['difference']:+.2f} nats/token  > {_short(pair['prompt'])}",
            f"    chosen:   {_short(pair['chosen'])}",
            f"    rejected: {_short(pair['rejected'])}",
        ]
    return text


def read_report(file: Path) -> dict[str, Any]:
    """Read what `launch/reference.py --report` has written.

    Raises:
        SettingsError: if it is something else, or cannot be read.
    """
    try:
        found = read_json(file)
        "\n".join(lines(found)).encode()  # halves of surrogate pairs are no text
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise SettingsError(
            f"`pairs_report` = {file} must be what `launch/reference.py --report` has written, but is not: {error!r}"
        ) from error
    return found


def _short(text: str, most: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
