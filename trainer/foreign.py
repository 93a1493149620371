"""Names that other programs (nanoGPT, nanochat, llm.c, modded-nanogpt, Hugging Face's trainer) have for things, and
what to say of each: ours."""

from __future__ import annotations


def _answers(rows: dict[str, str]) -> dict[str, str]:
    """{name: answer} from {names, divided by blanks: answer}."""
    return {name: answer for names, answer in rows.items() for name in names.split()}


TRAIN = _answers(
    {
        "batch_size train_batch_size per_device_train_batch_size micro_batch_size mbs device_batch_size "
        "global_batch_size total_batch_size gradient_accumulation_steps grad_accum_steps accumulate_grad_batches": (
            "a step has --tokens_per_step tokens, in sequences of --train_seq_len"
        ),
        "block_size seq_len seq_length sequence_length context_length context_len max_seq_len max_seq_length n_ctx "
        "max_position_embeddings": (
            "the length of a sequence is --train_seq_len, the attention's reach --window_max_tokens"
        ),
        "sliding_window window_size window_pattern attention_window": (
            "the attention's reach is --window_max_tokens, in --long_window_layers; the others have half of it"
        ),
        "learning_rate lr max_lr base_lr peak_lr matrix_lr embedding_lr unembedding_lr": (
            "there are four: --muon_lr, --embed_lr, --head_lr and --scalar_lr"
        ),
        "max_iters max_steps num_steps steps train_steps iterations num_train_steps n_steps total_steps": (
            "the number of steps is --num_iterations"
        ),
        "epochs num_epochs max_epochs num_train_epochs": (
            "the run's length is in steps, --num_iterations; the log says how many passes over the data that are"
        ),
        "min_lr lr_decay_iters decay_lr warmup_iters warmup_ratio warmup_frac warmdown_iters warmdown_ratio "
        "cooldown_steps lr_scheduler lr_scheduler_type learning_rate_decay_frac eta_min final_lr_frac": (
            "rates are constant, then fall to 0 in the last --cooldown_frac of the run; there is no warm-up"
        ),
        "out_dir save_dir logdir log_dir logging_dir checkpoint_dir output_path default_root_dir": (
            "the folder is --output_dir"
        ),
        "name exp_name experiment_name run_id run": "the run's name is --run_name",
        "eval_interval eval_every eval_steps val_every val_interval eval_strategy evaluation_strategy": (
            "validations come every --val_loss_every steps"
        ),
        "eval_iters eval_tokens eval_batches val_max_steps val_steps max_eval_batches limit_val_batches": (
            "a validation has --val_tokens tokens"
        ),
        "eval_batch_size per_device_eval_batch_size val_batch_size": (
            "a validation has --val_tokens tokens, in sequences of --val_seq_len"
        ),
        "eval_only do_eval": "a checkpoint's loss: train_gpt.py evaluate CHECKPOINT",
        "sample_every generate_every gen_every": "text from a checkpoint: train_gpt.py sample CHECKPOINT",
        "save_steps save_interval save_every ckpt_interval checkpoint_interval always_save_checkpoint": (
            "checkpoints come every --checkpoint_every steps"
        ),
        "save_total_limit max_checkpoints": "so many checkpoints stay: --keep_checkpoints",
        "log_interval log_every logging_steps print_every": (
            "every step has its line in the log; --log_train_loss puts the loss in it"
        ),
        "dataset dataset_name dataset_path data_path data_root input": "data are named by --data",
        "input_bin train_bin train_data train_file train_path input_val_bin val_bin val_data val_file": (
            "shards are named by --train_files and --val_files, or both by --data"
        ),
        "tokenizer tokenizer_name tokenizer_path encoding": (
            "the data say how they were tokenised: --data; python -m data.tokenize makes shards of text"
        ),
        "num_workers dataloader_num_workers": "a thread reads ahead; there is nothing to set",
        "model model_name model_name_or_path model_type": (
            "a kind of model is a --preset; weights to begin with are named by --init_from"
        ),
        "n_layer n_layers num_hidden_layers depth": "the number of blocks is --num_layers",
        "n_head n_heads num_attention_heads": "the number of heads is --num_heads",
        "n_kv_head num_key_value_heads": "every head has keys and values of its own; there are --num_heads",
        "head_dim head_size": "a head is --model_dim / --num_heads wide",
        "n_embd n_embed d_model d_embed embedding_dim hidden_size dim width": "the width is --model_dim",
        "d_ff ffn_dim intermediate_size mlp_dim ffn_mult": "the MLP is --mlp_ratio times as wide as --model_dim",
        "optimizer optim": "matrices have Muon, all else AdamW",
        "beta1 beta2 betas": "AdamW's are --adam_beta1 and --adam_beta2, Muon's is --muon_momentum",
        "momentum": "Muon's is --muon_momentum",
        "weight_decay wd": "Muon's is --muon_weight_decay; AdamW has none here",
        "dropout attention_dropout bias": "the model has none: each token is seen once, and no layer has a bias",
        "grad_clip max_grad_norm gradient_clipping gradient_clip_val clip_grad": (
            "gradients are not clipped: Muon's updates are of one size anyway"
        ),
        "bf16 fp16 amp mixed_precision precision torch_dtype": "the type is --dtype: bfloat16 or float32",
        "fp8": "what is multiplied in 8 bits is said by --products",
        "compile_model torch_compile": "it is --compile: auto, on or off",
        "flash flash_attention flash_attn use_flash attn_implementation": "it is --kernels, whose auto is the fastest",
        "gradient_checkpointing activation_checkpointing recompute": (
            "there is none; a shorter --train_seq_len takes less memory"
        ),
        "ddp fsdp deepspeed zero_stage backend gpus n_gpu num_gpus devices num_processes nproc_per_node nproc": (
            "several processes are started by torchrun: torchrun --nproc_per_node=N train_gpt.py"
        ),
        "random_seed manual_seed rng_seed": "it is --seed",
        "init_from_checkpoint resume_from_checkpoint resume_from ckpt checkpoint load_checkpoint": (
            "--resume goes on with a run, --init_from begins one with its weights"
        ),
        "wandb use_wandb wandb_log wandb_project wandb_run_name tensorboard report_to": (
            "it is --watch=tensorboard,wandb"
        ),
        "push_to_hub hub_model_id": "train_gpt.py export CHECKPOINT DIR makes a folder for the transformers library",
        "prompt max_new_tokens temperature top_k top_p": "text is written by train_gpt.py sample CHECKPOINT",
    }
)
SAMPLE = _answers(
    {
        "max_tokens max_length length num_tokens n_predict tokens": "their number is --max_new_tokens",
        "start input text": "it is --prompt; a file of them --prompts",
        "n num_return_sequences samples": "their number is --num_samples",
        "temp": "it is --temperature",
        "ckpt checkpoint model out_dir": "the checkpoint, its folder or its run comes first: sample CHECKPOINT",
    }
)
