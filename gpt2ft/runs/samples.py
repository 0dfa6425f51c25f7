"""Sample replies to prompts that the model has not been trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2ft.conversation import ROLES
from gpt2ft.data.corpus import Corpus
from gpt2ft.data.token_tree import TEXT
from gpt2ft.inference.decoder import Decoder, suppressed_token_mask
from gpt2ft.inference.generate import generate
from gpt2ft.runs.loaded_model import LoadedModel
from gpt2ft.settings.training import TrainingSettings
from gpt2ft.text.template import render_prompt

Turns = list[tuple[str, str]]
MAX_SEQUENCES = 16  # prompts that are answered together


@dataclass(frozen=True)
class Sample:
    """A prompt and the model's reply to it."""

    prompt: str  # the last user turn
    reply: str
    stopped: bool  # the model ended its turn by itself

    def shown_reply(self) -> str:
        return self.reply + ("" if self.stopped else " [cut off]")

    def __str__(self) -> str:
        return f"> {self.prompt}\n{self.shown_reply()}"


def sample_texts(samples: Sequence[Sample], earlier: Sequence[Sample]) -> list[str]:
    """Return samples as text, each below an earlier reply to the same prompt if there are any."""
    if not earlier:
        return list(map(str, samples))
    return [
        f"> {new.prompt}\nbefore: {old.shown_reply()}\nnow:    {new.shown_reply()}"
        for old, new in zip(earlier, samples, strict=True)
    ]


def held_out_prompts(corpus: Corpus, loaded: LoadedModel, number: int, max_new_tokens: int) -> list[Turns]:
    """Return the turns before a reply in the first `number` conversations that leave room for `max_new_tokens`."""
    return [path[:-1] for path in held_out_paths(corpus, loaded, number, max_new_tokens)]


def held_out_paths(corpus: Corpus, loaded: LoadedModel, number: int, max_new_tokens: int) -> list[Turns]:
    """Return the same turns, none twice, and the reply that the data give to them."""
    paths, met = [], set()
    room = loaded.gpt2.config.n_positions - max_new_tokens - 1
    for store, row in corpus.rows.tolist():
        if len(paths) == number:
            break
        tree = corpus.stores[store].tree(row, group=store)
        if tree.roles[0] == TEXT:
            continue
        path = tree.path_to(corpus.kind.sampled_reply(tree.roles))
        if tree.lengths[path[:-1]].sum() <= room:
            contents = (tree.tokens[tree.starts[n] + 1 : tree.starts[n] + tree.lengths[n] - 1] for n in path)
            texts = tuple(loaded.tokenizer.decode(content.tolist()) for content in contents)
            if texts[:-1] not in met:
                met.add(texts[:-1])
                paths.append([(ROLES[tree.roles[node]], text) for node, text in zip(path, texts, strict=True)])
    return paths


def sample_prompts(held_out: Corpus | None, loaded: LoadedModel, training: TrainingSettings) -> list[Turns]:
    """Return the held-out prompts that a run answers at each evaluation."""
    if held_out is None:
        return []
    return held_out_prompts(held_out, loaded, training.sample_prompts, training.sample_tokens)


def answer(loaded: LoadedModel, prompts: Sequence[Turns], max_new_tokens: int) -> list[Sample]:
    """Return a reply to each prompt by greedy decoding: the likeliest token, one after the other."""
    if not prompts:
        return []
    tokenizer = loaded.tokenizer
    ids = [render_prompt(tokenizer, turns) for turns in prompts]
    stop_ids = [tokenizer.end_id, tokenizer.end_of_text_id]
    suppressed = suppressed_token_mask(tokenizer, loaded.gpt2.wte.weight, stop_ids)
    decoder = Decoder(loaded.gpt2, stop_ids, suppressed, min(len(prompts), MAX_SEQUENCES))
    replies = zip(prompts, generate(decoder, ids, max_new_tokens), strict=True)
    return [Sample(turns[-1][1], tokenizer.decode(reply.ids), reply.stopped) for turns, reply in replies]
