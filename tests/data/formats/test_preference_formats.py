"""Every layout of preferences, as it is published, gives the prompt and the ranked replies from every kind of file.

What does not belong together is dropped and counted, and nothing is trained on that is there to be compared.
"""

import json
import math
from collections import Counter

import pytest
from facts import tells
from hypothesis import given, settings
from hypothesis import strategies as st
from published_preferences import (
    ASKED,
    BAD,
    CHOSEN,
    GOOD,
    PAIR,
    PUBLISHED,
    SYSTEM,
    completion,
    messages,
    told,
    transcript,
    tree_of,
)

from gpt2ft.data.formats import PREFERENCE_FORMATS, detect
from gpt2ft.data.formats.turns import content_id
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.reading import REASONS, Totals
from gpt2ft.data.sources import open_source
from gpt2ft.data.store import open_store
from gpt2ft.settings.sections import FilterSettings

KINDS = ["t.jsonl", "t.jsonl.gz", "array.json", "lines.json", "t.parquet", "t.arrow", "folder"]


def replies_of(trees):
    return [[(message.text, message.rank) for message in tree.messages if message.rank is not None] for tree in trees]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_rows_from_every_kind_of_file(layout, kind, compare, write, tmp_path):
    name, rows = PUBLISHED[layout]
    records = [record for record, *_ in rows]
    if kind == "folder":
        write(tmp_path / "folder" / "a.parquet", records)
        write(tmp_path / "folder" / "b.jsonl", records)
        rows = rows * 2
    else:
        write(tmp_path / kind, records)
    trees, context = compare(tmp_path / kind)
    source = kind.partition(".")[0]
    assert trees == [tree_of(source, prompt, replies) for _, prompt, replies in rows]
    assert not +context.dropped
    assert context.totals == Totals(len(rows), sum(len(prompt) + len(replies) for _, prompt, replies in rows))
    assert open_source(str(tmp_path / kind), kind=PREFERENCES).format.name == name


@pytest.mark.parametrize("layout", PUBLISHED)
def test_filters_by_rank_language_and_review(layout, compare):
    """A record that names no language and no review is kept."""
    rows = PUBLISHED[layout][1]
    records = [record for record, *_ in rows]
    for max_rank in (0, 1):
        trees, context = compare(records, languages=("de",), max_rank=max_rank)
        kept = [[(text, rank) for text, rank in replies if (rank or 0) <= max_rank] for *_, replies in rows]
        assert [
            [(message.text, message.rank) for message in tree.messages[len(prompt) :]]
            for tree, (_, prompt, _) in zip(trees, rows, strict=True)
        ] == kept
        above = sum(len(replies) for *_, replies in rows) - sum(map(len, kept))
        assert +context.dropped == ({"rank above limit": above} if above else {})
    sizes = sum(len(prompt) + len(replies) for _, prompt, replies in rows)
    for marked, filters, reason in (
        ({"language": "German"}, {"languages": ("English",)}, "wrong language"),
        ({"lang": "de"}, {"languages": ("en",)}, "wrong language"),
        ({"review_result": False}, {}, "not reviewed"),
        ({"deleted": True}, {}, "deleted"),
    ):
        trees, context = compare([record | marked for record in records], **filters)
        assert (trees, +context.dropped) == ([], {reason: sizes})
    spared = [record | {"language": "en", "review_result": False, "deleted": False} for record in records]
    assert len(compare(spared, languages=("en",), reviewed_only=False)[0]) == len(records)


@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_prompt_has_one_name_however_it_is_answered(layout, compare):
    """It is by this that it is held out."""
    trees, _ = compare([record for record, *_ in PUBLISHED[layout][1]])
    assert [tree.id for tree in trees] == [content_id(prompt) for _, prompt, _ in PUBLISHED[layout][1]]


def test_the_statistics_of_a_store_of_groups(write, tokenizer, tmp_path):
    """Ties, missing scores and single replies are in no pair."""
    file = write(tmp_path / "t.jsonl", [record for record, *_ in PUBLISHED["UltraFeedback"][1]])
    store = open_store(str(file), FilterSettings(), tokenizer, tmp_path, kind=PREFERENCES)
    assert store.statistics.format == "`completions` with scores"
    assert [store.ranks(row).tolist() for row in range(len(store))] == [[-1, 0, 1, 2, 3], [-1, 0, 1, 1]]
    assert store.statistics.dropped == {"reply without a rank": 1, "in no pair": 1, "nothing to compare it with": 1}
    assert (store.statistics.read, store.statistics.kept) == (12, 9)
    tied = write(tmp_path / "ties.jsonl", [record for record, *_ in PUBLISHED["binarised UltraFeedback"][1]])
    store = open_store(str(tied), FilterSettings(), tokenizer, tmp_path, kind=PREFERENCES)
    assert (len(store), store.statistics.dropped) == (1, {"tied with all others": 2, "in no pair": 1})


def test_real_ultrafeedback(test_data, compare):
    for name, number in (("ultrafeedback_train1000", 1000), ("ultrafeedback_eval200", 200)):
        file = test_data(f"prefs/{name}.jsonl")
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        trees, context = compare(file)
        assert len(trees) == len(records) == number
        assert replies_of(trees) == [
            [
                (text.replace("\r\n", "\n").strip(), rank)
                for rank, text in enumerate((r["chosen"], r["rejected"]))
                if text
            ]
            for r in records
        ]
        assert context.totals == Totals(number, 3 * number)


# --- turns that belong together -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "replies", "dropped"),
    [
        # a turn in two parts, in the prompt and in the replies
        ("u=1 u=2 a=x", "u=1 u=2 a=y", ["x", "y"], {"joined to the turn above": 1}),
        ("u a=x a=y", "u a=x a=z", ["x\n\ny", "x\n\nz"], {"joined to the turn above": 1}),
        ("u a=x a=y", "u a=z", ["x\n\ny", "z"], {"joined to the turn above": 1}),
        ("u=1 u=2 a=x", "u=1\n\n2 a=y", ["x", "y"], {"joined to the turn above": 2}),
        # an assistant turn before the first user turn
        ("a=hi u a=x", "a=hi u a=y", ["x", "y"], {"bad role order": 1}),
        ("s a=x", "s a=y", None, {"bad role order": 1, "below a dropped message": 1, "no reply": 1}),
        # empty replies
        ("u a=x", "u a=", ["x"], {"empty": 1}),
        ("u a=", "u a=", [], {"empty": 2}),
        # a prompt that ends before its last turn
        ("u= a=x", "u= a=y", None, {"empty": 1, "below a dropped message": 2}),
        ("u a u= a=x", "u a u= a=y", None, {"empty": 1, "below a dropped message": 2, "in no pair": 2}),
        ("u s u a=x", "u s u a=y", None, {
            "bad role order": 1, "below a dropped message": 3, "no reply": 1,
        }),
        # more turns in one than in the other
        ("u=1 a=x u=2 a=y", "u=1 a=x", None, {"prompts that differ": 5}),
        ("u=1 a=x u=2 a=y", "u=1 a=z", None, {"prompts that differ": 5}),
        ("u=1 a=x u=2 a=y", "u=1 a=z u=2 a=w", None, {"prompts that differ": 7}),
        ("u=1 a=x", "u=2 a=y", None, {"prompts that differ": 4}),
        # no reply at the end
        ("u a=x u", "u a=y", None, {"does not end in a reply": 4}),
        ("u", "u", None, {"does not end in a reply": 2}),
        # the same reply twice, which only a comparison can tell
        ("u a=x", "u a=x", ["x", "x"], {}),
    ],
)  # fmt: skip
def test_transcripts_and_lists_that_say_the_same_are_the_same(chosen, rejected, replies, dropped, compare):
    roles = {"s": "system", "u": "user", "a": "assistant"}

    def turns(words):
        for word in words.split(" "):
            role, equals, text = word.partition("=")
            yield roles[role], text if equals else role

    records = [{"chosen": messages(*turns(chosen)), "rejected": messages(*turns(rejected))}]
    if "s" not in chosen + rejected and chosen.startswith("u"):
        records.append({"chosen": transcript(*turns(chosen)), "rejected": transcript(*turns(rejected))})
    for record in records:
        trees, context = compare([record])
        if replies is None:
            assert trees == []
        else:
            (tree,) = trees
            assert [(message.text, message.rank) for message in tree.messages][
                -len(replies) or len(tree.messages) :
            ] == [(text, rank) for rank, text in enumerate(replies)]
        assert +context.dropped == Counter(dropped)
        assert context.totals.trees == 1


def test_every_message_is_kept_or_dropped_for_one_reason(compare):
    """`read` adds them up; a reply that is kept is one of those given, below their common prompt."""
    reasons, sizes = Counter(), Counter()
    turn = st.tuples(
        st.sampled_from(["user", "assistant", "user", "assistant", "system"]), st.sampled_from(["x", "y", ""])
    )
    prompt = st.lists(turn, max_size=4)
    reply = st.lists(turn, max_size=2)

    ending = st.none() | st.tuples(*[st.sampled_from(["z", "w", ""])] * 2)

    @given(prompt, st.lists(reply, min_size=2, max_size=2), ending)
    @settings(max_examples=1000, derandomize=True, deadline=None)
    def check(prompt, replies, ending):
        if ending:
            prompt, replies = [*prompt, ("user", "Tea?")], [[("assistant", text)] for text in ending]
        both = [[*prompt, *reply] for reply in replies]
        if not all(both):
            return
        record = dict(zip(("chosen", "rejected"), (messages(*turns) for turns in both), strict=True))
        if any(all(role == "assistant" for role, _ in turns) for turns in both):
            good = {"chosen": messages(ASKED, told("x")), "rejected": messages(ASKED, told("y"))}
            trees, context = compare([good, record], on_error="skip")  # without a prompt these mean nothing
            assert (len(trees), context.totals.trees, +context.dropped) == (1, 1, {"missing or wrong value": 1})
            return
        trees, context = compare([record])
        for tree in trees:
            found = [message for message in tree.messages if message.rank is not None]
            assert {message.parent for message in found} <= {len(tree.messages) - len(found) - 1}
            assert tree.messages[len(tree.messages) - len(found) - 1].role == "user"
            for message in found:
                assert all(part in [text for _, text in both[message.rank]] for part in message.text.split("\n\n"))
            sizes[len(found)] += 1
        reasons.update(context.dropped)

    check()
    assert set(+reasons) == {
        "joined to the turn above", "bad role order", "empty", "below a dropped message", "in no pair",
        "does not end in a reply", "prompts that differ", "no reply",
    }  # fmt: skip
    assert set(reasons) <= set(REASONS)
    assert min(sizes[number] for number in (0, 1, 2)) > 5


def test_a_system_text_beside_the_turns_stands_once(compare):
    beside = {"system": SYSTEM[1]}
    replies = {"chosen": messages(told(GOOD)), "rejected": messages(told(BAD))}
    whole = {"chosen": messages(SYSTEM, ASKED, told(GOOD)), "rejected": messages(SYSTEM, ASKED, told(BAD))}
    for record in (
        {"prompt": ASKED[1], **replies, **beside},
        {"prompt": messages(SYSTEM, ASKED), **replies, **beside},
        {**whole, **beside, "question": ASKED[1]},
        {**whole, "system": " You are a tea master.\r\n"},
        {"instruction": ASKED[1], "completions": [completion(GOOD, 2.0), completion(BAD, 1.0)], **beside},
    ):
        assert compare([record])[0] == [tree_of("test", [SYSTEM, ASKED], PAIR)]
    (tree,), context = compare([whole | {"system": "Be kind."}])
    assert tree.messages[0].text == "Be kind.\n\nYou are a tea master."
    assert +context.dropped == {"joined to the turn above": 1}


@pytest.mark.parametrize("missing", [None, math.nan])
@pytest.mark.parametrize("kind", ["t.jsonl", "t.parquet"])
def test_a_missing_score_is_no_score(missing, kind, compare, write, tmp_path):
    """JSON and tables know NaN as well, and nothing can be ordered by it."""
    scores = [1.0, missing, 3.0, missing, 2.0, 3.0]
    record = {"instruction": "Why?", "completions": [completion(str(n), score) for n, score in enumerate(scores)]}
    (tree,), _ = compare(write(tmp_path / kind, [record]))
    assert [(message.text, message.rank) for message in tree.messages[1:]] == [
        ("2", 0), ("5", 0), ("4", 1), ("0", 2), ("1", None), ("3", None),
    ]  # fmt: skip


def test_an_instruction_without_completions_is_counted(compare):
    trees, context = compare([{"instruction": "Why?", "completions": []}])
    assert (trees, +context.dropped, context.totals) == ([], {"does not end in a reply": 1}, Totals(1, 1))


# --- what is compared is not trained on -----------------------------------------------------------------------------

BESIDE = {
    "messages": {"messages": messages(ASKED, told(GOOD))},
    "the prompt alone as messages": {"messages": messages(ASKED)},
    "conversations": {"conversations": [{"from": "human", "value": ASKED[1]}, {"from": "gpt", "value": GOOD}]},
    "completion": {"completion": GOOD},
    "text": {"text": GOOD},
    "output": {"instruction": ASKED[1], "output": GOOD},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", ["t.jsonl", "t.parquet"])
def test_a_conversation_beside_chosen_and_rejected_is_not_taken_for_what_to_learn(
    beside, kind, read, error, compare, write, tmp_path
):
    """UltraFeedback's `messages` are the chosen conversation in some splits and the prompt alone in others."""
    compared = {"prompt": ASKED[1], "chosen": GOOD, "rejected": BAD} | BESIDE[beside]
    file = write(tmp_path / kind, [compared] * 2)
    assert tells(error(file), "is a preference ... `chosen` ... `rejected`")
    assert "is a preference" in error(file, on_error="skip")
    (tree, _), _ = compare(file)
    assert replies_of([tree]) == [list(PAIR)]
    asked = {} if beside == "text" else {"prompt": ASKED[1]}  # which no text repeats
    mixed = write(tmp_path / "mixed" / kind, [BESIDE[beside] | asked, compared])
    assert tells(error(mixed), "is a preference ... `chosen` ... `rejected`")
    _, context = read(mixed, on_error="skip")
    assert (context.dropped["another layout"], context.totals.trees) == (1, 1)


def test_columns_of_preferences_that_hold_none_do_no_harm(read, write, tmp_path):
    rows = [{"messages": messages(ASKED, told(GOOD)), "chosen": None, "rejected": None}] * 2
    for kind in ("t.jsonl", "t.parquet"):
        assert len(read(write(tmp_path / kind, rows))[0]) == 2


@pytest.mark.parametrize("kind", ["t.jsonl", "t.parquet"])
def test_a_completion_labelled_as_bad_is_not_trained_on(kind, error, drops, write, tmp_path):
    rows = [{"prompt": "Tea?", "completion": text, "label": good} for text, good in (("Yes.", True), ("No.", False))]
    file = write(tmp_path / kind, rows)
    assert tells(error(file), "`label` ... false")
    assert drops(file, on_error="skip") == {"marked as bad": 1}


def test_conversations_can_be_read_where_preferences_are_asked_for():
    """They have no replies to compare, unless their trees are ranked or a topic answers them."""
    for keys in ("messages", "conversations", "prompt completion", "text", "message_id text role"):
        record = dict.fromkeys(keys.split())
        assert detect(record, PREFERENCE_FORMATS) is detect(record)
    for keys in ("messages prompt chosen rejected", "prompt chosen rejected question", "text chosen rejected"):
        assert detect(dict.fromkeys(keys.split()), PREFERENCE_FORMATS).name == CHOSEN
