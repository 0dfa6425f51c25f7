"""Both OASST layouts give the same trees; every message left out is counted once, under the right reason."""

import random

import pytest
from facts import tells
from pydantic import ValidationError

from gpt2ft.conversation import Message, MessageTree
from gpt2ft.data.reading import Totals


def row(message_id, parent_id=None, role="assistant", **fields):
    tree = {"message_tree_id": "a"} if parent_id else {"message_tree_id": message_id}
    if parent_id is None and role == "assistant":
        role = "prompter"
    return {"message_id": message_id, "parent_id": parent_id, "role": role, "text": message_id, **tree, **fields}


# a   a question
# |-- c   rank 0
# |   `-- d   a question
# |       |-- f   unranked
# |       `-- e   unranked
# `-- b   rank 1
FAMILY = [
    row("a"),
    row("b", "a", rank=1),
    row("c", "a", rank=0),
    row("d", "c", role="prompter"),
    row("f", "d"),
    row("e", "d", rank=None),
]


def nested(rows):
    """The same messages as nested trees, in the order in which the rows came."""
    messages = {one["message_id"]: {**one, "replies": []} for one in rows}
    for message in messages.values():
        if message["parent_id"] is not None:
            messages[message["parent_id"]]["replies"].append(message)
    roots = [message for message in messages.values() if message["parent_id"] is None]
    return [{"message_tree_id": root["message_tree_id"], "prompt": root} for root in roots]


# --- trees ----------------------------------------------------------------------------------------------------------


def test_a_flat_tree_is_rebuilt_depth_first_by_rank_and_then_by_id(read):
    trees, context = read(FAMILY)
    expected = (
        Message("user", "a", None, None),
        Message("assistant", "c", 0, 0),
        Message("user", "d", 1, None),
        Message("assistant", "e", 2, None),
        Message("assistant", "f", 2, None),
        Message("assistant", "b", 0, 1),
    )
    assert trees == [MessageTree("a", "test", expected)]
    assert not context.dropped
    assert context.totals == Totals(trees=1, messages=6)


def test_both_layouts_give_equal_trees(read):
    assert read(nested(FAMILY)) == read(FAMILY)


def test_the_order_of_flat_rows_changes_nothing(read):
    expected = read(FAMILY)
    for seed in range(20):
        assert read(random.Random(seed).sample(FAMILY, len(FAMILY))) == expected


def test_the_order_of_replies_in_a_nested_tree_changes_nothing(read):
    assert read(nested(FAMILY[::-1])) == read(FAMILY)


def test_trees_stand_in_the_order_of_their_roots(read):
    rows = [row("z"), row("y", "x"), row("x"), row("w", "z")]
    assert [tree.id for tree in read(rows)[0]] == ["z", "x"]


def test_ranks_stay_as_in_the_data(read):
    trees, _ = read([row("a"), row("b", "a", rank=4), row("c", "a", rank=2, deleted=True)])
    assert [message.rank for message in trees[0].messages] == [None, 4]


def test_roles_have_several_names(read):
    rows = [row("a", role="system"), row("b", "a", "human"), row("c", "b", "gpt"), row("d", "c", "user")]
    roles = [message.role for message in read([*rows, row("e", "d", "bot")])[0][0].messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_text_is_stripped_and_has_plain_line_ends(read):
    assert read([row("a", text=" \n one\r\ntwo \r\n"), row("b", "a")])[0][0].messages[0].text == "one\ntwo"


def test_rows_may_leave_out_what_is_null_and_the_tree_id(read):
    rows = [{"message_id": "a", "role": "user", "text": "a"}]
    rows += [{"message_id": "b", "role": "assistant", "text": "b", "parent_id": "a"}]
    assert [tree.id for tree in read(rows)[0]] == ["a"]


def test_ranks_may_be_whole_floats_as_in_tables_with_gaps(read):
    assert read([row("a"), row("b", "a", rank=1.0)])[0][0].messages[1].rank == 1


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_a_chain_of_50000_replies_does_not_overflow(layout, read):
    names = [f"{number:05}" for number in range(50_000)]
    roles = ("prompter", "assistant")
    chain = [row(name, names[n - 1] if n else None, roles[n % 2]) for n, name in enumerate(names)]
    trees, context = read(chain if layout == "flat" else nested(chain))
    assert len(trees[0].messages) == 50_000
    assert not context.dropped


# --- filters --------------------------------------------------------------------------------------------------------


def test_deleted_messages_take_what_is_below_with_them(read):
    rows = [*FAMILY[:2], row("c", "a", rank=0, deleted=True), *FAMILY[3:]]
    trees, context = read(rows)
    assert context.dropped == {"deleted": 1, "below a dropped message": 3}
    assert [message.text for message in trees[0].messages] == ["a", "b"]


def test_languages(drops):
    rows = [row("a", lang="en"), row("b", "a", lang="de"), row("c", "a", lang="en"), row("d", "a")]
    assert drops(rows, languages=("en",)) == {"wrong language": 2}
    assert drops(rows, languages=("en", "de")) == {"wrong language": 1}
    assert drops(rows) == {}


def test_reviews(drops):
    rows = [row("a"), row("b", "a", review_result=False), row("c", "a", review_result=True)]
    rows += [row("d", "a", review_result=None)]
    assert drops(rows) == {"not reviewed": 1}
    assert drops(rows, reviewed_only=False) == {}


def test_empty_texts(drops):
    assert drops([row("a"), row("b", "a", text=" \r\n "), row("c", "a")]) == {"empty": 1}


def test_ranks_are_limited_for_ranked_assistant_replies_only(drops):
    rows = [*FAMILY, row("g", "b", "prompter", rank=3)]
    assert drops(rows, max_rank=1) == {}
    assert drops(rows, max_rank=0) == {"rank above limit": 1, "below a dropped message": 1}


def test_role_order(drops):
    assert drops([row("a"), row("b", "a"), row("c", "b"), row("d", "a", "user")]) == {"bad role order": 2}
    assert drops([row("a"), row("b", "a"), row("c", "b", "system")]) == {"bad role order": 1}
    rooted_in_a_reply = [{**row("a"), "role": "assistant"}, row("b", "a", "user"), row("c", "b")]
    assert drops(rooted_in_a_reply) == {"bad role order": 1, "below a dropped message": 2}


def test_orphans(drops):
    rows = [row("a"), row("b", "a"), row("c", "nowhere"), row("d", "c", "user"), row("e", "d")]
    assert drops(rows) == {"orphan": 1, "below a dropped message": 2}


def test_a_tree_without_a_reply_is_dropped_whole(read, drops):
    trees, context = read([row("a"), row("b", "a", deleted=True), row("c"), row("d", "c")])
    assert context.dropped == {"deleted": 1, "no reply": 1}
    assert [tree.id for tree in trees] == ["c"]
    assert context.totals == Totals(trees=2, messages=4)
    assert drops([row("a", role="system"), row("b", "a", "user")]) == {"no reply": 2}


def test_one_reason_a_message_the_first_that_holds(drops):
    rows = [row("a"), row("b", "a"), row("c", "gone", deleted=True, lang="de", text="")]
    assert drops(rows, languages=("en",)) == {"deleted": 1, "wrong language": 2}


# --- data that cannot be one set of trees ---------------------------------------------------------------------------


def test_equal_messages_count_once_and_different_ones_of_one_id_are_an_error(read, drops, error):
    rows = [*FAMILY, FAMILY[1]]
    assert drops(rows) == {"duplicate message id": 1}
    assert read(rows)[0] == read(FAMILY)[0]
    rows = [*FAMILY, {**FAMILY[1], "text": "other"}]
    assert tells(error(rows), 'test.jsonl:7: ... `message_id` ... "b" ... test.jsonl:2')
    assert drops(rows, on_error="skip") == {"duplicate message id": 1}
    assert read(rows, on_error="skip")[0] == read(FAMILY)[0]


def test_ids_are_unique_within_a_nested_tree(read, error, drops):
    """Nested trees are read one at a time, so a tree says nothing of the ids in another."""
    trees = nested([row("a"), row("b", "a")]) + nested([row("x"), row("b", "x", text="other")])
    assert [[message.text for message in tree.messages] for tree in read(trees)[0]] == [["a", "b"], ["x", "other"]]
    trees[1]["prompt"]["replies"] += nested([row("x"), row("b", "x")])[0]["prompt"]["replies"]
    assert tells(error(trees), 'test.jsonl:2: ... `message_id` ... "b" ... test.jsonl:2')
    assert drops(trees, on_error="skip") == {"duplicate message id": 1}


def test_equal_nested_trees_are_all_read(read):
    trees, context = read(nested(FAMILY) * 2)
    assert trees[0] == trees[1]
    assert (len(trees), context.totals) == (2, Totals(trees=2, messages=12))


def test_two_roots_cannot_share_a_tree_id(drops, error):
    rows = [row("a"), row("b", "a"), row("c", message_tree_id="a"), row("d", "c")]
    assert tells(error(rows), 'test.jsonl:3: ... `message_tree_id` ... "a" ... test.jsonl:1')
    assert drops(rows, on_error="skip") == {"duplicate tree id": 1, "orphan": 1}


@pytest.mark.parametrize("parents", [{"c": "c"}, {"c": "d", "d": "c"}, {"c": "e", "d": "c", "e": "d"}])
def test_cycles(parents, read, error):
    rows = [row("a"), row("b", "a"), *(row(one, other) for one, other in parents.items())]
    assert error(rows) == (
        'test.jsonl:3: `parent_id` must lead up to a root, but from message "c" it leads into a cycle'
    )
    trees, context = read(rows, on_error="skip")
    assert context.dropped == {"cycle in parent_id": len(parents)}
    assert len(trees[0].messages) == 2


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        (row("x", text=5), '`text` ... 5 (message "x")'),
        (row("x", text=None), '`text` ... null (message "x")'),
        ({"message_id": "x", "role": "user"}, '`text` ... missing (message "x")'),
        ({"role": "user", "text": "x"}, "`message_id` ... missing"),
        (row(7, "a", text="a"), "`message_id` ... 7 (message 7)"),
        (row("x", {"a": 1}), '`parent_id` ... an object (message "x")'),
        (row("x", role=None), '`role` ... null (message "x")'),
        (row("x", role="narrator"), "`role` ... prompter"),
        (row("x", rank="0"), '`rank` ... "0" (message "x")'),
        (row("x", rank=True), "`rank` ... true"),
        (row("x", rank=0.5), "`rank` ... 0.5"),
        (row("x", rank=float("nan")), "`rank` ... NaN"),
        (row("x", rank=-1), "`rank` ... 32,767 ... -1"),
        (row("x", rank=10**20), "`rank` ... 32,767 ... 1000"),
        (row("x", lang=["en"]), "`lang` ... a list"),
        (row("x", deleted="no"), '`deleted` ... "no"'),
        (row("x", review_result=1), "`review_result` ... 1"),
        (row("x", text="\ud83d"), "`text` ... half of a surrogate pair"),
        (row("x", text=b"bytes"), "`text` ... \"b'bytes'\""),
        (
            {"message_tree_id": "x", "prompt": {}},
            'OASST messages ... "message_tree_id", "prompt"',
        ),
    ],
)
def test_a_malformed_message_is_an_error_or_skipped_and_counted(record, facts, read, error):
    assert tells(error([*FAMILY[:2], record]), f"test.jsonl:3: ... {facts}")
    trees, context = read([*FAMILY[:2], record, *FAMILY[2:]], on_error="skip")
    assert context.refused_records() == context.dropped.total() == 1
    assert trees == read(FAMILY)[0]


@pytest.mark.parametrize(
    ("tree", "facts"),
    [
        ({"prompt": row("x")}, "`message_tree_id` ... missing"),
        ({"message_tree_id": "x", "prompt": None}, "`prompt` ... null"),
        ({"message_tree_id": "x", "prompt": "Hi"}, '`prompt` ... "Hi"'),
        ({"message_tree_id": "x", "prompt": row("x", replies=None)}, "`replies` ... null"),
        ({"message_tree_id": "x", "prompt": row("x", replies={})}, "`replies` ... an object"),
        ({"message_tree_id": "x", "prompt": row("x", replies=[None])}, "`replies` ... null"),
        (
            {"message_tree_id": "x", "prompt": row("x", replies=[row("y", "x", text=[])])},
            '`text` ... a list (message "y")',
        ),
        (
            {"message_tree_id": "x", "prompt": row("x", replies=[row("y", "z")])},
            '`parent_id` ... "x" ... "z" ... (message "y")',
        ),
        (row("x"), 'OASST trees ... "message_id", "parent_id", "role"'),
    ],
)
def test_a_malformed_tree_is_an_error_or_skipped_and_counted_as_one_line(tree, facts, read, error):
    assert tells(error([*nested(FAMILY), tree]), f"test.jsonl:2: ... {facts}")
    trees, context = read([*nested(FAMILY), tree], on_error="skip")
    assert context.refused_records() == context.dropped.total() == 1
    assert trees == read(FAMILY)[0]
    assert context.totals.messages == len(FAMILY)


def test_a_record_of_no_format_among_others(error, drops):
    assert tells(error([{}, *FAMILY]), "test.jsonl:1: ... OASST messages ... no keys")
    assert drops([{}, *FAMILY], on_error="skip") == {"another layout": 1}


def test_a_misspelt_on_error_never_skips(read):
    with pytest.raises(ValidationError, match="on_error"):
        read([row("x", text=1)], on_error="Skip")
