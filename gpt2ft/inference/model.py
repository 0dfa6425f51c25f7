"""A model as chat and server use it: weights on their device, tokenizer, and the prompt format that it knows."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2ft.inference import prompt_format
from gpt2ft.inference.decoder import PREFILL_CHUNK, Decoder, suppressed_token_mask
from gpt2ft.inference.detokenizer import IncrementalDetokenizer
from gpt2ft.inference.prompt_format import Prompt, PromptFormat, Turn, prompt_limit
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.text.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class InferenceModel:
    """Weights, and how conversations and documents become ids for them and text again.

    Args:
        gpt2: in evaluation mode, on its device and in its precision.
        source: where the weights came from, for people.
        digest: of the weights.
    """

    gpt2: GPT2
    tokenizer: ChatTokenizer
    prompt_format: PromptFormat
    source: str
    digest: str

    @property
    def n_positions(self) -> int:
        """The context, in tokens."""
        return self.gpt2.config.n_positions

    def chat_prompt(self, turns: Sequence[Turn], max_new_tokens: int) -> Prompt:
        """Ask for a reply of up to `max_new_tokens`; the oldest whole turns give way.

        Raises:
            TooLong: if not even the last message fits.
        """
        return prompt_format.chat_prompt(self.prompt_format, turns, prompt_limit(self.n_positions, max_new_tokens))

    def text_prompt(self, text: str, max_new_tokens: int) -> Prompt:
        """Ask for the continuation of a document.

        Raises:
            TooLong: if the text does not fit.
        """
        return prompt_format.text_prompt(self.tokenizer, text, prompt_limit(self.n_positions, max_new_tokens))

    def chat_detokenizer(self, stop_strings: Sequence[str] = ()) -> IncrementalDetokenizer:
        """Return the detokenizer of a reply, which ends at the prompt format's stop strings too."""
        stops = (*self.prompt_format.stop_strings, *stop_strings)
        return IncrementalDetokenizer(self.tokenizer, stops, self.prompt_format.strips_leading_space)

    def decoder(self, stop_ids: Sequence[int], num_sequences: int = 1, prefill_chunk: int = PREFILL_CHUNK) -> Decoder:
        """Return a decoder that samples no control token but `stop_ids`; arguments as of `Decoder`."""
        suppressed = suppressed_token_mask(self.tokenizer, self.gpt2.wte.weight, stop_ids)
        return Decoder(self.gpt2, stop_ids, suppressed, num_sequences, prefill_chunk)
