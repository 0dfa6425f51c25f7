"""The template: ids and Jinja say the same, contents are untouched, and what is no conversation is refused."""

import itertools
import random

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

from gpt2ft.text import template
from gpt2ft.text.template import CHAT_TEMPLATE, TRAINING_TEMPLATE, render_prompt, render_turn, template_digest


class Speller:
    """A tokenizer whose ids are characters and names, so that a rendering can be read."""

    role_ids = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
    end_id = "<|end|>"
    end_of_text_id = "<|endoftext|>"

    def encode(self, text):
        return list(text)


class Refusal(Exception):
    pass


def refuse(message):
    raise Refusal(message)


class GenerationTag(jinja2.ext.Extension):
    """The tag as programs know it that only render: its content is written as it is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


ENVIRONMENTS = [
    kind(trim_blocks=trim, lstrip_blocks=lstrip)
    for kind in (jinja2.Environment, jinja2.sandbox.ImmutableSandboxedEnvironment)
    for trim, lstrip in itertools.product((False, True), repeat=2)
]
TEMPLATES = [(environment, CHAT_TEMPLATE) for environment in ENVIRONMENTS]
TEMPLATES += [(environment.overlay(extensions=[GenerationTag]), TRAINING_TEMPLATE) for environment in ENVIRONMENTS]


@pytest.fixture(
    params=TEMPLATES,
    ids=lambda pair: (
        f"{type(pair[0]).__name__}-{pair[0].trim_blocks}-{pair[0].lstrip_blocks}-{'generation' in pair[1]}"
    ),
)
def jinja(request):
    environment, text = request.param
    compiled = environment.from_string(text)

    def render(turns, **settings):
        messages = [{"role": role, "content": text} for role, text in turns]
        return compiled.render(messages=messages, raise_exception=refuse, **settings)

    return render


def conversations(count):
    generator = random.Random(0)
    pieces = [" ", "\n", "\r\n", "\t", "tea", "{{ x }}", "{% if %}", "{#", "<|end|>", "'", '"', "\\n", "é", "\0", ""]
    for _ in range(count):
        yield [
            (generator.choice(["system", "user", "assistant"]), "".join(generator.choices(pieces, k=6)))
            for _ in range(generator.randrange(5))
        ]


def test_a_turn_is_its_role_its_content_and_the_end():
    assert render_turn(Speller(), "user", " a\n") == ["<|user|>", " ", "a", "\n", "<|end|>"]
    assert render_turn(Speller(), "assistant", "") == ["<|assistant|>", "<|end|>"]


def test_a_plain_text_stands_between_two_ends_of_text():
    assert render_turn(Speller(), "text", "a\n") == ["<|endoftext|>", "a", "\n", "<|endoftext|>"]


def test_a_prompt_is_its_turns_and_the_role_to_continue():
    turns = [("system", "s"), ("user", "u")]
    expected = ["<|system|>", "s", "<|end|>", "<|user|>", "u", "<|end|>", "<|assistant|>"]
    assert render_prompt(Speller(), turns) == expected
    assert render_prompt(Speller(), []) == ["<|assistant|>"]


def test_jinja_renders_the_same(jinja):
    padded = 0
    for turns in conversations(300):
        prompt = "".join(render_prompt(Speller(), turns))
        assert jinja(turns, add_generation_prompt=True) == prompt
        assert jinja(turns, add_generation_prompt=False) == jinja(turns) == prompt.removesuffix("<|assistant|>")
        padded += any(text != text.strip() for _, text in turns)
    assert padded > 50


@pytest.mark.parametrize("role", ["tool", "User", "", "end"])
def test_an_unknown_role_is_refused(role):
    with pytest.raises(ValueError, match="`role` must be one of system, user, assistant, text, but is"):
        render_turn(Speller(), role, "text")


@pytest.mark.parametrize("role", ["tool", "User", "", "end", "text"])
def test_jinja_refuses_what_is_no_role_of_a_chat(jinja, role):
    with pytest.raises(Refusal, match="`role` must be system, developer, user or assistant, but is"):
        jinja([("user", "text"), (role, "text")])


def test_jinja_takes_text_parts_and_developers(jinja):
    parts = [{"type": "text", "text": " A\n"}, {"type": "text", "text": "{{ x }} "}]
    for role, same in (("developer", "system"), ("user", "user"), ("assistant", "assistant")):
        assert jinja([(role, parts), (role, [])]) == jinja([(same, " A\n{{ x }} "), (same, "")])


@pytest.mark.parametrize(
    "content", [None, 3, {"type": "text", "text": "tea"}, ["tea"], [None], [{"type": "image_url"}]]
)
def test_jinja_refuses_content_that_is_not_text(jinja, content):
    with pytest.raises(Refusal, match="`content` must"):
        jinja([("user", content)])


def test_the_digest_changes_with_either_rendering(monkeypatch):
    digest = template_digest()
    assert digest == template_digest()
    assert len(digest) == 64
    with monkeypatch.context() as patch:
        patch.setattr(template, "CHAT_TEMPLATE", CHAT_TEMPLATE + "\n")
        assert template_digest() != digest
    for changed in ("user", "text"):
        with monkeypatch.context() as patch:
            patch.setattr(
                template, "render_turn", lambda *turn, role=changed: [*render_turn(*turn), *"\n"[: turn[1] == role]]
            )
            assert template_digest() != digest
    assert template_digest() == digest
