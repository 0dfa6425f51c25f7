"""Whatever is set to whatever does not fit, the answer is in words of ours: a setting, what it must be, what it is."""

import datetime
import re

import pytest
import yaml
from pydantic import ValidationError

from gpt2ft.__main__ import SCRIPTS
from gpt2ft.settings.parsing import Missing, parse_script
from gpt2ft.settings.refusals import explain
from gpt2ft.settings.sections import field_of, names_of
from gpt2ft.settings.using import ChatSettings

# Of pydantic, Python and YAML; `(default)`, `float32` and the like are choices of settings.
INTERNALS = re.compile(
    r"valid|input|tuple|None|\bdict|\bstr\b|\bint\b|\bfloat\b|\bbool|unicode|pars|literal|instance|object|<|>|type"
    r"|True|False|unable|constraint|Traceback|\bnull\b"
)
WRONG = [
    None, True, False, -1, 0.5, 10**400, -1e300, float("nan"), float("inf"), "", "text", "1.5.2", " ",
    [], [[]], ["a", 1], [None], {}, {"a": 1}, {1: 2}, datetime.date(2024, 1, 1), Missing(), b"ab", {"a", "b"}, 3 + 4j,
]  # fmt: skip
ITSELF: list = []
ITSELF.append(ITSELF)


def sentences(kind, name, value):
    """The refusals of a setting that is set to a value; none where it is taken."""
    *sections, last = name.split(".")
    values = {last: value}
    for section in reversed(sections):
        values = {section: values}
    for required, field in kind.model_fields.items():
        if field.is_required() and required != name:
            values[required] = "hf" if required == "format" else "a"
    try:
        kind.model_validate(values)
    except ValidationError as error:
        return list(explain(kind, "mine", error))
    return []


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_every_setting_refuses_what_does_not_fit_in_our_words(script):
    kind = SCRIPTS[script].settings
    names = [*names_of(kind), *(name for name in kind.model_fields if name not in names_of(kind))]
    num_refused = 0
    for name in names:
        for value in (*WRONG, ITSELF):
            for said in sentences(kind, name, value):
                assert f"`{name}" in said
                assert len(said.splitlines()) == 1
                assert len(said) < 300
                choices = str(field_of(kind, name).annotation)
                strange = [word for word in INTERNALS.findall(said) if word not in choices and word not in name]
                assert strange == [], said
                num_refused += 1
    assert num_refused > 10 * len(names)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("training.steps", True, "a whole number above 0, or none, but is 'true'"),
        ("training.keep_checkpoints", 1, "a whole number of at least 2, but is 1"),
        ("optimizer.beta1", 1, "a number of at least 0 and below 1, but is 1"),
        ("data.languages", [False], "a list of words, but holds false: write it in quotes"),
        ("lora.targets", ["q", "w"], "a list of q, k, v, o, fc and proj, but holds 'w'"),
        ("model.attention", "felx", "auto, flex, segments or dense, but is 'felx'"),
        ("lora.targets", "q,k", "a list of q, k, v, o, fc and proj, but holds 'q,k': words are set apart by spaces"),
        ("lora.rank_per_target", {"w": 4}, "TARGET=NUMBER, as q=16, for some of q, k, v, o, fc, proj, but holds w=4"),
        ("output", ["a", "b"], "a single value, in quotes if it has spaces, but is ['a', 'b']"),
        ("data.train", [["a"]], "a list of words, but holds ['a']"),
        ("training", ["a"], "a section with settings of its own, but is ['a']"),
        ("dry_run", "perhaps", "true or false, but is 'perhaps'"),
        ("data", 3, "a section with settings of its own, but is 3"),
        ("data.max_length", None, "a whole number above 0, but is empty"),
    ],
)
def test_what_must_be_and_what_is(name, value, said):
    assert sentences(SCRIPTS["sft"].settings, name, value) == [f"mine: `{name}` must be {said}"]


def test_recipes_of_other_programs_are_refused_in_our_words(problems):
    recipe = {"base_model": "gpt2", "datasets": [{"path": "a.jsonl", "type": "alpaca"}], "num_epochs": 3, "lr": 1e-3}
    said = problems(recipe=yaml.safe_dump(recipe))
    assert len(said) == 4
    assert [line for line in said if "did you mean" not in line] == []


def test_the_same_on_the_command_line(refused):
    said = refused(parse_script, ChatSettings, "model", ["--temperature", "--top_k", "x", "--complete=2", "--min_p=-1"])
    assert len(said) == 4
    assert [line for line in said if not re.fullmatch(r"command line: `\w+` must be .*, but is .*", line)] == []
