"""launch/sample.py: the file it writes is the same however it came about, and is read as it is."""

import json
import shlex

import processes
import pytest
from accelerate.state import AcceleratorState

from gpt2ft.data.reading import DataError
from gpt2ft.errors import SettingsError
from gpt2ft.runs import sample_replies
from gpt2ft.settings.measuring import SampleSettings

PROMPTS = ["What is tea?", "Who are you?", "And now?", "Why is it raining so much today?", "Name a colour."]


@pytest.fixture
def sample(tiny_weights_folder, tmp_path, one_thread):
    """sample(name="pairs.jsonl", ...): the lines of the file that is written."""
    (tmp_path / "prompts.txt").write_text("\n\n".join([*PROMPTS, PROMPTS[0]]) + "\n")

    def run(name="pairs.jsonl", **changes):
        given = {
            "data": [str(tmp_path / "prompts.txt")],
            "replies": 4,
            "max_new_tokens": 6,
            "min_words": 5,
        }
        output = tmp_path / name
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test may have left another precision
        sample_replies.run(SampleSettings(model=str(tiny_weights_folder), output=str(output), **given | changes))
        return output.read_text().splitlines()

    return run


def test_pairs_are_what_dpo_reads(sample, tmp_path, tiny_weights_folder, run_dpo, capsys):
    rows = list(map(json.loads, sample()))
    assert "written" in capsys.readouterr().out
    assert {row["prompt"][-1]["content"] for row in rows} <= set(PROMPTS)
    for row in rows:
        assert row["score_chosen"] > row["score_rejected"]
        assert len(row["metadata"]["faults_of_chosen"]) == -row["score_chosen"]
        assert [turn["role"] for turn in (*row["chosen"], *row["rejected"])] == ["assistant"] * 2
    run_dpo(tmp_path / "run", steps=1, data={"train": [str(tmp_path / "pairs.jsonl")], "eval": []}, eval_every=None)
    assert f" {len(rows)} pairs of replies to " in capsys.readouterr().out


def test_a_file_of_prompts_that_is_missing_is_named_once(sample, tmp_path, capsys):
    with pytest.raises(DataError) as raised:
        sample(data=[str(tmp_path / "none.txt")])
    assert str(raised.value).count("none.txt") == 1
    assert "Errno" not in str(raised.value)


def test_the_next_command_can_be_copied(sample, tmp_path, tiny_weights_folder, capsys):
    sample("my pairs.jsonl")
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next"))
    words = shlex.split(told)
    assert words[-6:-4] == ["--model.path", str(tiny_weights_folder)]
    assert words[-4:] == ["--data.train", str(tmp_path / "my pairs.jsonl"), "--optimizer.learning_rate", "4e-05"]
    assert "my-data-dpo" in words


def test_ties_are_no_pairs(sample, capsys):
    with pytest.raises(DataError):
        sample(max_new_tokens=1)  # none stops, and all are too short
    assert "equally good" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_file_and_another_does_not(sample):
    first = sample("first.jsonl")
    assert sample("second.jsonl") == first
    assert sample("third.jsonl", seed=1) != first


def test_a_kill_costs_the_prompt_under_way(sample, tmp_path, monkeypatch):
    expected, once = sample("whole.jsonl"), sample_replies.Sampling.__call__
    asked = []

    def killed(self, number, prompt):
        asked.append(number)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return once(self, number, prompt)

    monkeypatch.setattr(sample_replies.Sampling, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        sample("killed.jsonl")
    (partial,) = tmp_path.glob("killed.jsonl.partial-*")
    partial.write_text(partial.read_text() + '[3, [{"te')  # the kill came while it was writing
    with pytest.raises(SettingsError, match="partial"):
        sample("killed.jsonl", seed=1)
    assert sample("killed.jsonl") == expected
    assert asked == [0, 1, 2, 3, 3, 4]
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.long
def test_two_processes_write_the_file_of_one(sample, tmp_path, tiny_weights_folder):
    expected = sample()
    command = ["launch/sample.py", tiny_weights_folder, "--data", tmp_path / "prompts.txt", "--replies", 4]
    options = ["--max_new_tokens", 6, "--min_words", 5, "--output", tmp_path / "two.jsonl"]
    processes.run([*processes.torchrun(2), *command, *options], **processes.ON_CPU)
    assert (tmp_path / "two.jsonl").read_text().splitlines() == expected


PROMPT = (("user", "What is tea?"),)
SAID = [
    ("A drink", False),
    ("A drink, hot.", True),
    ("", True),
    ("Tea. " * 9, True),
    ("A drink, hot.", True),
    ("Tea.", True),
]
REPLIES = [{"text": text, "stopped": stopped} for text, stopped in SAID]


def test_replies_are_ranked_by_their_faults():
    judged = sample_replies.judge(PROMPT, REPLIES, SampleSettings(data=["x.txt"], output="y", topic=["tea"]))
    assert judged.replies == [
        ("Tea.", []),
        ("A drink, hot.", ["leaves the topic"]),
        (("Tea. " * 9).strip(), ["repeats itself"]),
        ("A drink", ["does not stop", "leaves the topic"]),
    ]
    assert +judged.left_out == {"empty replies": 1, "replies word for word as another": 1}


@pytest.mark.parametrize(("rule", "number"), [("all", 5), ("best_worst", 1), ("adjacent", 4)])
def test_pairs_follow_the_rule(rule, number):
    settings = SampleSettings(data=["x.txt"], output="y", topic=["tea"], pairs=rule)
    rows = sample_replies.judge(PROMPT, REPLIES, settings).pairs(settings)
    assert len(rows) == number
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "Tea."}]


def test_the_best_reply_is_a_conversation_if_it_has_no_fault():
    settings = SampleSettings(data=["x.txt"], output="y", topic=["tea"], best=True)
    (row,) = sample_replies.judge(PROMPT, REPLIES, settings).best()
    assert [turn["content"] for turn in row["messages"]] == ["What is tea?", "Tea."]
    assert sample_replies.judge(PROMPT, REPLIES[:4], settings).best() == []
    assert +sample_replies.judge(PROMPT, None, settings).left_out == {"prompts that leave no room for a reply": 1}


def test_every_user_turn_of_a_tree_is_a_prompt(sample, tmp_path):
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    prompts = sample_replies.read_prompts(SampleSettings(data=[str(file)], output="x"))
    assert prompts == [(("user", "One?"),), tuple(turns[:3])]


def test_what_cannot_be_done_is_refused(sample, tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "there.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match="holds none"):
        sample(data=[str(tmp_path / "empty.txt")])
    with pytest.raises(SettingsError, match="must not exist"):
        sample("there.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "mine\n"
    for check in ("be good", "(((((", "in one\x00sentence", "a" * 100_000):
        with pytest.raises(SettingsError, match="check"):
            sample(check=[check])


def test_a_full_disk_is_told_with_the_file(sample, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_replies.json, "dumps", full)
    monkeypatch.setattr(sample_replies, "_digest", lambda value: "the same")
    with pytest.raises(OSError, match=r"partial-.* could not be written: No space"):
        sample()


@pytest.mark.parametrize(
    "changes",
    [{"replies": 1}, {"temperature": 0}, {"min_words": 5, "max_words": 4}, {"topic": ["two words"]}, {"data": []}],
)
def test_settings_that_make_no_pairs(changes):
    settings = SampleSettings(**{"data": ["x.txt"], "output": "y"} | changes)
    assert list(settings.problems())


@pytest.mark.long
def test_trl_reads_the_file_and_has_its_loss(sample, tmp_path, tiny_weights_folder, run_dpo):
    """The held-out loss of a run on the pairs equals that of TRL's DPOTrainer on the exported folder."""
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = sample(replies=6)
    half = next(i for i, line in enumerate(lines) if json.loads(line)["prompt"] != json.loads(lines[0])["prompt"])
    for name, part in (("train.jsonl", lines[:half]), ("held_out.jsonl", lines[half:])):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in part))
    data = {"train": [str(tmp_path / "train.jsonl")], "eval": [str(tmp_path / "held_out.jsonl")]}
    run_dpo(tmp_path / "run", steps=3, learning_rate=1e-2, data=data, dpo={"pair_weight": "pair"})
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [line["eval/loss"] for line in logged if "eval/loss" in line][-1]
    theirs = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_weights_folder),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=len(lines) - half, beta=0.1, use_cpu=True,
            report_to="none", bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=load_dataset("json", data_files=str(tmp_path / "held_out.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "run" / "model"),
    )  # fmt: skip
    (batch,) = theirs.get_train_dataloader()
    assert abs(ours - 0.6931) > 1e-3
    assert float(theirs.compute_loss(theirs.model.eval(), batch)) == pytest.approx(ours, abs=1e-5)
