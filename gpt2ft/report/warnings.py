"""Warnings of a report in plain words: functions of its figures alone, one for each thing that goes wrong."""

from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path

from gpt2ft.report.schema import ModelReport, Report
from gpt2ft.report.table import measured, number, same_tokens

FEW = 30  # below it, the interval of a share spans 36 points and more: nothing but the coarsest is told apart
MANY_CUT = 0.2  # people end every turn; a tuned model that misses one in five was cut short or never saw the stop token
MANY_EMPTY = 0.05  # a chat that is silent once in twenty turns annoys
MANY_REPEATED = 0.2  # of 4-grams; people's replies stay below 0.02, greedy decoding of sound small models below 0.15
MANY_FORGED = 0.05  # turns in which it speaks for the user
MANY_COPIED = 0.2  # replies that say the prompt back; some prompts ask for that
SAME_WORDS = 0.95  # of shown replies: greedy replies part for good at the first token that training has changed
RISEN = 0.01  # nats or more above the best, relative: evaluations of one model on the same data have no noise
FORGOTTEN = 0.05  # more bits for plain text; 2 % is the usual price of a chat format
MANY_BY_HEART = (
    0.05  # of 13-grams, which meet by chance next to never (GPT-3's measure of overlap, arXiv 2005.14165, C)
)
OVERLAP = 0.01  # of held-out conversations: more moves a loss by more than its interval
USUAL_FALL = 0.2  # nats/token: a margin of rewards of 2 to 3 at beta 0.1, on replies of 100 to 150 tokens
MOST_FALL = 0.5  # of pairs of which both replies fall: the loss then pushes probability to what nobody has written


def warnings_of(report: Report) -> list[str]:
    """Return what a reader must know before the figures, gravest first."""
    found = [sentence for check in OF_ALL for sentence in check(report)]
    return found + [sentence for check in OF_EACH for model in report["models"] for sentence in check(model)]


def failed(report: Report) -> Iterator[str]:
    yield from (f"{model['name']}: {model['failed']}" for model in report["models"] if "failed" in model)


def identical(report: Report) -> Iterator[str]:
    names: dict[tuple[str, str], str] = {}
    for model in report["models"]:
        key = model.get("weights", model["name"]), model.get("tokenizer", "")
        if key in names and "failed" not in model:
            yield f"{names[key]} and {model['name']} are the same model: all differences are zero"
        names.setdefault(key, model["name"])


def hardly_different(report: Report) -> Iterator[str]:
    """Other weights than the first model's, and its words all the same."""
    first, *others = report["models"]
    turns = [turn["replies"] for conversation in report.get("conversations", ()) for turn in conversation["turns"]]
    for position, model in enumerate(others, start=1):
        pairs = [(replies[0], replies[position]) for replies in turns if replies[0] and replies[position]]
        alike = [SequenceMatcher(None, a["text"].split(), b["text"].split(), False).ratio() for a, b in pairs]
        if alike and sum(alike) >= SAME_WORDS * len(alike) and model.get("weights") != first.get("weights"):
            who = f"{model['name']} hardly differ from those of {first['name']}"
            yield f"the replies of {who}: was the right folder given?"


def other_vocabularies(report: Report) -> Iterator[str]:
    if not same_tokens(report):
        yield "the models have different vocabularies: nats/token and perplexity cannot be compared, bits/byte can"


def too_few(report: Report) -> Iterator[str]:
    found = [measured(model, ("replies", "ends_by_itself")) for model in report["models"]]
    counts = [metric["count"] for metric in found if metric]
    if counts and min(counts) < FEW:
        yield f"{min(counts)} replies of each model are too few to tell shares apart: answer {FEW} prompts or more"
    conversations = measured(report, ("data", "conversations"))
    if conversations is not None and int(conversations) < FEW:
        yield f"{conversations} held-out conversations are too few to tell losses apart: take {FEW} or more"


def no_difference(report: Report) -> Iterator[str]:
    first, *others = report["models"]
    for model in others:
        difference = measured(model, ("held_out", "difference", "bits_per_byte"))
        if not difference or model.get("weights") == first.get("weights"):
            continue
        if difference["low"] <= 0 <= difference["high"]:
            yield f"the held-out loss of {model['name']} cannot be told from that of {first['name']}"
        elif difference["low"] > 0:
            yield f"{model['name']} predicts the held-out replies worse than {first['name']} does"


def forgetting(report: Report) -> Iterator[str]:
    first, *others = report["models"]
    for model in others:
        rises = []
        for name, loss in model.get("plain_text", {}).items():
            before, after = measured(first, ("plain_text", name, "bits_per_byte")), loss.get("bits_per_byte")
            if before and after and after > before * (1 + FORGOTTEN):
                rises.append(f"{100 * (after / before - 1):.0f} % more bits for {name}")
        if rises:
            needs = f"{model['name']} needs {' and '.join(rises)}"
            yield f"{needs} than {first['name']}: it has forgotten some of its English"


def memorised(report: Report) -> Iterator[str]:
    """Words of the training data that a model says, and the first one, if it is of no run, does not say anyway."""
    first, *_ = report["models"]
    said_anyway = 0.0 if "training" in first else number(measured(first, ("learnt_by_heart", "grams_13"))) or 0.0
    for model in report["models"]:
        share = number(measured(model, ("learnt_by_heart", "grams_13"))) or 0.0
        if share > said_anyway + MANY_BY_HEART:
            percent, name = f"{100 * share:.0f} %", model["name"]
            yield f"{percent} of the runs of 13 words in replies of {name} stand in the training data: it recites"


def overlap(report: Report) -> Iterator[str]:
    found = report.get("overlap", {})
    known = max(found.get("exact", 0), found.get("near", 0))
    if known > OVERLAP * found.get("conversations", 0):
        whole = f"{known} of {found['conversations']} held-out conversations"
        yield f"{whole} hold replies of the training data: compare the losses without overlap"


def cut(report: Report) -> Iterator[str]:
    """Replies that do not end where people's would have."""
    people = number(report.get("people", {}).get("cut")) or 0.0
    if people > MANY_CUT:
        yield (
            f"{100 * people:.0f} % of people's replies would have been cut too: raise `max_new_tokens` to see which "
            "model stops"
        )
    for model in report["models"]:
        share = number(measured(model, ("replies", "cut"))) or 0.0
        if share > people + MANY_CUT:
            yield f"{100 * share:.0f} % of the replies of {model['name']} were cut: it has not learnt to stop"


def habits(model: ModelReport) -> Iterator[str]:
    """Shares of replies that are above what a sound chat model has."""
    for name, most, sentence in (
        ("empty", MANY_EMPTY, "of the replies of {} are empty"),
        ("repeated_4grams", MANY_REPEATED, "of the runs of 4 words in replies of {} repeat earlier ones: it loops"),
        ("writes_user_turn", MANY_FORGED, "of the replies of {} go on with a turn of the user"),
        ("copies_prompt", MANY_COPIED, "of the replies of {} copy the prompt"),
    ):
        share = number(measured(model, ("replies", name)))
        if share is not None and share > most:
            yield f"{100 * share:.0f} % {sentence.format(model['name'])}"


def rising(model: ModelReport) -> Iterator[str]:
    """Held-out loss of the run that was lowest before its end."""
    curve = measured(model, ("training", "curves", "eval/loss")) or []
    if not curve or Path(model["model"]).name == "best":
        return
    best_step, best = min(curve, key=lambda point: point[1])
    step, last = curve[-1]
    if last - best > RISEN * abs(best):
        yield (
            f"the held-out loss of {model['name']} has been rising since step {best_step} of {step}: `best/` is the "
            "better model"
        )


def preferences(model: ModelReport) -> Iterator[str]:
    figures = model.get("preferences", {})
    change, both = number(figures.get("chosen_change_per_token")), number(figures.get("both_fall"))
    accuracy, longer = number(figures.get("accuracy")), number(figures.get("longer"))
    if change is not None and -change > USUAL_FALL:
        yield (
            f"log-probs of chosen replies fell by {-change:.2f} nats/token in {model['name']}: usual in DPO up to "
            f"{USUAL_FALL:g}, more costs fluency"
        )
    if both is not None and both > MOST_FALL:
        yield f"both replies became less likely in {100 * both:.0f} % of the pairs of {model['name']}"
    if accuracy is not None and longer is not None and accuracy <= max(longer, 1 - longer):
        yield (
            f"{model['name']} tells {100 * accuracy:.0f} % of the pairs; length alone tells "
            f"{100 * max(longer, 1 - longer):.0f} %"
        )


OF_ALL: tuple[Callable[[Report], Iterator[str]], ...] = (
    *(failed, identical, hardly_different, other_vocabularies, too_few, no_difference, forgetting),
    *(memorised, overlap, cut),
)
OF_EACH: tuple[Callable[[ModelReport], Iterator[str]], ...] = (habits, rising, preferences)
