"""Measure what `data.share_prefixes` saves on real data that are no trees, and costs on a million conversations.

    python tests/campaigns/shared_prefixes.py            tokens of each set, with GPT-2's vocabulary
    python tests/campaigns/shared_prefixes.py 1000000    seconds and memory for as many made-up conversations

The sets are made of the files that the tests use, in the folder that GPT2FT_TEST_DATA names. Exits with 1 where
conversations put together do not add up to those alone.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np

from gpt2ft import quickstart
from gpt2ft.conversation import MessageTree
from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES, DataKind
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.data.prefixes import share_prefixes
from gpt2ft.data.sources import read_trees
from gpt2ft.data.store import TokenStore, open_store
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.text.tokenizer import ChatTokenizer

DATA = Path(os.environ.get("GPT2FT_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))
LENGTH, CAPACITY = 1024, 8192
RULE = "Answer in plain words, ask where something is unclear, and never make up a fact or a source."
SYSTEM = [{"role": "system", "content": " ".join([RULE] * 20)}]

Records = Iterable[dict]
Turns = list[dict[str, str]]


def turns(tree: MessageTree, index: int) -> Turns:
    return [{"role": tree.messages[at].role, "content": tree.messages[at].text} for at in tree.path_to(index)]


def paths(trees: Iterable[MessageTree], system: Turns) -> Iterator[dict]:
    """Each path to a last reply as a conversation of its own."""
    for tree in trees:
        useful = tree.leading_to_reply()
        inner = {tree.messages[index].parent for index in useful}
        yield from ({"messages": system + turns(tree, index)} for index in useful if index not in inner)


def pairs(trees: Iterable[MessageTree]) -> Iterator[dict]:
    """Every two ranked replies to a prompt as two whole transcripts, as HH-RLHF has them."""
    for tree in trees:
        replies = [(m.parent, m.rank, index) for index, m in enumerate(tree.messages) if m.rank is not None]
        for (prompt, rank, better), (other, worse_rank, worse) in combinations(sorted(replies), 2):
            if prompt == other and prompt is not None and rank < worse_rank:
                yield {"chosen": turns(tree, better), "rejected": turns(tree, worse)}


def transcripts(records: Records) -> Iterator[dict]:
    """Both transcripts of a pair as conversations to learn from."""
    for record in records:
        yield from ({"messages": record[key]} for key in ("chosen", "rejected"))


def ultrafeedback() -> Iterator[dict]:
    with open(DATA / "prefs/ultrafeedback_train1000.jsonl", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield {key: record[key] for key in ("prompt", "chosen", "rejected")}


def made_up(number: int) -> Iterator[dict]:
    """One system turn, two exchanges, and one of ten a regeneration of the one before."""
    random = np.random.default_rng(0)
    words = np.array(RULE.split())
    said = ""
    for index in range(number):
        if index % 10:
            said = " ".join(random.choice(words, 20))
        texts = [f"{said} {index - (index % 10 == 0)}", *(" ".join(random.choice(words, 25)) for _ in range(3))]
        roles = ("user", "assistant") * 2
        spoken = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        yield {"messages": [{"role": "system", "content": RULE}, *spoken]}


def stored(records: Records, tokenizer: ChatTokenizer, folder: Path, kind: DataKind) -> TokenStore:
    file = folder / "records.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)
    return open_store(str(file), FilterSettings(), tokenizer, folder, kind=kind)


def peak_memory() -> float:
    """Return the largest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, store: TokenStore, kind: DataKind) -> bool:
    """Print what is saved; return True if nothing is lost."""
    started = time.perf_counter()
    is_pairs = kind is PREFERENCES
    rule = (
        PreferencePairs("all", "pair", LENGTH, CAPACITY) if is_pairs else ConversationTrees("leaves", LENGTH, CAPACITY)
    )
    alone = chunk([store], np.stack([np.zeros(len(store), np.int64), np.arange(len(store))], axis=1), rule)
    plans = [Plan(alone, CAPACITY, 1, seed=0, epochs=1)]
    planned, peak = time.perf_counter(), peak_memory()
    together = share_prefixes(alone)
    shared, peak_together = time.perf_counter(), peak_memory()
    plans.append(Plan(together, CAPACITY, 1, seed=0, epochs=1))
    tokens, before = plans[1].tokens, plans[0].tokens
    streams = " and ".join(f"{len(plan.streams):,} ({plan.fill:.0%} full)" for plan in plans)
    print(
        f"{name:<44} {len(store):>9,} rows {before:>12,} tokens alone {tokens:>12,} together, {tokens / before:6.1%}, "
        f"{plans[1].repeated / tokens:.1%} of them repeated; streams {streams}; "
        f"planned in {planned - started:.1f} s and {peak:,.0f} MiB, put together in {shared - planned:.1f} s and "
        f"{peak_together:,.0f} MiB",
        flush=True,
    )
    return int(together.pairs.sum()) == int(alone.pairs.sum()) and plans[1].tokens_alone == before


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            tokenizer = ChatTokenizer.from_folder(quickstart.MODEL)
            store = stored(made_up(int(sys.argv[1])), tokenizer, Path(folder), CONVERSATIONS)
            print(f"tokenised in {peak_memory():,.0f} MiB", flush=True)
            return int(not measure("made up", store, CONVERSATIONS))
        tokenizer = ChatTokenizer.gpt2()
        trees = list(read_trees(str(DATA / "oasst/en_100_tree.jsonl"), FilterSettings()))
        sets = {
            "OASST, paths as rows": (paths(trees, []), CONVERSATIONS),
            "OASST, paths as rows, one long system prompt": (paths(trees, SYSTEM), CONVERSATIONS),
            "OASST pairs, both transcripts as rows": (transcripts(pairs(trees)), CONVERSATIONS),
            "OASST pairs, as HH-RLHF has them": (pairs(trees), PREFERENCES),
            "UltraFeedback, 1,000 pairs": (ultrafeedback(), PREFERENCES),
        }
        measured = []
        for number, (name, (records, kind)) in enumerate(sets.items()):
            own = Path(folder) / str(number)
            own.mkdir()
            measured.append(measure(name, stored(records, tokenizer, own, kind), kind))
        return int(not all(measured))


if __name__ == "__main__":
    sys.exit(main())
