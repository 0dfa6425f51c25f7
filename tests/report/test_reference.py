"""What stored log-probs tell of pairs, on numbers made by hand."""

import json
import math

import numpy as np
import pytest
from report.made_up import made_up_report

from gpt2ft.errors import SettingsError
from gpt2ft.report import page, reference
from gpt2ft.report.reference import StoredPairs, divergence, length_bias, saturation

# Replies of 2, 4, 10 and 5 tokens, each token likely by -1, -2, -3 and -1 nats.
STORED = StoredPairs(np.array([[0, 1], [2, 3], [1, 2]]), np.array([2, 4, 10, 5]), np.array([-2.0, -8.0, -30.0, -5.0]))


def test_pairs_that_the_start_orders():
    assert STORED.per_token.tolist() == [1, -2, 1]
    assert STORED.little_to_learn(0.9).tolist() == [True, False, True]
    assert STORED.little_to_learn(1.0).tolist() == [False] * 3
    assert STORED.likely_mislabelled(1.9).tolist() == [False, True, False]
    found = reference.figures(STORED, 0.9, None)
    assert (found["ordered"], found["little_to_learn"], found["likely_mislabelled"]) == (2 / 3, 2, 1)


def test_length_bias():
    found = length_bias(STORED)
    assert (found["chosen_tokens"], found["rejected_tokens"]) == (16 / 3, 19 / 3)
    assert found["chosen_is_longer"] == 1 / 3
    expected = np.corrcoef([-2, 5, -6], [6, -25, 22])[0, 1]
    assert found["correlation"] == pytest.approx(expected)
    alike = StoredPairs(np.array([[0, 1], [1, 0]]), np.array([3, 3]), np.array([-1.0, -2.0]))
    assert length_bias(alike)["chosen_is_longer"] == 0.5
    assert length_bias(alike)["correlation"] is None


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_margin_that_saturates(beta):
    found = saturation(STORED, beta)
    assert 1 / (1 + math.exp(-beta * found["margin"])) == pytest.approx(0.95)
    assert found["margin_per_token"] == pytest.approx(found["margin"] / (35 / 6))
    later = STORED.log_probs + np.array([found["margin"] + 1e-6, 0, 0, 0])  # the first pair alone
    assert saturation(STORED, beta, later)["saturated"] == pytest.approx(1 / 3)


def test_divergence_is_that_of_the_start_from_the_later_model():
    start = np.log([0.5, 0.25, 0.125, 0.125])
    later = np.log([0.25, 0.25, 0.25, 0.25])
    sampled = np.random.default_rng(0).choice(4, 200_000, p=np.exp(start))
    exact = float((np.exp(start) * (start - later)).sum())
    assert divergence([start[sampled]], [later[sampled]]) == pytest.approx(exact, rel=0.02)
    assert divergence([[-1.0, -2.0], [-3.0]], [[-1.0, -2.0], [-3.0]]) == 0
    assert divergence([[-1.0]], [[-2.0]]) > 0


def test_the_lines_fit_a_terminal():
    found = reference.figures(STORED, 0.9, STORED.log_probs + 1)
    found["later"] = [{"model": "runs/x", "divergence": 0.0123}]
    found["suspicious"] = [{"prompt": "p " * 90, "chosen": "c", "rejected": "r\n" * 90, "difference": -2.0}]
    lines = reference.lines(found)
    assert max(map(len, lines)) <= 125
    assert all("\n" not in line for line in lines)
    assert any("runs/x: 0.0123" in line for line in lines)


def test_it_is_a_section_of_the_report(tmp_path):
    file = tmp_path / "pairs.json"
    hostile = "<script>alert(1)</script> ```"
    found = reference.figures(STORED, 0.9, None)
    found["suspicious"] = [{"prompt": hostile, "chosen": hostile, "rejected": hostile, "difference": -2.0}]
    file.write_text(json.dumps(found))
    report = made_up_report() | {"pairs_at_start": reference.read_report(file)}
    html, markdown = page.html(report), page.markdown(report)
    assert page.PAIRS in html
    assert f"## {page.PAIRS}" in markdown
    assert "likely mislabelled" in html
    assert "<script>alert" not in html
    del report["pairs_at_start"]
    assert page.PAIRS not in page.html(report)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pairs": 1}', "null", "[" * 100_000], ids=lambda text: text[:9])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SettingsError, match="pairs_report"):
        reference.read_report(tmp_path / "x.json")
    with pytest.raises(SettingsError, match="pairs_report"):
        reference.read_report(tmp_path / "missing.json")
