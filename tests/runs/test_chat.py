"""The chat as a person or a pipe meets it: a process of its own, with a terminal or without one."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from person import SCRIPT, Person
from processes import run

from gpt2ft.chat.session import Session
from gpt2ft.inference.model import InferenceModel
from gpt2ft.inference.prompt_format import ChatPromptFormat, PlainPromptFormat
from gpt2ft.model.pretrained import write_model
from gpt2ft.runs import chat
from gpt2ft.runs.export import write_folder
from gpt2ft.runs.loaded_model import load_model
from gpt2ft.settings.sections import ModelSettings, SamplingSettings
from gpt2ft.settings.using import ChatSettings
from gpt2ft.text.display import escape_control_characters

CONTEXT = 4096


@pytest.fixture(scope="module")
def untrained(tiny_model_folder, tmp_path_factory):
    """Tiny random weights that never end a reply, with a context that takes seconds to fill."""
    folder = tmp_path_factory.mktemp("long") / "shape"
    folder.mkdir()
    for file in tiny_model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": CONTEXT}))
    policy = load_model(ModelSettings(path=str(folder), random_init=True), seed=0)
    with torch.no_grad():
        policy.gpt2.ln_f.bias.fill_(1.0)
        policy.gpt2.wte.weight[[policy.tokenizer.end_id, policy.tokenizer.end_of_text_id]] = -1.0
    return policy


@pytest.fixture(scope="module")
def chat_model(untrained, tmp_path_factory):
    """A model folder whose chat tokens were there when it was made."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    write_folder(folder, untrained.weights(), untrained.gpt2.config, untrained.tokenizer)
    return folder


@pytest.fixture(scope="module")
def base_model(untrained, tiny_model_folder, tmp_path_factory):
    """The same without chat tokens."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((tiny_model_folder / name).read_bytes())
    num_known = json.loads((tiny_model_folder / "config.json").read_text())["vocab_size"]
    write_model(folder, untrained.weights(), replace(untrained.gpt2.config, vocab_size=num_known), {})
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("chat_cache")
    return {
        "NO_COLOR": None,
        "COLORTERM": None,
        "GPT2FT_CACHE": str(cache),
        "TERM": "xterm-256color",
        "PYTHONIOENCODING": "utf-8",
    }


# --- a person -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def person(chat_model, environment):
    person = Person([chat_model, "--seed", "1", "--max_new_tokens", "12"], environment)
    yield person
    person.child.close(force=True)


@pytest.fixture
def begun(person):
    """A person at a new conversation."""
    for text in ("/new", "/system", "/set max_new_tokens 12"):
        person.enter(text)
    return person


def saved(person, file):
    person.enter(f"/save {file}")
    return [(message["role"], message["content"]) for message in json.loads(file.read_text())["messages"]]


def test_a_reply_streams_below_its_message_and_the_status_line_counts_it(begun, tmp_path):
    assert "context" not in begun.status()
    shown = begun.enter("What is tea?")
    assert "user> What is tea?\nassistant> " in shown
    assert re.search(r"\[cut off after 12 tokens; /set max_new_tokens allows more\]\n\nuser>\n", shown)
    assert re.search(r" \| 12 tokens, [\d,]+ tokens/s \| context \d+/4,096 \| seed 1$", begun.status())
    user, (role, reply) = saved(begun, tmp_path / "one.jsonl")
    assert user == ("user", "What is tea?")
    assert role == "assistant"
    on_screen = shown.split("assistant> ")[-1].split("[cut off")[0]
    assert "".join(on_screen.split()) == "".join(escape_control_characters(reply).split())
    assert re.search(rb"\x1b\[[\d;]*35[\d;]*massistant> ", begun.received)


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(begun, tmp_path):
    begun.enter(f"/set max_new_tokens {CONTEXT}")
    prompts, place = begun.num_prompts(), len(begun.received)
    begun.child.send("Tell me everything.\r")
    begun.wait(lambda: len(begun.said_since(place)) > 100)
    begun.child.sendintr()
    begun.wait_for_prompt(prompts + 1)
    assert "[stopped]" in begun.lines()
    assert "^C" not in "".join(begun.lines())
    tokens = int(re.search(r"\| ([\d,]+) tokens,", begun.status())[1].replace(",", ""))
    assert 0 < tokens < CONTEXT - 200
    begun.enter("/set max_new_tokens 12")
    turns = saved(begun, tmp_path / "stopped.jsonl")
    assert [role for role, _ in turns] == ["user", "assistant"]
    assert len(turns[1][1]) > 50


def test_ctrl_c_clears_what_was_typed(begun):
    begun.child.send(b"half a mess\xff")  # which is no UTF-8
    begun.wait(lambda: any(line.startswith("user> half a mess") for line in begun.lines()))
    begun.child.send("\x03")
    begun.wait(lambda: begun.lines()[begun.screen.cursor.y] == "user>")


def test_what_is_typed_during_a_reply_waits_for_its_end(begun, tmp_path):
    begun.enter("/set max_new_tokens 500")
    prompts, place = begun.num_prompts(), len(begun.received)
    begun.child.send("One.\r")
    begun.wait(lambda: begun.said_since(place))
    begun.child.send("Two.\r")
    begun.wait_for_prompt(prompts + 2)
    begun.enter("/set max_new_tokens 12")
    (_, one), (_, reply), (_, two), _ = saved(begun, tmp_path / "ahead.jsonl")
    assert (one, two) == ("One.", "Two.")
    assert "Two." not in reply


def test_undo_and_retry_change_what_is_remembered(begun, tmp_path):
    begun.enter("One.")
    begun.enter("Two.")
    before = saved(begun, tmp_path / "before.jsonl")
    begun.enter("/retry")
    after = saved(begun, tmp_path / "after.jsonl")
    assert after[:3] == before[:3]
    assert after[3] != before[3]
    assert "2 turns left" in begun.enter("/undo")
    assert saved(begun, tmp_path / "undone.jsonl") == before[:2]


def test_turns_that_give_way_and_messages_that_do_not_fit_are_said(begun, tmp_path):
    turns = [(role, "tea " * 600) for _ in range(4) for role in ("user", "assistant")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    begun.enter(f"/load {tmp_path / 'long.jsonl'}")
    shown = begun.enter("And now?")
    dropped = re.search(r"\[the (\d+) oldest turns no longer fit the context\]", shown)
    assert dropped, shown
    assert 0 < int(dropped[1]) < 8
    used = int(re.search(r"context ([\d,]+)/", begun.status())[1].replace(",", ""))
    assert CONTEXT // 2 < used <= CONTEXT
    (tmp_path / "system.jsonl").write_text(json.dumps({"messages": [{"role": "system", "content": "tea " * 4090}]}))
    begun.enter(f"/load {tmp_path / 'system.jsonl'}")
    assert "error: a message must have at most" in begun.enter("Hello?")
    assert saved(begun, tmp_path / "refused.jsonl")[1:] == []


def test_a_saved_conversation_is_loaded_and_goes_on(begun, tmp_path):
    begun.enter("/system Be brief.")
    begun.enter("One.")
    before = saved(begun, tmp_path / "chat.jsonl")
    begun.enter("/new")
    shown = begun.enter(f"/load {tmp_path / 'chat.jsonl'}")
    assert "system> Be brief.\n\nuser> One.\nassistant> " in shown
    begun.enter("Two.")
    assert saved(begun, tmp_path / "more.jsonl")[:-1] == [*before, ("user", "Two.")]
    assert "error: " in begun.enter(f"/load {tmp_path / 'missing.jsonl'}")
    assert "No such file or directory" in "\n".join(begun.lines())


def test_a_message_can_have_several_lines(begun, tmp_path):
    begun.child.send("first\x1b\rsecond\x1b[200~\nthird\r\nfourth\x1b[201~")
    begun.wait(lambda: "      fourth" in begun.lines())
    assert begun.enter("").count("\nassistant> ") >= 1
    assert saved(begun, tmp_path / "lines.jsonl")[0] == ("user", "first\nsecond\nthird\nfourth")


def test_an_unknown_command_is_answered_and_the_chat_goes_on(begun):
    assert "did you mean `/help`?" in begun.enter("/hlep me")
    assert "Alt+Enter" in begun.enter("/help")
    assert "temperature 0.7, top_k 0" in begun.enter("/set")


def test_what_was_entered_is_kept_for_the_next_time(begun, environment):
    begun.enter("/set top_k 5")
    history = Path(environment["GPT2FT_CACHE"]) / "chat_history"
    assert history.read_text().endswith("+/set top_k 5\n")
    assert history.stat().st_mode & 0o077 == 0
    assert begun.status().endswith("| top_k 5, seed 1")
    begun.enter("/set top_k 0")


def test_ctrl_d_leaves(begun):
    begun.child.sendeof()
    assert begun.leaves()


def test_documents_are_continued_in_a_terminal_without_colours(chat_model, environment):
    person = Person([chat_model, "--complete", "--max_new_tokens", "5"], environment | {"NO_COLOR": "1"})
    prompts = person.num_prompts()
    person.child.send("Once upon a time\r")
    person.wait_for_prompt(prompts + 1)
    assert "text> Once upon a time\nOnce upon a time" in "\n".join(person.lines())
    assert "error: /undo needs a conversation" in person.enter("/undo")
    assert re.search(rb"\x1b\[[\d;]*1m", person.received)  # bold is no colour
    assert not re.search(rb"\x1b\[(\d+;)*(3[0-8]|9[0-7])(;\d+)*m", person.received)
    person.child.send("/quit\r")
    assert person.leaves()


# --- a pipe ---------------------------------------------------------------------------------------------------------


def through_pipe(arguments, text, environment):
    return run(["python", SCRIPT, *arguments], code=None, typed=text, **environment)


def in_this_process(loaded, seed, max_new_tokens):
    prompt_format = ChatPromptFormat(loaded.tokenizer)
    model = InferenceModel(loaded.gpt2.eval(), loaded.tokenizer, prompt_format, loaded.source, loaded.digest)
    return Session(model, SamplingSettings(seed=seed), max_new_tokens)


def test_every_line_is_an_entry_and_stdout_holds_replies_alone(chat_model, untrained, environment):
    lines = ["What is tea?", "", "/hlep", "//slash", "/set top_k 9", "And cold?", "/quit", "never read"]
    ended = through_pipe([chat_model, "--seed", "3", "--max_new_tokens", "150"], "\n".join(lines), environment)
    session, replies = in_this_process(untrained, 3, 150), []
    for text in ("What is tea?", "/slash", "And cold?"):
        if text == "And cold?":
            session.sampling = SamplingSettings(seed=3, top_k=9)
        session.say(text)
        replies.append(escape_control_characters("".join(session.reply())) + "\n")
    assert ended.stdout == "".join(replies)
    assert "\\x" in "".join(replies)  # the model did say control characters
    assert len(ended.errors) == 1
    assert "did you mean `/help`?" in ended.errors[0]
    assert ended.stderr.count("[cut off after 150 tokens") == 3
    assert ended.code == 1  # not everything could be done


def test_a_pipe_is_one_document_that_is_continued(base_model, untrained, environment):
    document = "Once upon\n/new time\n\nthere was"
    arguments = [base_model, "--complete", "--seed", "3", "--max_new_tokens", "20"]
    ended = through_pipe(arguments, document + "\n", environment)
    continuation = "".join(in_this_process(untrained, 3, 20).complete(document))
    assert len(continuation) > 20
    assert ended.stdout == escape_control_characters(document + continuation) + "\n"
    assert (ended.stderr, ended.code) == ("", 0)


def test_a_reader_that_has_enough_ends_it_quietly(chat_model, environment):
    piped = ["bash", "-c", 'set -o pipefail; "$@" | head -c 30', "bash"]
    chat = ["python", SCRIPT, chat_model, "--complete", "--max_new_tokens", CONTEXT]
    ended = run([*piped, *chat], typed="Once upon a time", **environment)
    assert ended.stdout.startswith("Once upon a time")
    assert ended.stderr == ""


# --- what it is put together from -----------------------------------------------------------------------------------


@pytest.fixture
def handed_over(monkeypatch):
    """Return all that a chat with these settings is begun with, without holding it."""

    def hand_over(**settings):
        met = []
        monkeypatch.setattr(chat, "talk", lambda *everything: met.extend(everything) or True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        chat.run(ChatSettings(**settings))
        session, history, completes, notice = met
        return SimpleNamespace(session=session, history=history, completes=completes, notice=notice)

    return hand_over


def test_a_model_that_knows_chat_tokens_is_asked_with_them(handed_over, chat_model):
    met = handed_over(model=str(chat_model), system="Be brief.", top_k=3, max_new_tokens=9)
    assert isinstance(met.session.model.prompt_format, ChatPromptFormat)
    assert met.notice == ""
    assert met.session.system == "Be brief."
    assert (met.session.sampling, met.session.max_new_tokens) == (SamplingSettings(top_k=3), 9)
    assert not met.session.model.gpt2.training


def test_a_base_model_is_asked_in_plain_text_and_it_is_said(handed_over, base_model):
    met = handed_over(model=str(base_model))
    assert isinstance(met.session.model.prompt_format, PlainPromptFormat)
    assert met.notice.count("\n") == 0
    assert "plain text" in met.notice
    assert handed_over(model=str(base_model), complete=True).notice == ""


def test_random_weights_know_the_chat_tokens(handed_over, base_model):
    met = handed_over(model=str(base_model), random_init=True)
    assert isinstance(met.session.model.prompt_format, ChatPromptFormat)
    assert met.notice == ""
    one, same, other = (handed_over(model="quickstart", random_init=True, seed=seed) for seed in (None, 0, 1))
    weights = [met.session.model.gpt2.wte.weight for met in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_precision_is_that_of_the_weights(handed_over, chat_model):
    for precision, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        met = handed_over(model=str(chat_model), precision=precision)
        assert met.session.model.gpt2.wte.weight.dtype == dtype


def test_settings_that_contradict_each_other_are_refused():
    assert "needs a model" in next(ChatSettings(random_init=True).problems())
    assert "`system`" in next(ChatSettings(complete=True, system="Be brief.").problems())
    assert not list(ChatSettings(model="quickstart", random_init=True).problems())
