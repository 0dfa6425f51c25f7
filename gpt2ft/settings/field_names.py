"""The field's names for settings of ours: those of transformers, TRL, PEFT, axolotl, LLaMA-Factory, nanoGPT, torchtune.

Where ours counts in another unit, or there is none because it is always so, a note says it.
"""

from typing import NamedTuple


class FieldName(NamedTuple):
    """Settings that are meant by a name, of whichever script has them, and what else there is to know.

    Attributes:
        settings: none where nothing is to be set.
    """

    settings: tuple[str, ...] = ()
    note: str = ""


def _named(names: str, settings: str = "", note: str = "") -> dict[str, FieldName]:
    meant = FieldName(tuple(settings.split()), note)
    return {name.replace("_", ""): meant for name in names.split()}


TOKENS = "training.tokens_per_micro_batch tokens_per_micro_batch"
STREAMS = "training.micro_batches_per_step micro_batches"
LAUNCHER = "The launcher decides it: `accelerate launch --config_file accelerate_configs/...`."

FIELD_NAMES = {
    # the model
    **_named(
        "model_name_or_path model_name model_path model_id base_model model pretrained "
        "pretrained_model_name_or_path init_from checkpoint ckpt ckpt_path checkpoint_path model.name model.model "
        "model.id model.checkpoint weights load tokenizer tokenizer_name tokenizer_path",
        "model.path model",
    ),
    **_named("model.path path run run_name_or_path", "model.path model"),
    **_named("from_scratch scratch init_from_scratch random_weights", "model.random_init random_init"),
    **_named("attn_implementation attn flash_attention flash_attn use_flash_attention", "model.attention attention"),
    **_named("resid_pdrop embd_pdrop attn_pdrop hidden_dropout hidden_dropout_prob", "model.dropout"),
    **_named("lora_dropout peft_dropout", "lora.dropout"),
    **_named("neftune_noise_alpha neftune noise_alpha training.neftune_alpha", "model.neftune_alpha"),
    **_named(
        "n_layer n_layers num_layers n_head n_heads num_heads n_embd hidden_size d_model vocab_size model.size size "
        "model_size model.layers",
        "model.path model",
        "The shape is that of a model, or of the config.json in a folder.",
    ),
    # adapters
    **_named("lora_r lora_rank r lora.r peft_r adapter_rank use_peft use_lora peft lora adapter", "lora.rank"),
    **_named("lora_alpha lora.lora_alpha peft_alpha alpha", "lora.alpha"),
    **_named(
        "lora_target_modules target_modules lora_target lora_targets lora_modules lora.modules modules",
        "lora.targets",
    ),
    **_named("rank_pattern lora_rank_pattern", "lora.rank_per_target", "As q=16 v=4."),
    **_named("alpha_pattern lora_alpha_pattern", "lora.alpha_per_target", "As q=32 v=8."),
    **_named("use_rslora rs_lora", "lora.rslora"),
    **_named("modules_to_save additional_target train_embeddings", "lora.embeddings", "The table alone."),
    **_named("use_dora peft_use_dora lora_use_dora", "lora.dora"),
    **_named("loraplus_lr_ratio lora_plus loraplus lora_plus_lr_ratio loraplus_ratio", "lora.plus_ratio"),
    **_named(
        "load_in_4bit load_in_8bit qlora quantization quantization_bit quantize bnb_4bit_quant_type",
        note="Weights are not quantised here: `lora.rank` keeps gradients and moments small.",
    ),
    # data
    **_named(
        "dataset_name dataset datasets dataset_path data_path train_file train_data train_dataset training_data "
        "train_path dataset_dir data_dir data_files data.path data.file data.files data.name data.dataset "
        "data.data data.training data.source data.sources data train file files input_file input sources",
        "data.train data",
    ),
    **_named(
        "eval eval_dataset eval_data eval_file validation_file valid_file val_file test_file val_data validation_data "
        "val_dataset dev_file validation valid val test dev data.validation data.val data.test data.held_out "
        "held_out eval_set data.valid data.dev dataset_test_split",
        "data.eval data",
    ),
    **_named(
        "val_size test_size validation_split val_split eval_split valid_split test_split eval_size "
        "validation_split_percentage val_set_size split eval_ratio val_fraction validation_fraction",
        "data.eval_fraction",
        "A share, as 0.1.",
    ),
    **_named(
        "max_eval_samples eval_samples num_eval_samples eval_subset eval_num_samples max_val_samples eval_iters "
        "eval_batches limit_val_batches limit_eval_batches max_eval_batches eval_max_samples",
        "data.eval_limit",
        "Conversations.",
    ),
    **_named(
        "max_seq_length max_seq_len seq_length seq_len sequence_length sequence_len cutoff_len block_size "
        "context_length context_size n_ctx max_len max_length model_max_length context max_source_length",
        "data.max_length max_length",
    ),
    **_named(
        "dataset_text_field text_field text_column prompt_column response_column input_column output_column "
        "column_names column_mapping columns field_mapping",
        "data.columns columns",
        "As prompt=question,completion=answer.",
    ),
    **_named("max_prompt_length max_completion_length", "data.max_length", "It holds for prompt and reply together."),
    **_named(
        "max_samples max_train_samples num_samples limit subset fraction sample_size",
        "data.train data",
        "NAME@0.5 takes half of it.",
    ),
    **_named("shuffle shuffle_dataset", "training.seed", "Always shuffled, by the seed."),
    **_named("language lang langs", "data.languages languages"),
    **_named("prefix_sharing shared_prefix shared_prefixes share_prefix tree_training", "data.share_prefixes"),
    **_named("ignore_columns skip_keys", "data.ignore_keys ignore_keys"),
    **_named("ignore_errors skip_errors skip_bad_lines", "data.on_error on_error", "As `skip`."),
    **_named("cache_dir dataset_cache", "data.cache cache"),
    **_named("packing sample_packing padding_free pad_to_multiple_of group_by_length", note="Always packed."),
    **_named(
        "assistant_only_loss completion_only_loss train_on_responses_only train_on_completions_only train_on_inputs "
        "train_on_input train_on_prompt mask_prompt mask_inputs roles_to_train",
        "data.train_on",
        "Assistant turns alone are learned, all or the last, or whole texts where there are no turns.",
    ),
    **_named(
        "train_on_last_turn train_on_last_turn_only train_last_turn train_last_turn_only train_on_last train_last_only "
        "last_turn_only last_turn only_last_turn last_message_only last_response_only mask_history last_round "
        "train_on_last_response train_on_last_message train_on_turns train_turns learn_on loss_on supervise",
        "data.train_on",
        "As `last`; `all` assistant turns by default.",
    ),
    **_named(
        "loss_weights message_weights message_weight_field weight_field weight_column weights_column sample_weights "
        "sample_weight message_field_training loss_scale loss_weight",
        "data.columns columns",
        "Weights stand in the data, as `weight` of a message or of a record; weight=COLUMN names that of records.",
    ),
    **_named("train_on_eos train_on_eot train_on_end", note="The end of each turn that is learned is learned with it."),
    **_named(
        "chat_template chat_template_path template prompt_template",
        note="There is one template, see the README.",
    ),
    **_named(
        "dataloader_num_workers num_workers dataset_num_proc num_proc preprocessing_num_workers "
        "dataloader_prefetch_factor dataloader_pin_memory prefetch_factor pin_memory",
        note="Streams are built ahead without a setting.",
    ),
    # batches
    **_named(
        "batch_size per_device_train_batch_size train_batch_size micro_batch_size per_gpu_train_batch_size mbs "
        "device_batch_size per_device_batch_size train_micro_batch_size_per_gpu micro_batch",
        f"{TOKENS} {STREAMS}",
        "Counted in tokens: so many in a stream, so many streams in a step.",
    ),
    **_named("per_device_eval_batch_size eval_batch_size val_batch_size", TOKENS, "Counted in tokens."),
    **_named("max_tokens_per_batch tokens_per_batch stream_length", TOKENS),
    **_named(
        "gradient_accumulation_steps grad_accum grad_accum_steps gradient_accumulation accumulate_grad_batches "
        "accumulation_steps accumulation grad_acc",
        STREAMS,
        "Streams in a step over all processes; each accumulates its share.",
    ),
    **_named(
        "global_batch_size total_batch_size effective_batch_size total_batch_tokens",
        f"{STREAMS} {TOKENS}",
        "A step is so many streams of so many tokens.",
    ),
    # length of the run
    **_named("num_train_epochs num_epochs epochs n_epochs max_epochs epoch", "training.epochs"),
    **_named(
        "max_steps num_train_steps total_steps max_iters num_steps train_steps max_train_steps num_iterations "
        "iterations iters n_steps training_steps step",
        "training.steps steps",
    ),
    **_named("random_seed manual_seed data_seed random_state seed", "training.seed seed"),
    **_named("logging_steps log_interval log_every_n_steps log_steps log_freq logging_interval", "training.log_every"),
    **_named(
        "eval_steps eval_interval evaluation_steps eval_freq val_check_interval evals_per_epoch eval_strategy "
        "evaluation_strategy eval_every_n_steps val_interval",
        "training.eval_every",
        "Steps between; by default each epoch.",
    ),
    **_named(
        "save save_steps save_interval checkpoint_every save_every_n_steps save_freq checkpoint_interval save_strategy "
        "checkpointing_steps saves_per_epoch ckpt_interval",
        "training.save_every",
        "Steps between; by default with each evaluation and by time.",
    ),
    **_named("save_interval_minutes save_every_minutes checkpoint_minutes save_time", "training.save_minutes"),
    **_named("save_total_limit keep_last max_checkpoints num_checkpoints", "training.keep_checkpoints"),
    **_named(
        "early_stopping_patience patience early_stopping early_stop es_patience early_stopping_rounds",
        "training.patience",
        "Evaluations without a better held-out loss.",
    ),
    **_named(
        "load_best_model_at_end metric_for_best_model greater_is_better",
        note="The model of the lowest held-out loss is always kept in best/.",
    ),
    **_named("grad_clip clip_grad gradient_clipping max_norm clip_grad_norm grad_clip_norm", "training.max_grad_norm"),
    **_named(
        "gradient_checkpointing use_gradient_checkpointing grad_checkpointing checkpoint_activations",
        "training.activation_checkpointing activation_checkpointing",
    ),
    **_named("full_determinism cudnn_deterministic", "training.deterministic"),
    # precision
    **_named("auto_find_batch_size auto_batch_size auto_micro_batch", TOKENS, "With auto as its value."),
    **_named("bf16 bfloat16 use_bf16", "training.precision precision dtype", "With bf16 as its value."),
    **_named(
        "fp16 float16 half use_fp16 amp",
        "training.precision precision dtype",
        "With fp16 as its value.",
    ),
    **_named("fp32 float32 tf32", "training.precision precision dtype", "With fp32 as its value."),
    **_named("mixed_precision dtype torch_dtype model_dtype", "training.precision precision dtype"),
    # the optimizer
    **_named(
        "lr learning_rate peak_lr max_lr base_lr initial_lr init_lr step_size eta optimizer.rate",
        "optimizer.learning_rate",
    ),
    **_named("lr_scheduler_type lr_scheduler scheduler lr_schedule scheduler_type lr_decay", "optimizer.schedule"),
    **_named(
        "warmup_ratio warmup_steps warmup num_warmup_steps warmup_iters lr_warmup_steps warmup_epochs "
        "warmup_proportion",
        "optimizer.warmup_fraction",
        "A share of the steps, as 0.03.",
    ),
    **_named(
        "min_lr min_learning_rate min_lr_ratio min_lr_rate final_lr final_lr_fraction",
        "optimizer.final_fraction",
        "A share of the peak.",
    ),
    **_named("wd weight_decay decay l2", "optimizer.weight_decay"),
    **_named("adam_beta1 b1 momentum", "optimizer.beta1"),
    **_named("adam_beta2 b2", "optimizer.beta2"),
    **_named("betas adam_betas optimizer.beta", "optimizer.beta1 optimizer.beta2"),
    **_named("adam_epsilon eps adam_eps", "optimizer.epsilon"),
    **_named("optim optimizer optimizer_type optimizer.name optimizer.type", note="It is AdamW; `optimizer.` sets it."),
    # preferences
    **_named("beta dpo_beta kl_coef kl_beta pref_beta", "dpo.beta beta"),
    **_named("loss_type dpo_loss loss pref_loss preference_loss", "dpo.loss"),
    **_named("kto orpo simpo ipo", "dpo.loss", "It is a value of it."),
    **_named("label_smoothing_factor cdpo_epsilon", "dpo.label_smoothing"),
    **_named("simpo_gamma gamma_beta_ratio", "dpo.gamma"),
    **_named("kto_chosen_weight chosen_weight", "dpo.desirable_weight"),
    **_named("kto_rejected_weight rejected_weight", "dpo.undesirable_weight"),
    **_named("rpo sft_weight nll_weight pref_ftx", "dpo.rpo_alpha"),
    **_named(
        "ref_model reference_model ref precompute_ref_log_probs ref_model_name_or_path reference",
        "reference model.path",
    ),
    # folders, launches, logs
    **_named(
        "output_dir out_dir save_dir output_path out logging_dir save_path run_dir run_name experiment_name o",
        "output",
    ),
    **_named(
        "resume_from_checkpoint resume_from continue continue_training",
        "resume",
        "By itself, in the same `output`.",
    ),
    **_named("overwrite_output_dir overwrite force", "resume", "`--resume never` moves the earlier run aside."),
    **_named("dryrun dry check plan validate_only", "dry_run"),
    **_named("examples show_examples preview print_examples inspect", "show"),
    **_named(
        "report_to wandb use_wandb wandb_log tensorboard logger loggers trackio mlflow log_with logging tracker "
        "trackers",
        "tracking",
        "Any of tensorboard, wandb, trackio and mlflow.",
    ),
    **_named(
        "wandb_project project wandb_entity wandb_mode wandb_key wandb_run_id wandb_name trackio_space_id "
        "mlflow_experiment mlflow_tracking_uri project_name",
        note="`--tracking` names trackers; their environment variables set the rest, as WANDB_PROJECT.",
    ),
    **_named(
        "deepspeed deepspeed_config fsdp fsdp_config ddp strategy zero_stage num_processes nproc_per_node "
        "num_gpus gpus n_gpu devices local_rank world_size num_nodes num_machines config_file accelerate_config",
        note=LAUNCHER,
    ),
    **_named(
        "device use_cpu cpu cuda no_cuda gpu accelerator",
        note="A GPU where there is one; ACCELERATE_USE_CPU=true for none.",
    ),
    **_named("torch_compile compile use_compile", "training.compile compile", "On CUDA it is done by default."),
    **_named(
        "push_to_hub hub_model_id repo_id hub_token hub_private_repo",
        note="`launch/export.py --push NAME` uploads a model, privately unless `--public`; the key is that of the "
        "hub's own client.",
    ),
    **_named("do_train do_eval do_predict", note="Each has a script: sft, dpo, evaluate, chat."),
    **_named(
        "recipe config config_path c cfg config_name",
        note="A recipe stands alone, without a name: NAME or FILE.yaml.",
    ),
    # replies
    **_named(
        "max_new_tokens max_tokens max_gen_len n_predict num_predict generate_len length max_completion_tokens",
        "max_new_tokens training.sample_tokens",
    ),
    **_named("temp", "temperature"),
    **_named("topk", "top_k"),
    **_named("topp nucleus", "top_p"),
    **_named("minp", "min_p"),
    **_named("repeat_penalty rep_penalty repetition frequency_penalty presence_penalty", "repetition_penalty"),
    **_named("greedy do_sample", "temperature", "0 is greedy."),
    **_named("system_prompt system_message sys instructions", "system"),
    # serving and exporting
    **_named("listen bind address ip hostname server_name", "host"),
    **_named("p server_port", "port"),
    **_named(
        "api_key key token auth_token api_keys",
        "api_key_file",
        "A file: keys in a command line can be read by others.",
    ),
    **_named("max_num_seqs parallel max_concurrency concurrency num_slots workers", "slots"),
    **_named("served_model_name alias", "model_name"),
    **_named("cors cors_origins allowed_origins allow_origins", "allowed_hosts"),
    **_named("timeout", "request_timeout"),
    **_named("format type export_format to outtype", "format dtype"),
}
