"""Shape of report.json: what a comparison of models has measured.

A key is absent where a thing was not measured. The first model is the one that the others are compared with: it has no
differences. No number is NaN or infinite: such a value is absent.
"""

from typing import Any

from typing_extensions import TypedDict  # which pydantic needs before Python 3.12, and brings

CONFIDENCE = 0.95  # of every interval in a report


class Estimate(TypedDict):
    """A mean or a share, and the interval that covers what it estimates in 95 of 100 samples."""

    value: float
    low: float
    high: float


class Metric(Estimate):
    """An estimate over replies."""

    count: int  # replies that it is taken over


class Loss(TypedDict, total=False):
    """Loss on the targets of some conversations or of a text."""

    tokens: int
    bytes: int
    nats_per_token: float  # comparable between models with the same tokenizer alone
    perplexity: float
    bits_per_byte: float  # comparable always


class HeldOut(TypedDict, total=False):
    """Loss on held-out conversations, every assistant turn counted once."""

    total: Loss
    by_source: dict[str, Loss]
    by_depth: dict[str, Loss]  # replies above it, and itself: "1", "2", "3 or more"
    by_place: dict[str, Loss]  # in the reply: "first token", "next 15", "rest"
    clean: Loss  # on the conversations that do not overlap with the training data
    difference: dict[str, Estimate]  # from the first model, paired: "bits_per_byte", and "nats_per_token" if comparable


class Heart(TypedDict, total=False):
    """Share of the n-grams of words in a model's replies that stand in the training data of the compared runs.

    What the first model says of them by itself is the measure of what is said anyway.
    """

    grams_8: Metric
    grams_13: Metric


class Overlap(TypedDict, total=False):
    """Held-out conversations that the training data of the compared runs hold too."""

    conversations: int  # held out
    exact: int  # with a reply that stands in the training data word for word
    near: int  # with a reply like one there: Jaccard similarity of its 5-grams of words about 0.8 or more
    problems: list[str]  # sentences: what is not measured, and what to install or to bring back


class Facts(TypedDict, total=False):
    """What a run trained on, and how, from its recipe and manifest."""

    sources: list[dict[str, Any]]  # of each: source, conversations, tokens, supervised, pairs ...
    dropped: dict[str, int]  # messages by reason
    supervised_share: float  # of the tokens
    repeated_share: float  # of the tokens: context that several windows hold
    fill: float  # of the streams
    steps: int
    curves: dict[str, list[tuple[int, float]]]  # by metric of metrics.jsonl: (step, value)


class ModelReport(TypedDict, total=False):
    """One model, and what was measured of it."""

    name: str  # short and unlike the others' names
    model: str  # where it lies
    weights: str  # digest
    tokenizer: str  # digest
    parameters: int
    failed: str  # a sentence: why nothing, or not all, could be measured
    held_out: HeldOut
    plain_text: dict[str, Loss]  # by the name of the text
    replies: dict[str, Metric]  # see replies.METRICS
    preferences: dict[str, Any]  # see the made-up report: what the loss is called stands in "objective"
    topic: dict[str, Any]  # words, prompts, on_topic, stopped
    learnt_by_heart: Heart
    training: Facts


class Reply(TypedDict):
    text: str
    stopped: bool  # the model ended its turn by itself


class Turn(TypedDict):
    """What the user says, and every model's reply, in the order of the models; None where one has failed."""

    user: str
    replies: list[Reply | None]


class Conversation(TypedDict):
    """Turns in their order; every model has its own earlier replies before the next."""

    turns: list[Turn]


class Report(TypedDict, total=False):
    """All of a comparison. Of a single model, what was measured stands at the top too, by the same keys."""

    models: list[ModelReport]
    conversations: list[Conversation]
    data: dict[str, str | int]  # digests of held-out data, prompts and texts, and the number of conversations
    people: dict[str, Metric]  # the metrics of replies, of those that people wrote in the held-out data
    left_out: int  # messages that do not fit the context
    overlap: Overlap
    settings_that_differ: dict[str, list[Any]]  # by name, the value of each run, None for what is no run
    pairs_at_start: dict[str, Any]  # what the log-probs of the start tell of the pairs (reference.figures)
    precision: str
    max_length: int
    seed: int
    warnings: list[str]
    commands: list[str]  # that give this report again
    versions: dict[str, str]
