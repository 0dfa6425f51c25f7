"""Continuations for tests of decoding: by the decoder, and by a full forward pass for every token."""

import torch

from gpt2ft.inference.decoder import Decoder
from gpt2ft.inference.generate import Completion, generate
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.model.attention import dense_attention
from gpt2ft.settings.sections import SamplingSettings

VOCABULARY, STOP = 61, 33
PROMPTS = [[1, 2, 3], [4] * 11, [5], [9, 8, 7, 6, 5, 4]]
SAMPLED = SamplingSettings(temperature=1.2, top_p=0.95, repetition_penalty=1.1, seed=3)
NUM_SLOTS = 16


def suppressing(*ids):
    mask = torch.zeros(64, dtype=torch.bool)
    mask[VOCABULARY:] = True
    mask[list(ids)] = True
    return mask


@torch.no_grad()
def uncached(model, prompt, most, mask):
    ids = list(prompt)
    for _ in range(min(most, model.config.n_positions - len(prompt))):
        horizons = torch.full((len(ids),), len(ids))
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), dense_attention(horizons))
        chosen = int(model.logits(hidden[-1]).masked_fill(mask, -torch.inf).argmax())
        if chosen == STOP:
            return Completion(ids[len(prompt) :], True)
        ids.append(chosen)
    return Completion(ids[len(prompt) :], False)


def finished(decoder, slot):
    """Step until the sequence in `slot` has ended: (ids, finish)."""
    ids = []
    while True:
        for at, id, finish in decoder.step():
            if at == slot:
                ids += [] if id is None else [id]
                if finish:
                    decoder.leave(slot)
                    return ids, finish


def continued(model, prompts, most, stop_ids, suppressed, sampling=GREEDY):
    """The completions of `generate` by a new decoder."""
    decoder = Decoder(model, stop_ids, suppressed, min(len(prompts), NUM_SLOTS) or 1)
    return generate(decoder, prompts, most, sampling)
