"""Tables: figures, differences and intervals as they stand in the report, and lines that fit the terminal."""

import copy

import pytest
from report.made_up import estimate, loss, made_up_report, model

from gpt2ft.report.table import Figure, as_terminal, in_short, tables


def cells(table, label):
    return dict(table.rows)[label]


@pytest.fixture
def report():
    return copy.deepcopy(made_up_report())


def test_a_cell_holds_value_difference_and_its_interval(report):
    base, tuned, failed = cells(in_short(report), "held-out loss, nats/token")
    assert (base.value, base.difference) == ("2.900", "")
    assert (tuned.value, tuned.difference, tuned.verdict) == ("2.400", "-0.500*", "better")
    assert "-0.520 to -0.480" in tuned.interval
    assert failed is None


def test_a_share_is_clear_only_where_the_intervals_have_nothing_in_common(report):
    _, tuned, _ = cells(in_short(report), "ends by itself, %")
    assert (tuned.value, tuned.interval, tuned.difference, tuned.verdict) == ("90", "88 to 92", "+80*", "better")
    report["models"][0]["replies"]["ends_by_itself"] = estimate(0.87, count=30)
    _, tuned, _ = cells(in_short(report), "ends by itself, %")
    assert (tuned.difference, tuned.verdict) == ("+3.0", "")


def test_a_difference_whose_interval_holds_zero_has_no_star(report):
    report["models"][1]["held_out"]["difference"]["nats_per_token"] = estimate(0.01)
    _, tuned, _ = cells(in_short(report), "held-out loss, nats/token")
    assert (tuned.difference, tuned.verdict) == ("+0.010", "")


def test_losses_per_token_are_not_compared_between_vocabularies(report):
    report["models"][1]["tokenizer"] = "b" * 64
    assert cells(in_short(report), "held-out loss, nats/token")[1].difference == ""
    assert cells(in_short(report), "held-out loss, bits/byte")[1].difference == "-0.180*"
    [held_out] = [table for table in tables(report) if table.title == "Held-out loss, bits/byte"]
    assert cells(held_out, "turn: 2")[1].difference
    assert cells(held_out, "place: first token")[1].difference == ""


def test_every_table_has_a_cell_for_every_model(report):
    found = list(tables(report))
    assert len(found) == 8
    for table in found:
        assert {len(row) for _, row in table.rows} == {len(table.columns)}
    [replies] = [table for table in found if table.columns[-1] == "people"]
    assert cells(replies, "ends by itself, %")[-1].value == "100"


NAMES = [
    ["quickstart"],
    ["base", "sft", "dpo"],
    [f"a-very-long-name-of-a-folder/with/more/{n}/checkpoints/step-00000100/model-that-goes-on-{n}" for n in range(5)],
    [f"m{number}" for number in range(12)],
    ["\x1b[31mred\n| row", "ordinary"],
]


@pytest.mark.parametrize("names", NAMES, ids=lambda names: f"{len(names)}-{len(names[0])}")
def test_the_terminal_table_fits_a_hundred_columns(report, names):
    report["models"] = [model(name, 2.9, 0.1) for name in names]
    report["models"][-1]["held_out"]["total"] = loss(123.0)  # a perplexity of 54 digits
    lines = as_terminal(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("held-out loss, nats/token") for line in lines) >= 1
    assert "\x1b" not in "".join(lines)


def test_five_models_stand_beside_each_other(report):
    report["models"] = [model(f"runs/a-long-name-{n}", 2.9, 0.1) for n in range(5)]
    text = as_terminal(report)
    assert text.count("held-out perplexity") == 1
    assert all(f"[{n + 1}] runs/a-long-name-{n}" in text for n in range(5))


def test_changes_from_a_reference_are_written_of_every_model_and_not_compared(report):
    report["models"][0]["preferences"] = report["models"][1]["preferences"] | {
        "chosen_change_per_token": 0.02,
        "beta": 1,
    }
    [preferences] = [table for table in tables(report) if table.title.startswith("Preferences")]
    assert [cell and cell.value for cell in cells(preferences, "change of chosen log-probs, nats/token")] == [
        "+0.020", "-0.050", None,
    ]  # fmt: skip
    assert cells(preferences, "margin of the rewards")[1].difference == ""
    assert Figure("a change", (), "+.3f").write(0.5, "+") == "+0.500"


def test_a_few_replies_tell_no_difference_from_chance(report):
    for entry, words in zip(report["models"], (7.0, 9.0), strict=False):
        entry["replies"]["words"] = estimate(words, 0.0, count=5)
    assert cells(in_short(report), "words in a reply")[1].difference == "+2.0"
    for entry in report["models"][:2]:
        entry["replies"]["words"]["count"] = 6
    assert cells(in_short(report), "words in a reply")[1].difference == "+2.0*"


def test_what_is_not_known_of_training_data_is_said_where_no_figure_is(report):
    del report["models"][1]["learnt_by_heart"]
    report["overlap"] = {"conversations": 100, "problems": ["the training data gone.jsonl cannot be read"]}
    [memory] = [table for table in tables(report) if table.title == "Learnt by heart?"]
    assert (memory.rows, memory.note) == ([], "the training data gone.jsonl cannot be read")
