"""Sample replies to prompts that the model has not been trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2ft.conversation import ROLES
from gpt2ft.data.corpus import Corpus
from gpt2ft.data.token_tree import TEXT
from gpt2ft.inference.decoder import Decoder, suppressed_token_mask
from gpt2ft.inference.generate import generate
from gpt2ft.runs.loaded_model import LoadedModel
from gpt2ft.settings.sections import TrainingSettings
from gpt2ft.text.template import render_prompt

Turns = list[tuple[str, str]]
MAX_SEQUENCES = 16  # prompts that are answered together


@dataclass(frozen=True)
class Sample:
    prompt: str  # the last user turn
    reply: str
    stopped: bool  # the model ended its turn by itself

    def said(self) -> str:
        return self.reply + ("" if self.stopped else " [cut off]")

    def __str__(self) -> str:
        return f"> {self.prompt}\n{self.said()}"


def beside(before: Sequence[Sample], now: Sequence[Sample]) -> list[str]:
    """Replies as text, each below what was said to the same prompt before, if that is known."""
    if not before:
        return list(map(str, now))
    return [f"> {new.prompt}\nbefore: {old.said()}\nnow:    {new.said()}" for old, new in zip(before, now, strict=True)]


def held_out_prompts(corpus: Corpus, loaded: LoadedModel, number: int, longest: int) -> list[Turns]:
    """The turns before a reply in each of the first `number` conversations that leave `longest` tokens of room."""
    prompts = []
    room = loaded.gpt2.config.n_positions - longest - 1
    for store, row in corpus.rows.tolist():
        if len(prompts) == number:
            break
        tree = corpus.stores[store].tree(row, group=store)
        if tree.roles[0] == TEXT:
            continue
        reply = corpus.kind.sampled_reply(tree.roles)
        path = tree.path_to(reply)[:-1]
        if tree.lengths[path].sum() <= room:
            contents = (tree.tokens[tree.starts[n] + 1 : tree.starts[n] + tree.lengths[n] - 1] for n in path)
            texts = [loaded.tokenizer.decode(content.tolist()) for content in contents]
            prompts.append([(ROLES[tree.roles[node]], text) for node, text in zip(path, texts, strict=True)])
    return prompts


def sample_prompts(held_out: Corpus | None, loaded: LoadedModel, training: TrainingSettings) -> list[Turns]:
    """Return the held-out prompts that a run answers at each evaluation."""
    if held_out is None:
        return []
    return held_out_prompts(held_out, loaded, training.sample_prompts, training.sample_tokens)


def answer(loaded: LoadedModel, prompts: Sequence[Turns], longest: int) -> list[Sample]:
    """The likeliest reply to each prompt, token by token."""
    if not prompts:
        return []
    tokenizer = loaded.tokenizer
    ids = [render_prompt(tokenizer, turns) for turns in prompts]
    stop_ids = [tokenizer.end_id, tokenizer.end_of_text_id]
    suppressed = suppressed_token_mask(tokenizer, loaded.gpt2.wte.weight, stop_ids)
    decoder = Decoder(loaded.gpt2, stop_ids, suppressed, min(len(prompts), MAX_SEQUENCES))
    replies = zip(prompts, generate(decoder, ids, longest), strict=True)
    return [Sample(turns[-1][1], tokenizer.decode(reply.ids), reply.stopped) for turns, reply in replies]
