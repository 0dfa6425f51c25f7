"""Completions of many prompts at once, for callers that want them whole."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpt2ft.inference.decoder import Decoder, refuse_broken
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.settings.sections import SamplingSettings


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt: `ids` without the stop token, `stopped` if the model ended it by one."""

    ids: list[int]
    stopped: bool


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingSettings | Sequence[SamplingSettings] = GREEDY,
    advance: Callable[[], object] = lambda: None,
) -> list[Completion]:
    """Continue each prompt until a stop token, `max_new_tokens` or the end of the context.

    Args:
        decoder: all of whose slots are free; as many prompts as it has slots are continued together.
        sampling: of all, or of each.
        advance: called after each that has ended.

    Raises:
        ValueError: before anything is computed, if a prompt cannot be continued; and if logits are not finite.
    """
    for prompt in prompts:
        decoder.check(prompt, max_new_tokens)
    samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingSettings) else sampling
    completions = [Completion([], stopped=False) for _ in prompts]
    waiting = deque(range(len(prompts)))
    numbers: dict[int, int] = {}  # slot -> number of the prompt
    while waiting or numbers:
        while waiting and decoder.num_free:
            number = waiting.popleft()
            numbers[decoder.join(prompts[number], samplings[number], max_new_tokens)] = number
        for slot, id, finish_reason in decoder.step():
            refuse_broken(finish_reason, decoder.model)
            completion = completions[numbers[slot]]
            if id is not None:
                completion.ids.append(id)
            if finish_reason:
                completions[numbers.pop(slot)] = Completion(completion.ids, finish_reason == "stop")
                decoder.leave(slot)
                advance()
    return completions
