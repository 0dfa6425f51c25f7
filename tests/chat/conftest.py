"""A session with a model that says what it is told, and one whose replies are lively."""

import pytest
import torch

from gpt2ft.chat.session import Session
from gpt2ft.inference.model import InferenceModel
from gpt2ft.inference.prompt_format import ChatPromptFormat
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.model.gpt2 import GPT2, GPT2Config

N_POSITIONS = 96


class Scripted(GPT2):
    """Says `script`, id by id, behind whatever prompt: wherever `generation_prompt` stands last, the script begins."""

    def __init__(self, tokenizer, prompt_format, n_positions=N_POSITIONS):
        super().__init__(GPT2Config(tokenizer.padded_size, n_positions, n_embd=64, n_layer=1, n_head=1))
        signs = torch.rand(self.wte.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        self.wte.weight.data = signs * 2.0 - 1.0  # rows that are far from each other: each is likeliest for itself
        self.generation_prompt = prompt_format.generation_prompt
        self.script = []
        self.known = [0] * n_positions
        self.num_read = 0

    def forward(self, tokens, positions, attend):
        self.num_read += len(tokens)
        for token, position in zip(tokens.tolist(), positions.tolist(), strict=True):
            self.known[position] = token
        q = torch.zeros(len(tokens), 1, 64)
        attend(q, q, q, 0)
        ids, width = self.known[: positions[-1] + 1], len(self.generation_prompt)
        begun = [end for end in range(width, len(ids) + 1) if ids[end - width : end] == self.generation_prompt]
        said = len(ids) - begun[-1] if begun else 0
        return self.wte.weight[self.script[said : said + 1] or [0]].expand(len(tokens), -1)


@pytest.fixture
def scripted(tokenizer):
    """scripted(prompt_format): a session; its `answer(text, *more_ids)` sets what the model says and reads it."""

    def make(prompt_format=None, n_positions=N_POSITIONS, max_new_tokens=20):
        prompt_format = prompt_format or ChatPromptFormat(tokenizer)
        gpt2 = Scripted(tokenizer, prompt_format, n_positions)
        session = Session(InferenceModel(gpt2, tokenizer, prompt_format, "scripted", ""), GREEDY, max_new_tokens)

        def answer(text, *more_ids, **how):
            gpt2.script = [*tokenizer.encode(text), *(more_ids or [prompt_format.stop_ids[0]])]
            return list(session.reply(**how))

        session.answer = answer
        return session

    return make


@pytest.fixture(scope="module")
def model(lively, tokenizer):
    gpt2 = lively(tokenizer.padded_size, N_POSITIONS)
    return InferenceModel(gpt2, tokenizer, ChatPromptFormat(tokenizer), "lively", "")
