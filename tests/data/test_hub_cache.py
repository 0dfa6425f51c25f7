"""The named sets of the hub are pinned, and without a network they are read from the cache of `datasets`."""

import json
import socket

import pytest
from facts import tells
from processes import run

from gpt2ft.conversation import Message
from gpt2ft.data import hub_source
from gpt2ft.data.hub_source import SOURCES
from gpt2ft.data.reading import DataError
from gpt2ft.data.sources import open_source

READ = """
import json, sys
from gpt2ft.data.reading import DataError, ReadContext
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES
from gpt2ft.data.sources import open_source
def read(name, kind):
    try:
        source = open_source(name, PREFERENCES if kind == "preferences" else CONVERSATIONS)
        context = ReadContext(source.name, FilterSettings())
        return [str(tree) for shard in source.shards() for tree in shard.trees(context)]
    except DataError as error:
        return [f"DataError: {error}"]
print(json.dumps([read(*asked) for asked in json.loads(sys.argv[1])]))
"""
TURNS = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
HUB_ROWS = {
    "oasst1": [
        {
            "message_id": id, "parent_id": parent, "role": role, "text": text, "lang": "en", "rank": rank,
            "labels": {"name": ["spam"], "value": [0.0]},
        }
        for id, parent, role, text, rank in (("a", None, "prompter", "Tea?", None), ("b", "a", "assistant", "Yes.", 0))
    ],
    "smoltalk": [{"messages": TURNS, "source": "smol-magpie-ultra"}],
    "smoltalk:test": [{"messages": TURNS, "source": "smol-magpie-ultra"}],
    "ultrachat": [{"prompt": "Tea?", "prompt_id": "0", "messages": TURNS}],
    "dolly": [{"instruction": "Tea?", "context": "", "response": "Yes.", "category": "open_qa"}],
}  # fmt: skip
OTHERS = [TURNS[0], {"role": "assistant", "content": "No."}]
COMPLETION = {"model": "a", "critique": "Well.", "annotations": {"honesty": {"Rating": "5"}}, "fine-grained_score": 4.0}
HUB_PREFERENCES = {
    "hh-rlhf": [{"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Tea?\n\nAssistant: No."}],
    "hh-rlhf:test": [{"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Tea?\n\nAssistant: No."}],
    "ultrafeedback": [
        {
            "source": "flan", "instruction": "Tea?", "models": ["a", "a"],
            "completions": [
                COMPLETION | {"response": text, "overall_score": score} for text, score in (("No.", 1.0), ("Yes.", 2.0))
            ],
            "correct_answers": ["None"], "incorrect_answers": ["None"],
        }
    ],
    "ultrafeedback-binarized:test_prefs": [
        {
            "prompt": "Tea?", "prompt_id": "0", "chosen": TURNS, "rejected": OTHERS, "messages": TURNS,
            "score_chosen": 8.0, "score_rejected": 7.0,
        }
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_hub_sources_are_pinned_to_a_commit(name):
    source = SOURCES[name]
    assert len(source.revision) == 40
    assert source.split in source.splits
    assert source.size is None
    assert source.place == f"{source.repo}@{source.revision[:8]} {source.split}"


def test_no_bar_is_drawn_into_a_log(monkeypatch):
    import datasets

    def fail(*_, **__):
        assert datasets.are_progress_bars_disabled()
        raise OSError("it was asked")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(hub_source, "rely_on_cache_unless_reachable", lambda: "")
    with pytest.raises(DataError, match="it was asked"):
        open_source("dolly").origin.blocks(())
    datasets.enable_progress_bars()


def read_offline(hugging_face_home, *asked, **environment):
    """{(name, kind): trees, or what the refusal says}, of one process: `datasets` looks for its cache when imported."""
    environment = {"HF_HOME": hugging_face_home, "HF_DATASETS_CACHE": None} | environment
    ended = run(["python", "-c", READ, json.dumps(asked)], **environment)
    assert "Retrying" not in ended.stderr
    return dict(zip(asked, json.loads(ended.stdout), strict=True))


def write_hub_cache(name, hugging_face_home, revision):
    """What `datasets` leaves behind after it has loaded a source at `revision`."""
    import datasets
    import pyarrow

    hub = open_source(name).origin
    owner, _, repository = hub.repo.partition("/")
    config = hub.config or "default"
    snake_case = datasets.naming.camelcase_to_snakecase(repository)
    folder = hugging_face_home / "datasets" / f"{owner}___{snake_case}" / config / "0.0.0" / revision
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "dataset_info.json"
    splits = json.loads(file.read_text())["splits"] if file.exists() else {}
    table = pyarrow.Table.from_pylist((HUB_ROWS | HUB_PREFERENCES)[name])
    with pyarrow.ipc.new_stream(str(folder / f"{snake_case}-{hub.split}.arrow"), table.schema) as stream:
        stream.write_table(table)
    information = {
        "builder_name": "parquet",
        "dataset_name": snake_case,
        "config_name": config,
        "version": {"version_str": "0.0.0"},
        "features": datasets.Features.from_arrow_schema(table.schema).to_dict(),
        "splits": splits | {hub.split: {"name": hub.split, "num_examples": len(table), "dataset_name": snake_case}},
    }
    file.write_text(json.dumps(information))


@pytest.fixture(scope="module", params=["offline", "silent"])
def no_network(request):
    """The environment that keeps the hub away: it is told to, or the hub takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        yield {
            "offline": {"HF_HUB_OFFLINE": "1"},
            "silent": {"HF_HUB_OFFLINE": None, "HF_ENDPOINT": endpoint, "HF_HUB_ETAG_TIMEOUT": 1},
        }[request.param]


@pytest.fixture(scope="module")
def cached(tmp_path_factory, no_network):
    """The answers where all sources lie in the cache in their pinned revision."""
    home = tmp_path_factory.mktemp("hub")
    for name in HUB_ROWS | HUB_PREFERENCES:
        write_hub_cache(name, home, open_source(name).origin.revision)
    asked = [(name, "conversations") for name in HUB_ROWS | HUB_PREFERENCES]
    return read_offline(home, *asked, *((name, "preferences") for name in HUB_PREFERENCES), **no_network)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_without_network_the_cache_answers_with_the_pinned_revision(name, cached):
    (answer,) = cached[name, "conversations"]
    assert f"source={name!r}, messages=(Message(role='user', text='Tea?'" in answer


@pytest.mark.parametrize("name", HUB_PREFERENCES)
def test_preferences_of_the_hub_are_ranked_replies_and_nothing_to_learn_from(name, cached):
    (answer,) = cached[name, "preferences"]
    replies = [Message("assistant", text, parent=0, rank=rank) for rank, text in ((0, "Yes."), (1, "No."))]
    assert f"source={name!r}, messages={(Message('user', 'Tea?', parent=None), *replies)!r}" in answer
    (refusal,) = cached[name, "conversations"]
    assert "is a preference" in refusal


def test_without_network_and_cache_the_error_says_what_to_put_where(tmp_path, no_network):
    """And that another revision lies there, if one does."""
    write_hub_cache("dolly", tmp_path, "0" * 40)
    answers = read_offline(tmp_path, ("oasst1", "conversations"), ("dolly", "conversations"), **no_network)
    ((missing,), (other,)) = answers.values()
    assert missing.startswith("DataError: OpenAssistant/oasst1@fdf72ae0 train: ")
    assert str(tmp_path / "datasets") in missing
    assert f"https://huggingface.co/datasets/OpenAssistant/oasst1/tree/{SOURCES['oasst1'].revision}" in missing
    assert "HF_HUB_OFFLINE is set" in missing or "http://127.0.0.1" in missing
    assert other.startswith(f"DataError: {SOURCES['dolly'].repo}@{SOURCES['dolly'].revision[:8]} train: ")
    assert tells(other, f"{'0' * 40} ... {SOURCES['dolly'].revision}")
    assert "\n" not in missing + other
