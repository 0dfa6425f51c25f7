"""A name that does not exist is answered with what is meant, or with nothing: by meaning first, then by spelling."""

import re

import pytest

from gpt2ft.__main__ import SCRIPTS
from gpt2ft.command_line import words_to_start
from gpt2ft.settings.field_names import FIELD_NAMES
from gpt2ft.settings.refusals import no_setting
from gpt2ft.settings.sections import names_of
from gpt2ft.settings.suggestions import nearest_name, nearest_path


def answer(script, name):
    """The settings that are offered for a name, and the note that stands with them."""
    said = no_setting(SCRIPTS[script].settings, name)
    assert f"`{name}`" in said
    offered, note = re.search(r"(?: \((?:did you mean (.*?)\?)?(.*)\))?$", said).groups()
    return re.findall(r"`(.*?)`", offered or ""), (note or "").strip()


MEANT = {  # name -> settings of sft
    "optimizer.lr": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate",
    "learning-rate": "optimizer.learning_rate",
    "training.lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup_fraction",
    "warmup_steps": "optimizer.warmup_fraction",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "beta1": "optimizer.beta1",
    "betas": "optimizer.beta1 optimizer.beta2",
    "adam_epsilon": "optimizer.epsilon",
    "batch_size": "training.tokens_per_micro_batch training.micro_batches_per_step",
    "training.batch_size": "training.tokens_per_micro_batch training.micro_batches_per_step",
    "per_device_train_batch_size": "training.tokens_per_micro_batch training.micro_batches_per_step",
    "gradient_accumulation_steps": "training.micro_batches_per_step",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.steps",
    "max_seq_length": "data.max_length",
    "block_size": "data.max_length",
    "lora_r": "lora.rank",
    "lora.r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "neftune_noise_alpha": "model.neftune_alpha",
    "target_modules": "lora.targets",
    "rank_pattern": "lora.rank_per_target",
    "alpha_pattern": "lora.alpha_per_target",
    "use_dora": "lora.dora",
    "modules_to_save": "lora.embeddings",
    "loraplus_lr_ratio": "lora.plus_ratio",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "save_steps": "training.save_every",
    "eval_steps": "training.eval_every",
    "logging_steps": "training.log_every",
    "report_to": "tracking",
    "wandb": "tracking",
    "early_stopping_patience": "training.patience",
    "patience": "training.patience",
    "max_eval_samples": "data.eval_limit",
    "save_minute": "training.save_minutes",
    "save_total_limit": "training.keep_checkpoints",
    "gradient_checkpointing": "training.activation_checkpointing",
    "max_grad_norm": "training.max_grad_norm",
    "grad_clip": "training.max_grad_norm",
    "seed": "training.seed",
    "output_dir": "output",
    "model_name_or_path": "model.path",
    "model": "model.path",
    "dataset_name": "data.train",
    "data": "data.train",
    "data.path": "data.train",
    "validation_file": "data.eval",
    "dataset_text_field": "data.columns",
    "train_on_inputs": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "data.train_on_prompt": "data.train_on",
    "train_on_last_turn": "data.train_on",
    "train_on_last_turn_only": "data.train_on",
    "mask_history": "data.train_on",
    "train_on": "data.train_on",
    "data.trainon": "data.train_on",
    "loss_weights": "data.columns",
    "resume_from_checkpoint": "resume",
    # spelling, and sections
    "traning.steps": "training.steps",
    "training.setps": "training.steps",
    "training.steos": "training.steps",
    "training.save": "training.save_every",
    "optmizer": "optimizer",
    "model.learning_rate": "optimizer.learning_rate",
    "max_lenght": "data.max_length",
    "dropout": "model.dropout lora.dropout",
    "training.dropout": "model.dropout lora.dropout",
    "data.max_ranks": "data.max_rank",
    "dry_rnu": "dry_run",
}


@pytest.mark.parametrize(("name", "settings"), MEANT.items())
def test_a_name_of_the_field_or_a_slip_is_answered_with_what_is_meant(name, settings):
    assert answer("sft", name)[0] == settings.split()


@pytest.mark.parametrize(
    ("script", "name", "settings"),
    [
        ("dpo", "beta", "dpo.beta"),
        ("dpo", "loss_type", "dpo.loss"),
        ("dpo", "kto", "dpo.loss"),
        ("dpo", "dpo.btea", "dpo.beta"),
        ("chat", "max_tokens", "max_new_tokens"),
        ("chat", "temp", "temperature"),
        ("chat", "model.path", "model"),
        ("chat", "system_prompt", "system"),
        ("serve", "api_key", "api_key_file"),
        ("serve", "bind", "host"),
        ("evaluate", "data.eval", "data"),
        ("evaluate", "batch_size", "tokens_per_micro_batch"),
        ("benchmark", "max_steps", "steps"),
        ("benchmark", "grad_accum", "micro_batches"),
        ("export", "out", "output"),
        ("export", "type", "format dtype"),
    ],
)
def test_every_script_offers_settings_of_its_own(script, name, settings):
    assert answer(script, name)[0] == settings.split()


@pytest.mark.parametrize(
    ("name", "setting"),
    [("loss_type", "dpo.loss"), ("kto", "dpo.loss"), ("ld_alpha", "dpo.ld_alpha"), ("rpo", "dpo.rpo_alpha")],
)
def test_a_setting_of_preferences_is_looked_for_in_their_script(name, setting):
    assert answer("sft", name)[0] == [setting]
    other_script = " ".join(words_to_start("dpo"))
    assert other_script in no_setting(SCRIPTS["sft"].settings, name)
    assert other_script not in no_setting(SCRIPTS["dpo"].settings, name)
    assert answer("chat", name)[0] == []


def test_another_unit_is_said_in_a_few_words():
    for name, unit in {
        "batch_size": "tokens",
        "grad_accum": "Streams",
        "warmup_steps": "share",
        "val_size": "0.1",
    }.items():
        assert unit in answer("sft", name)[1]


@pytest.mark.parametrize("name", ["wandb_project", "deepspeed", "packing", "load_in_4bit", "optim"])
def test_what_is_not_to_be_set_is_said(name):
    offered, note = answer("sft", name)
    assert offered == []
    assert note


UNKNOWN = """
    zzz revision bias message verbose trust_remote_code use_cache use_liger_kernel eval_delay x training.x
    optimizer.momentum_decay data.text dpo.pairs stage strict
"""


@pytest.mark.parametrize("name", UNKNOWN.split())
def test_no_guess_is_made_where_none_is_sure(name):
    assert answer("sft", name) == ([], "")


def test_the_table_names_settings_that_there_are():
    known = {name for script in SCRIPTS.values() for name in names_of(script.settings)}
    meant = {setting for name in FIELD_NAMES.values() for setting in name.settings}
    assert meant <= known
    assert all(name.settings or name.note for name in FIELD_NAMES.values())


def test_other_names_are_compared_by_spelling():
    recipes = ["oasst-gpt2", "oasst-gpt2-lora", "quickstart", "quickstart-dpo", "base"]
    assert nearest_name("quikstart", recipes) == " (did you mean `quickstart`?)"
    assert nearest_name("oasst-gpt2-lroa", recipes) == " (did you mean `oasst-gpt2-lora`?)"
    assert nearest_name("oasst", recipes) == " (did you mean `oasst-gpt2` or `oasst-gpt2-lora`?)"
    assert nearest_name("llama", recipes) == nearest_name("b", recipes) == ""


def test_files_are_compared_by_their_own_names():
    files = ["/home/me/data/chats.jsonl", "/home/me/data/b.jsonl", "/home/me/data/notes.txt"]
    assert nearest_path("/home/me/data/chat.jsonl", files) == " (did you mean `/home/me/data/chats.jsonl`?)"
    both = ["quickstart", "runs/quickstart"]
    assert nearest_path("quikstart", both) == " (did you mean `quickstart` or `runs/quickstart`?)"
    assert nearest_path("chats", files) == " (did you mean `/home/me/data/chats.jsonl`?)"
    assert nearest_path("/home/me/data/chats.json", files) == " (did you mean `/home/me/data/chats.jsonl`?)"
    assert nearest_path("/home/me/data/notes.ttx", files) == " (did you mean `/home/me/data/notes.txt`?)"
    assert nearest_path("/home/me/data/a.jsonl", files) == nearest_path("/home/me/data/notes.csv", files) == ""
