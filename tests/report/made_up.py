"""A report of three models, one of which has failed: made up, and every key of the schema is in it."""

from gpt2ft.report.schema import Report


def estimate(value, spread=0.02, **more):
    return {"value": value, "low": value - spread, "high": value + spread, **more}


def loss(nats, tokens=6000):
    nats_per_token = nats
    return {
        "tokens": tokens,
        "bytes": tokens * 4,
        "nats_per_token": nats_per_token,
        "perplexity": 2.718281828**nats,
        "bits_per_byte": nats / 0.6931 / 4,
    }


def replies(ends, repeated):
    shares = {
        "ends_by_itself": ends, "cut": 1 - ends, "empty": 0.0, "repeated_4grams": repeated, "distinct_1": 0.4,
        "distinct_2": 0.8, "writes_user_turn": 0.0, "copies_prompt": 0.1, "uses_earlier_turn": 0.5, "obeys": 0.25,
        "on_topic": 0.9,
    }  # fmt: skip
    return {name: estimate(value, count=30) for name, value in shares.items()} | {
        "longest_repeat": estimate(12 * repeated, 1.0, count=30),
        "words": estimate(41.0, 4.0, count=30),
    }


def model(name, nats, ends, **more):
    held_out = {
        "total": loss(nats),
        "by_source": {"quickstart:held_out": loss(nats, 4000), "mine.jsonl": loss(nats + 0.2, 2000)},
        "by_depth": {"1": loss(nats + 0.1, 4000), "2": loss(nats - 0.1, 1500), "3 or more": loss(nats - 0.2, 500)},
        "by_place": {"first token": loss(nats + 1, 100), "next 15": loss(nats + 0.3, 1500), "rest": loss(nats - 0.2)},
        "clean": loss(nats + 0.02, 5600),
    }
    if more.pop("compared", True):
        held_out["difference"] = {"nats_per_token": estimate(-0.5), "bits_per_byte": estimate(-0.18)}
    return {
        "name": name,
        "model": f"runs/{name}",
        "weights": "4f6c" * 16,
        "tokenizer": "aa07" * 16,
        "parameters": 124_439_808,
        "held_out": held_out,
        "plain_text": {"Gettysburg Address": loss(3.1, 300)},
        "replies": replies(ends, 1 - ends),
        **more,
    }


def made_up_report() -> Report:
    base = model("quickstart", 2.9, 0.1, compared=False)
    tuned = model(
        "sft",
        2.4,
        0.9,
        learnt_by_heart={"grams_8": estimate(0.05, count=2000), "grams_13": estimate(0.01, count=1800)},
        training={
            "sources": [{"source": "quickstart", "conversations": 150, "tokens": 20_000, "supervised": 12_000}],
            "dropped": {"no reply": 3},
            "supervised_share": 0.6,
            "repeated_share": 0.0,
            "fill": 0.97,
            "steps": 200,
            "curves": {
                "train/loss": [(10, 3.0), (20, 2.7), (30, 2.5)],
                "eval/loss": [(0, 2.9), (20, 2.5), (30, 2.55)],
                "train/learning_rate": [(10, 5e-4), (20, 3e-4), (30, 1e-5)],
                "train/grad_norm": [(10, 1.0), (20, 0.8), (30, 0.7)],
                "train/tokens_per_second": [(10, 900.0), (20, 950.0), (30, 940.0)],
            },
        },
        preferences={
            "pairs": 60, "accuracy": 0.7, "margin": 0.12, "both_fall": 0.4, "likelier": 0.6, "longer": 0.55,
            "reward_chosen": -0.1, "reward_rejected": -0.22, "chosen_change_per_token": -0.05,
            "loss": 0.61, "objective": "sigmoid", "beta": 0.1, "reference": "runs/quickstart",
        },
        topic={"words": ["tea"], "prompts": 30, "on_topic": 27, "stopped": 28},
    )  # fmt: skip
    broken = {
        "name": "dpo",
        "model": "runs/dpo",
        "weights": "00" * 32,
        "tokenizer": "aa07" * 16,
        "parameters": 124_439_808,
        "failed": "its weights hold values that are not finite: the run diverged",
    }
    says = [
        ("What is tea?", "A hot drink <b>made</b> of leaves.", "Tea is a drink."),
        ("And without milk?", "It is black.", "I like tea I like tea I like tea"),
    ]
    turns = [
        {"user": user, "replies": [{"text": one, "stopped": True}, {"text": other, "stopped": False}, None]}
        for user, one, other in says
    ]
    return {
        "models": [base, tuned, broken],
        "conversations": [{"turns": turns}, {"turns": turns[:1]}, {"turns": turns[:1]}],
        "data": {"quickstart:held_out": "12ab" * 8, "conversations": 100},
        "people": replies(1.0, 0.01),
        "left_out": 0,
        "overlap": {"conversations": 100, "exact": 2, "near": 5, "problems": ["near copies need datasketch"]},
        "settings_that_differ": {"optimizer.learning_rate": [None, 5e-4, 1e-5], "dpo.beta": [None, None, 0.1]},
        "pairs_at_start": {
            "pairs": 200,
            "margin": 0.5,
            "ordered": 0.56,
            "little_to_learn": 31,
            "likely_mislabelled": 12,
            "length": {"chosen_tokens": 80.0, "rejected_tokens": 64.0, "chosen_is_longer": 0.6, "correlation": -0.9},
            "saturation": [{"beta": 0.1, "margin": 29.4, "margin_per_token": 0.41, "saturated": 0.05}],
            "later": [{"model": "runs/dpo", "divergence": 0.0123}],
        },
        "precision": "no",
        "max_length": 1024,
        "seed": 0,
        "warnings": ["dpo has failed: its weights hold values that are not finite"],
        "commands": ["python launch/evaluate.py quickstart runs/sft runs/dpo --data quickstart:held_out"],
        "versions": {"python": "3.12.3", "gpt2ft": "0.1.0", "torch": "2.10"},
    }
