"""Train a GPT to a target validation loss, as fast as the machine allows, and leave evidence that holds.

Contract of the `medium` preset: a 350M-class GPT with two input embeddings reaches 2.92 validation loss on
FineWeb within 5690 steps of 524,288 tokens on 8 GPUs. The same file and the same code path train the `nano`
preset (about 1.3M parameters, bytes) on a laptop. What has been measured, where, and how often: README.md.

    torchrun --nproc_per_node=8 train_gpt.py                      # medium; 1, 2, 4 or 8 processes train alike
    python train_gpt.py --preset=nano --seed=1                    # one process, no GPU needed
    python train_gpt.py --help                                    # every field with its unit
    python train_gpt.py explain medium f3                         # what one preset has that another has not
    python train_gpt.py sample CHECKPOINT --prompt "Once upon"    # text from what was trained
    python train_gpt.py evaluate CHECKPOINT --val_files=GLOB      # its loss a token and a byte
    python train_gpt.py export CHECKPOINT DIR                     # for the transformers library

Exit codes: 0 trained; 2 usage; 3 bad data or checkpoint; 4 non-finite loss; 5 input or output failed (disk
full, read-only folder); 130 or 143 stopped by SIGINT or SIGTERM, after a checkpoint.

Credits. The track, its protocol (the log embeds the code, warm up and reset, stop the clock for validation)
and most techniques are the modded-nanogpt community's (https://github.com/KellerJordan/modded-nanogpt):
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), value embeddings and U-net skips
(@Grad62304977, @KoszarskyB, @brendanh0gan), the second input embedding and the sliding-window schedule of the
medium track. Ideas are theirs; the lines are ours, and other credits stand where an idea enters.
"""

import sys
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).read_text()  # read before anything can change it: the log embeds what really runs

import dataclasses
import json
from collections.abc import Callable, Iterable

from trainer.threads import bound_spinning

bound_spinning()  # what OpenMP reads when torch loads it

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from data.shards import ShardError, TokenStream
from kernels.attention import attention_plan, flex_mask
from kernels.attention_layer import attention_layer, projected
from kernels.cross_entropy import linear_cross_entropy, softcapped_logits
from kernels.muon import COEFFICIENTS, apply_update_, momentum_, orthogonalize
from kernels.norm import rms_norm as norm
from kernels.residual import mixes_of_layers
from trainer import (
    checkpoints,
    evaluate,
    export,
    implementations,
    processes,
    products,
    report,
    sample,
    sampled_softmax,
    schedule,
    techniques,
)
from trainer.adam import Adam, MatrixAdamW, is_slow, waiting_at
from trainer.ahead import Ahead
from trainer.averages import TailAverage
from trainer.checkpoints import CheckpointError, Done, NonFinite
from trainer.draws import Draws
from trainer.evidence import TokenRecord, check_same_data
from trainer.exchange import GradientExchange, PlainExchange, as_bytes, gather_state, spread_state
from trainer.explain import explain_command
from trainer.log import Clock, Progress, RunLog, matmul_ceiling
from trainer.ngram_table import NoRows, RowExchange
from trainer.ngrams import NGramRows
from trainer.normuon import NorMuon
from trainer.options import UsageError, check_limits, from_json, help_text, parse_options, setting, wants_help
from trainer.presets import frontier_presets
from trainer.processes import StopRequest, on_rank_0, rank, world_size
from trainer.program import json_hash
from trainer.start import expand, start_from
from trainer.streams import open_streams, to_device, with_all_validation
from trainer.warm_up import compiler_options, warm_up
from trainer.watch import WORDS, WRITERS, GradientNorm, Watch, listed

# Dimension key. B batch (1 in training: one packed sequence), T time, D model width, H heads, Dh head width,
# F hidden width of the MLP, V vocabulary (padded where the head is concerned), L layers, N tokens (B * T).

# ---- Configuration -------------------------------------------------------------------------------------------


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes; the defaults are the `medium` preset."""

    preset: str = setting("medium", "name", "table row of PRESETS that the other fields start from")
    config: str = setting("", "file", "of fields, over the preset's: TOML, or the JSON beside a run's log")
    # Data
    data: str = setting("", "path", "folder of shards, or a text to be tokenised: files, vocabulary, validation tokens")
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "glob", "training shards, or 'embedded'")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "glob", "validation shards, or 'embedded'")
    vocab_size: int = setting(50257, "tokens", "token ids are below this; the head pads it up to 128s", at_least=1)
    eos_id: int = setting(50256, "token", "opens every document", at_least=0)
    drop_shard_tail: bool = setting(True, "flag", "skip each shard's last incomplete step, as the reference run")
    align_documents: bool = setting(False, "flag", "training sequences begin at documents, which are cut to fit")
    max_document_tokens: int = setting(0, "tokens", "kept of an aligned document; 0: as many as it has", at_least=0)
    early_document_tokens: int = setting(0, "tokens", "kept in the run's first third; 0: as later", at_least=0)
    # Length of the run
    num_iterations: int = setting(5690, "steps", "optimizer steps", at_least=1)
    tokens_per_step: int = setting(524288, "tokens", "over all processes; split into packed sequences", at_least=1)
    train_seq_len: int = setting(65536, "tokens", "packed training sequence; smaller for smaller GPUs", at_least=1)
    val_seq_len: int = setting(262144, "tokens", "packed validation sequence", at_least=1)
    val_tokens: int = setting(10485760, "tokens", "to validate on, the shards' first; 0: all there are", at_least=0)
    val_loss_every: int = setting(125, "steps", "between validations; 0: only at the end", at_least=0)
    cooldown_frac: float = setting(0.7, "fraction", "of the run, its end: the rate falls to 0", above=0, at_most=1)
    warmup_steps: int = setting(10, "steps", "compile and warm up before the clock, then reset all state", at_least=0)
    stop_after: int = setting(0, "steps", "end there on a schedule that is longer; 0: at its end", at_least=0)
    target_loss: float = setting(2.92, "nats", "the loss that a series of runs is judged against", above=0)
    # Model
    num_layers: int = setting(16, "layers", "blocks of attention and MLP", at_least=1)
    model_dim: int = setting(1024, "width", "D", at_least=1)
    num_heads: int = setting(8, "heads", "H; the head width is D / H", at_least=1)
    mlp_ratio: int = setting(4, "ratio", "hidden width of the MLP over D", at_least=1)
    attention_scale: float = setting(0.12, "factor", "on the logits of attention", above=0)
    narrow_qk: int = setting(0, "dimensions", "of a head's queries and keys; 0: as many as its values", at_least=0)
    narrow_qk_layers: str = setting("", "layers", "that narrow_qk is for; '': all")
    narrow_qk_scale: float = setting(0.0, "factor", "on their logits; 0: attention_scale", at_least=0)
    soft_cap: str = setting("rsqrt", "name", "on the head's logits", choices=("rsqrt", "sigmoid", "none"))
    second_input_embedding: bool = setting(True, "flag", "a second embedding table mixed into every layer")
    second_embedding_context: int = setting(1, "tokens", "whose hash picks its row; 1: the token's own", at_least=1)
    value_embedding_context: int = setting(1, "tokens", "likewise, for the value embeddings", at_least=1)
    context_rows: int = setting(32768, "rows", "of a table whose row several tokens pick", at_least=1)
    value_embeddings: int = setting(5, "tables", "added to values of the first and last so many layers", at_least=0)
    unet_skips: str = setting("6>9,4>10,2>11", "layers", "output of the first added on entering the second; '': off")
    attention_free_layers: str = setting("7", "layers", "with an MLP only; '': none")
    half_truncated_rotary: bool = setting(True, "flag", "half of the rotary frequencies are zero")
    # Model: techniques (trainer/techniques.py)
    attention_init_std: float = setting(0.5, "over sqrt(D)", "standard deviation of q, k and v's weights", at_least=0)
    value_init_std: float = setting(1.0, "standard deviation", "of the value embeddings at first", at_least=0)
    tied_init_std: float = setting(0.005, "deviation", "of an input embedding that is the head at first", at_least=0)
    matrix_dtype: str = setting("", "name", "of the blocks' matrices; '': dtype", choices=("", "bfloat16", "float32"))
    loss_sum: bool = setting(False, "flag", "a sequence's loss is the sum over its tokens, not their mean")
    norm_before_attention: bool = setting(False, "flag", "attention reads the normed stream")
    value_norm: bool = setting(True, "flag", "values of attention are normed")
    output_scalar: bool = setting(False, "flag", "a layer's two scalars scale its attention's weights: in, out")
    resid_init: float = setting(1.0, "factor", "on the stream that enters a layer, at first", at_least=0)
    smear: bool = setting(False, "flag", "a gated part of the token before enters the input embedding")
    skip_gates: bool = setting(False, "flag", "skips are gated by the input embedding")
    backout_layer: int = setting(-1, "layer", "whose output is taken out again before the head; -1: none", at_least=-1)
    value_gates: bool = setting(False, "flag", "value embeddings come in through a gate a head")
    output_gates: bool = setting(False, "flag", "a gate a head on what attention found")
    key_offset: str = setting("", "layers", "whose still dimensions of keys are those of the token before; '': none")
    exact_windows: bool = setting(False, "flag", "a window of W blocks is a distance in tokens, without blocks")
    bigram_rows: int = setting(0, "rows", "of a table that two tokens pick a row of, mixed into every layer; 0: none")
    bigram_init_weight: float = setting(0.05, "factor", "on its rows, at first")
    ngram_rows: int = setting(0, "rows", "of a table shared out, that two and three tokens pick; 0: none", at_least=0)
    untied_values: bool = setting(False, "flag", "the last layers have value embeddings of their own")
    xsa: bool = setting(False, "flag", "what attention found loses its part along the token's own value")
    paired_heads: str = setting("", "layers", "in which two heads each attend to the keys of both; '': none")
    late_attention_source: int = setting(-1, "layer", "whose output later attention reads; -1: off", at_least=-1)
    dynamic_skips: str = setting("", "layers", "early and middle one, mixed in at the end by the token: 4,11; '': off")
    dynamic_gates: int = setting(-1, "layer", "from whose input on it makes each token's gates; -1: off", at_least=-1)
    head_mixing: bool = setting(False, "flag", "the last layer's heads share by the token what they attend to")
    dynamic_bias_dtype: str = setting("float32", "name", "of their biases", choices=("float32", "bfloat16"))
    dynamic_hidden: int = setting(64, "width", "of the networks that mix them", at_least=1)
    # Schedules (trainer/schedule.py). Lists have one value for each twelfth of the run; the last one stays
    extension_steps: int = setting(0, "steps", "the run's last, after the end of its schedules", at_least=0)
    batch_schedule: str = setting("", "tokens", "of a step, by twelfths, then tokens_per_step: 131072,262144,393216")
    lr_schedule: str = setting("1", "factors", "of all learning rates, by twelfths: 1,1.52,1.73,2")
    lr_floor: float = setting(0.0, "factor", "of all learning rates at the end of the cooldown", at_least=0)
    window_schedule: str = setting("", "blocks", "the long window by twelfths: 3,7,11; '': as growing_window says")
    validation_window: int = setting(0, "blocks", "the long window of the last validation; 0: the run's", at_least=0)
    short_window_max: int = setting(0, "blocks", "that half of the long window is cut to; 0: not cut", at_least=0)
    yarn_until: int = setting(-1, "blocks", "YaRN as the window grows, up to this one; 0: all; -1: none", at_least=-1)
    prefix_loss: float = setting(0.0, "weight", "in mtp's first part, of the token that begins as the next", at_least=0)
    vocab: str = setting("", "folder", "with GPT-2's encoder.json: for prefix_loss, and to tokenise --data offline")
    sampled_softmax: str = setting("", "classes", "of a training loss, by twelfths: 14336,24576; '': all of them")
    full_softmax_frac: float = setting(0.07, "fraction", "of the run, its end: all classes", at_least=0, at_most=1)
    mtp: int = setting(1, "targets", "of a token in the first twelfth, one fewer in each next", at_least=1, at_most=3)
    muon_momentum_cooldown: int = setting(0, "steps", "the run's last, over which the momentum falls", at_least=0)
    adam_every: int = setting(1, "steps", "between updates by Adam, on the sum of their gradients", at_least=1)
    adam_period: int = setting(0, "steps", "likewise of value and bigram tables, later; 0: never", at_least=0)
    adam_period_from: float = setting(0.28, "fraction", "of the run, then adam_period holds", at_least=0, at_most=1)
    tie_embeddings_frac: float = setting(0.0, "fraction", "of the run: embed1 is the head", at_least=0, below=1)
    # Attention windows
    block_tokens: int = setting(128, "tokens", "windows are counted in blocks of this many", at_least=1)
    window_max_tokens: int = setting(3456, "tokens", "the long window at the end of the run", at_least=1)
    long_window_layers: str = setting("0,4,11,15", "layers", "with the long window; the others have half of it")
    growing_window: bool = setting(True, "flag", "the window grows along a cubic; off: full size from the start")
    window_growth_frac: float = setting(1.0, "fraction", "of the run, its start: the window grows", above=0, at_most=1)
    # Optimizers
    head_lr: float = setting(1 / 320, "rate", "AdamW, output head", at_least=0)
    embed_lr: float = setting(0.3, "rate", "AdamW, all embedding tables", at_least=0)
    scalar_lr: float = setting(0.015, "rate", "AdamW, skip weights and lambdas", at_least=0)
    adam_beta1: float = setting(0.8, "factor", "AdamW", at_least=0, below=1)
    adam_beta2: float = setting(0.95, "factor", "AdamW", at_least=0, below=1)
    matrix_optimizer: str = setting("muon", "name", "of the blocks' matrices", choices=("muon", "adamw"))
    muon_lr: float = setting(0.025, "rate", "of the blocks' matrices", at_least=0)
    muon_weight_decay: float = setting(0.01, "rate", "times the learning rate; doubled for the MLP", at_least=0)
    muon_momentum: float = setting(0.95, "factor", "after its warm-up from 0.85", at_least=0, below=1)
    muon_momentum_warmup: int = setting(300, "steps", "over which the momentum grows", at_least=0)
    muon_coefficients: str = setting("spec", "name", "of the orthogonalisation", choices=tuple(COEFFICIENTS))
    # Optimizers: techniques (trainer/normuon.py, trainer/adam.py)
    normuon_beta2: float = setting(0.0, "factor", "NorMuon's, over rows' mean squares; 0: Muon", at_least=0, below=1)
    two_rate_from: float = setting(0.0, "fraction", "of the run, then NorMuon has two momenta; 0: never", at_least=0)
    muon_head_pairs: bool = setting(False, "flag", "NorMuon takes q and k by two heads each, not whole")
    gram_newton_schulz: bool = setting(False, "flag", "NorMuon takes matrices of the MLP by their products X X^T")
    ema_nesterov: float = setting(0.0, "factor", "of the gradients' way ahead of the weights; 0: none", at_least=0)
    tail_ema: float = setting(0.0, "factor", "a step, of the weights' average at the end; 0: none", at_least=0, below=1)
    tail_ema_steps: int = setting(300, "steps", "the run's last, that the average is over", at_least=1)
    tail_ema_tables: float = setting(0.65, "share", "of it in head and input embedding", at_least=0, at_most=1)
    tail_ema_matrices: float = setting(0.5, "share", "of it in the blocks' matrices", at_least=0, at_most=1)
    muon_lr_factors: str = setting("", "factors", "NorMuon's rate by kind: qkvo=2,mlp_in=2,mlp_out=4,gates=0.1")
    gate_optimizer: str = setting("muon", "name", "of the gates a head", choices=("muon", "adam"))
    cautious_decay: bool = setting(False, "flag", "decay only with the update's sign, by the rate squared")
    adam_weight_decay: float = setting(0.0, "rate", "times the factor of the kind and the rate squared", at_least=0)
    adam_decay: str = setting("", "factors", "by kind: head=150,tables=5; no kind, no decay")
    adam_betas: str = setting("", "factors", "by kind, where others than the two: scalars=0.9:0.99")
    adam_eps: float = setting(1e-10, "number", "added to the root of the second moment", above=0)
    adam_moments: str = setting("weights", "name", "type of Adam's moments", choices=("weights", "float32"))
    mix_lr: float = setting(0.0, "rate", "both embeddings' factors; 0: they are scalars", at_least=0)
    input_gate_lr: float = setting(4e-5, "rate", "gates of smear and skips", at_least=0)
    gate_lr: float = setting(4e-4, "rate", "gates a head, by Adam", at_least=0)
    ngram_lr: float = setting(0.3, "rate", "rows that ngram_rows are picked from, by row", at_least=0)
    bigram_mix_lr: float = setting(4e-3, "rate", "factors of the bigram table", at_least=0)
    dynamic_lr: float = setting(1e-3, "rate", "networks of dynamic_skips", at_least=0)
    # Machine
    seed: int = setting(0, "number", "of the initial weights; the data order does not depend on it", at_least=0)
    dtype: str = setting("bfloat16", "name", "of all but head and scalars", choices=("bfloat16", "float32"))
    products: str = setting("bf16", "name", "what is multiplied in 8 bits; bf16: nothing", choices=products.NAMES)
    fp8_scales: str = setting("", "numbers", "largest ones of its input, weight, gradient: 32,2.25,1.5; '': measured")
    device: str = setting("auto", "name", "to train on", choices=("auto", "cuda", "cpu"))
    compile: str = setting("auto", "name", "torch.compile; auto: on GPUs", choices=("auto", "on", "off"))
    tune: bool = setting(True, "flag", "coordinate-descent tuning of what torch.compile makes for GPUs")
    kernels: str = setting(
        "auto", "name", "Hopper: specialised, gluon", choices=("auto", "triton", "specialised", "gluon", "reference")
    )
    communication: str = setting("auto", "name", "auto: overlap on GPUs", choices=("auto", "plain", "overlap"))
    patience: float = setting(600, "seconds", "that a process waits for another one", at_least=1, at_most=10**7)
    deterministic: bool = setting(False, "flag", "ask torch for bitwise repeatable algorithms (slower on GPUs)")
    # Output
    output_dir: str = setting("local/runs", "local folder", "for the log, its JSON and the checkpoints")
    dry_run: bool = setting(False, "flag", "print the table of the run's steps and end; no data are needed")
    run_name: str = setting("", "name", "of the log; '': preset, time and a random suffix")
    log_train_loss: bool = setting(False, "flag", "training loss in every step's line (waits for the GPU)")
    log_words: str = setting("", "words", "of lr (Muon's), window and grad_norm, in every step's line")
    watch: str = setting("", "names", "tensorboard, wandb: their files beside the log; wandb offline")
    profile: int = setting(0, "steps", "to trace, for Perfetto; 0: none", at_least=0)
    checkpoint_every: int = setting(0, "steps", "between checkpoints; 0: only at the end or when stopped", at_least=0)
    keep_checkpoints: int = setting(2, "files", "newest so many stay; 0: all", at_least=0)
    save_final: bool = setting(True, "flag", "checkpoint at the end of the run")
    resume: str = setting("", "checkpoint", "auto: this run's newest good one; or a file, a folder, a run")
    init_from: str = setting("", "checkpoint", "file, folder or run, whose weights the run starts with")
    init_optimizer: bool = setting(False, "flag", "start with the optimizers' state of --init_from, too")
    init_hash: str = setting("", "hash", "of the weights that the run starts with; --init_from fills it in")
    overwrite: bool = setting(False, "flag", "replace an existing run of the same name")
    plan_hash: str = setting("", "hash", "of the statistical plan that the run belongs to")
    data_dir: str = setting("", "local folder", "for the embedded corpus; '': a cache folder beside this file")


# What a run computes does not depend on these, so a checkpoint may be resumed with others. Where the data lie does
# not matter either: what they are is in the hashes of the tokens (trainer/evidence.py).
_RUN_FIELDS = frozenset(
    "config data init_from stop_after train_files val_files data_dir output_dir run_name checkpoint_every save_final "
    "keep_checkpoints resume overwrite plan_hash device compile tune kernels communication patience "
    "log_train_loss log_words watch profile vocab dry_run "
    "deterministic warmup_steps".split()
)

PRESETS: dict[str, dict] = {
    # The reference run of the medium track, second input embedding.
    "medium": {},
    # The 124M class on the same data: 12 layers of 768.
    "small": dict(
        num_layers=12, model_dim=768, num_heads=6, num_iterations=3000, target_loss=3.28,
        value_embeddings=3, unet_skips="4>7,2>8,1>9", attention_free_layers="", long_window_layers="0,3,8,11",
    ),
    # The same architecture at 0.2M parameters on bytes, for a laptop without a GPU.
    "nano-plain": dict(
        train_files="embedded", val_files="embedded", vocab_size=256, eos_id=0, drop_shard_tail=False,
        num_iterations=700, tokens_per_step=1024, train_seq_len=1024, val_seq_len=8192, val_tokens=65536,
        val_loss_every=100, target_loss=0.7,
        num_layers=4, model_dim=64, num_heads=2, value_embeddings=1, unet_skips="1>3", attention_free_layers="",
        attention_scale=0.4,  # the medium preset's bound on logits, scale times head width, a little lower
        block_tokens=32, window_max_tokens=256, long_window_layers="0,3",
        window_growth_frac=0.6,  # later, the learning rate is too low to learn the new distances (docs/LOG.md)
        embed_lr=0.1, head_lr=0.01, muon_momentum=0.9, muon_momentum_warmup=100, dtype="float32", log_train_loss=True,
    ),
}
# The one to start with: a second and a value embedding that see 4 and 3 bytes make up for more than half of the steps
# of nano-plain (records/studies). 1.3M parameters, 1.0M of them rows of these two tables. A quarter of the validation
# tokens leaves more of the run to training.
PRESETS["nano"] = PRESETS["nano-plain"] | dict(
    num_iterations=300, warmup_steps=2, val_tokens=16384,
    second_embedding_context=4, value_embedding_context=3, context_rows=8192,
    attention_free_layers="1", window_max_tokens=128, cooldown_frac=1.0,
    embed_lr=0.3, adam_beta1=0.7, adam_beta2=0.99, muon_lr=0.04, muon_momentum=0.85,
)
PRESETS |= frontier_presets(PRESETS)  # record18, f2, f3, frontier, nano-frontier
# fmt: on


def parse_config(arguments: list[str]) -> Config:
    """Config from `--field=value` (or `--field value`; a bare `--flag` is true). Raises UsageError."""
    bare = {"resume": "auto"}
    return check_config(parse_options(Config, PRESETS, expand(arguments, Config, PRESETS, bare), bare))


def _layers(text: str) -> frozenset[int]:
    return frozenset(techniques.numbers(text))


def _skips(text: str) -> dict[int, int]:
    """{layer entered: layer whose output is added} from '6>9,4>10'."""
    pairs = [pair.split(">") for pair in text.split(",") if pair.strip() and text.strip() != "none"]
    return {int(target): int(source) for source, target in pairs}


def check_config(config: Config) -> Config:
    """`config` itself, or UsageError that names the field at fault and what it must be. What ties fields together
    stands here, what limits one alone at the field."""
    c = config
    check_limits(c)
    for small, large in dict(train_seq_len="tokens_per_step", val_seq_len="val_tokens", num_heads="model_dim").items():
        if getattr(c, large) % getattr(c, small):
            raise UsageError(f"--{large}={getattr(c, large)} is not a multiple of --{small}={getattr(c, small)}")
    if (c.model_dim // c.num_heads) % 4:
        raise UsageError(f"--model_dim / --num_heads = {c.model_dim // c.num_heads}: rotary needs a multiple of 4")
    if c.eos_id >= c.vocab_size:
        raise UsageError(f"--eos_id={c.eos_id} is not below --vocab_size={c.vocab_size}")
    if 2 * c.value_embeddings > c.num_layers:
        raise UsageError(f"--value_embeddings={c.value_embeddings}: from 0 to half of --num_layers={c.num_layers}")
    try:
        skips = _skips(c.unet_skips)
    except ValueError:
        raise UsageError(f"--unet_skips={c.unet_skips}: written 6>9,4>10") from None
    if any(not 0 <= source < target < c.num_layers for target, source in skips.items()):
        raise UsageError(f"--unet_skips={c.unet_skips}: from an earlier to a later one of --num_layers={c.num_layers}")
    schedule.check(c)
    techniques.check_techniques(c, skips)
    listed("log_words", c.log_words, WORDS), listed("watch", c.watch, WRITERS)
    if c.run_name != Path(c.run_name).name or c.run_name.startswith("."):
        raise UsageError(f"--run_name={c.run_name}: a plain file name, no folder, no dot at its beginning")
    return config


def _decisive(config: Config) -> dict[str, Any]:
    """The fields that decide what a run computes."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _RUN_FIELDS}


def config_hash(config: Config) -> str:
    """sha256 over the fields that decide what a run computes, the seed left out: one hash a series."""
    told = {name: value for name, value in _decisive(config).items() if name != "seed"}
    return json_hash(told)


# ---- Model ---------------------------------------------------------------------------------------------------


def rotary_frequencies(head_dim: int, truncate_half: bool, device) -> Tensor:
    """Radians a token, float32 (head_dim / 2).

    Half-truncated rotary (@YouJiacheng): the lower half of the frequencies is (1/1024)^u, u from 0 to 1, the
    other half zero, so that half of each head carries no position."""
    rotating = head_dim // 4 if truncate_half else head_dim // 2
    frequencies = (1 / 1024) ** torch.linspace(0, 1, steps=rotating, dtype=torch.float32, device=device)
    return torch.cat([frequencies, frequencies.new_zeros(head_dim // 2 - rotating)])


def rotary_tables(length: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 (length, head_dim / 2), for positions 0..length-1."""
    angles_TR = torch.outer(torch.arange(length, dtype=torch.float32, device=frequencies.device), frequencies)
    return angles_TR.cos(), angles_TR.sin()


class Block(nn.Module):
    """Residual mix, attention (if the layer has it), MLP."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        c, dtype = config, getattr(torch, config.matrix_dtype or config.dtype)
        hidden = c.mlp_ratio * c.model_dim
        self.config, self.layer = c, layer
        self.long_window = layer in _layers(c.long_window_layers)
        self.has_attention = layer not in _layers(c.attention_free_layers)
        if narrow := self.has_attention and techniques.narrow_rows(c, layer):
            self.qk_w = nn.Parameter(torch.empty(2, narrow, c.model_dim, dtype=dtype))
            self.vo_w = nn.Parameter(torch.empty(2, c.model_dim, c.model_dim, dtype=dtype))
        elif self.has_attention:  # Q, K, V and O in one tensor: one Muon batch
            self.qkvo_w = nn.Parameter(torch.empty(4, c.model_dim, c.model_dim, dtype=dtype))
        self.mlp_in_w = nn.Parameter(torch.empty(hidden, c.model_dim, dtype=dtype))
        self.mlp_out_w = nn.Parameter(torch.empty(c.model_dim, hidden, dtype=dtype))

    def reset_parameters(self, draws: Draws) -> None:
        """Uniform with half of the usual standard deviation; what writes to the residual stream starts at zero."""
        bound = 3**0.5 * 0.5 * self.config.model_dim**-0.5
        if self.has_attention:
            wide = 3**0.5 * self.config.attention_init_std * self.config.model_dim**-0.5
            inwards, outwards = techniques.projections(dict(self.named_parameters()))
            for name, rows in techniques.drawn_apart(inwards, self.config.model_dim):
                draws(f"blocks.{self.layer} {name}", rows.uniform_, -wide, wide)
            outwards.zero_()
        draws(f"blocks.{self.layer} mlp_in", self.mlp_in_w.uniform_, -bound, bound)
        self.mlp_out_w.zero_()

    def forward(self, x_BTD, mix, ve_BTD, attention_lambdas_2, plan, rotary, impls, cache=None):
        x_BTD = mix(x_BTD)
        if self.has_attention:
            y_BTD, x_BTD = self.attend(x_BTD, ve_BTD, attention_lambdas_2, plan, rotary, impls, cache)
            bound = products.largest_value(attention_lambdas_2, ve_BTD, self.config, impls)
            x_BTD = products.added(x_BTD, y_BTD, impls["w_o"], impls, bound)
        return products.mlp_added(x_BTD, impls["w_in"], impls["w_out"], impls)

    def attend(self, x_BTD, ve_BTD, lambdas_2, plan, rotary, impls, cache):
        """(What the heads find, side by side, before it is projected back; x): attention over normed queries, keys and
        values; the values are mixed with an embedding of the token. x comes back for the sake of its gradient."""
        (B, T, D), H = x_BTD.shape, self.config.num_heads
        ve_BTHDh = None if ve_BTD is None else ve_BTD.view(B, T, H, D // H)
        given = x_BTD, impls["w_qkv"], ve_BTHDh, lambdas_2, rotary
        shape, scale, of_inputs = dict(heads=H, width=D // H), self.config.attention_scale, impls["attention_inputs"]
        if cache is None:
            how = dict(scale=scale, impl=impls["attention"], inputs_impl=of_inputs, eight=impls.get("qkv"))
            y_BTHDh, x_BTD = attention_layer(*given, plan, **shape, **how)
        else:
            q, k, v = projected(*given, **shape, impl=of_inputs)
            y_BTHDh = cache.attend(self.layer, q, k, v, plan.first_key_BT, scale)
        return y_BTHDh.reshape(B, T, D), x_BTD


class GPT(nn.Module):
    """The model of docs/spec.md 2: two input embeddings mixed into every layer, value embeddings, U-net skips.

    All learned scalars live in one float32 vector: L skip weights, then L x 3 residual lambdas (stream, first
    and second embedding), then L x 2 attention lambdas (value, value embedding). What a field can add to the model
    stands in trainer/techniques.py."""

    def __init__(self, config: Config):
        super().__init__()
        c, dtype = config, getattr(torch, config.dtype)
        self.config = c
        self.skips = _skips(c.unet_skips)
        # A multiple of 128 keeps the product's tiles whole. The padding classes take part in the softmax.
        classes = -(-c.vocab_size // 128) * 128
        self.tied = c.tie_embeddings_frac > 0  # at first: then tables have the head's rows, and the head their type
        rows = lambda picker: classes if self.tied and picker.length == 1 else len(picker)  # noqa: E731
        contexts = 1, c.second_embedding_context, c.value_embedding_context
        pickers = [NGramRows(n, c.context_rows, c.vocab_size, c.eos_id) for n in contexts]
        self.rows1, self.rows2, self.rows_v = pickers
        self.embed1 = nn.Embedding(rows(self.rows1), c.model_dim, dtype=dtype)
        self.embed2 = nn.Embedding(rows(self.rows2), c.model_dim, dtype=dtype) if c.second_input_embedding else None
        count = c.value_embeddings * (2 if c.untied_values else 1)
        tables = [nn.Embedding(rows(self.rows_v), c.model_dim, dtype=dtype) for _ in range(count)]
        self.value_embeds = nn.ModuleList(tables)
        self.blocks = nn.ModuleList([Block(c, layer) for layer in range(c.num_layers)])
        self.head_w = nn.Parameter(torch.empty(classes, c.model_dim, dtype=dtype if self.tied else torch.float32))
        layout = techniques.scalar_layout(c, len(self.skips))
        self.scalar_sizes = {kind: len(values) for kind, values in layout.items()}
        self.scalars = nn.Parameter(torch.empty(sum(self.scalar_sizes.values()), dtype=torch.float32))
        self.impls = implementations.asked(c.kernels, c.device, c.products)
        self.rotary_tables: tuple[Tensor, Tensor] | None = None
        self.query_factor: Tensor | None = None  # on queries, where YaRN changes the scale of attention
        self.yarn: list[float] | None = None  # rotary frequencies, where it changes those
        self.prefixes: Tensor | None = None  # of `prefix_loss`: each token's
        with_values = [*range(c.value_embeddings), *range(c.num_layers - c.value_embeddings, c.num_layers)]
        self.techniques = techniques.Techniques(c, self.skips, with_values) if techniques.uses_techniques(c) else None
        if not self.head_w.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values, drawn on the parameters' device, each by its name and the seed (trainer/draws.py)."""
        c, draws = self.config, Draws()
        for name, table in (*self.named_children(), *self.value_embeds.named_children()):
            if isinstance(table, nn.Embedding):
                draws(name, table.weight.normal_, 0.0, 1.0 if name.startswith("embed") else c.value_init_std)
        for block in self.blocks:
            block.reset_parameters(draws)
        self.head_w.zero_()
        if self.tied:
            self.head_w.copy_(self.embed1.weight.mul_(c.tied_init_std))
        initial = torch.cat(list(techniques.scalar_layout(c, len(self.skips)).values()))
        self.scalars.copy_(initial.to(self.scalars.device))
        if self.techniques is not None:
            self.techniques.reset_parameters(draws)

    def scalars_by_kind(self) -> dict[str, Tensor]:
        """The learned scalars as `scalar_layout` names them, those of layers with an axis for the layer."""
        parts = dict(zip(self.scalar_sizes, self.scalars.split(list(self.scalar_sizes.values()))))
        rows = {kind: parts[kind].view(self.config.num_layers, -1) for kind in ("mixes", "values")}
        return parts | rows

    def pickers(self, tables: Iterable[str]) -> dict[str, NGramRows]:
        """How tokens (..., T) pick the rows of each of the tables, by the tables' names."""
        kinds = dict(embed1=self.rows1, embed2=self.rows2, value_embeds=self.rows_v)
        if self.techniques is not None:
            kinds["techniques"] = self.techniques.bigram_rows
        return {name: kinds[name.split(".")[0]] for name in tables}

    def frequencies(self, device) -> Tensor:
        """Rotary's, in radians a token; after those of the heads those of narrow ones (`narrow_qk`), if there are."""
        c = self.config
        widths = [c.model_dim // c.num_heads] + [c.narrow_qk] * (c.narrow_qk > 0)
        return torch.cat([rotary_frequencies(width, c.half_truncated_rotary, device) for width in widths])

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin for positions from 0 to length-1 or more. Made once and kept; a compiled graph that finds none
        makes its own, in every step."""
        kept = self.rotary_tables
        if kept is None or kept[0].size(0) < length or kept[0].device != self.head_w.device:
            length = -(-length // 1024) * 1024  # a text that grows does not make them anew with every token
            frequencies = self.frequencies(self.head_w.device)
            kept = rotary_tables(length, frequencies if self.yarn is None else frequencies.new_tensor(self.yarn))
            if not torch.compiler.is_compiling():
                self.rotary_tables = kept
        return kept

    def at_step(self, step: int) -> None:
        """Rotary and the scale of attention as they are at a step (`yarn_until`), changed in place."""
        if self.config.yarn_until >= 0:
            techniques.turn(self, step, self.frequencies("cpu"), rotary_tables)

    def plan(self, tokens_BT: Tensor, window_blocks):
        """Which keys each query sees, for all layers with that window."""
        c = self.config
        window = dict(window_blocks=window_blocks, block_tokens=c.block_tokens)
        if c.exact_windows:  # a key at most so many tokens back
            window = dict(window_tokens=window_blocks * c.block_tokens + 1)
        plan = attention_plan(tokens_BT, eos_id=c.eos_id, **window)
        return plan._replace(block_mask=flex_mask(plan)) if self.impls["attention"] == "flex" else plan

    def hidden(self, tokens_BT: Tensor, window_blocks, cache=None, ngrams=None) -> Tensor:
        """Final hidden states, normed: (B, T, D). With a `trainer.sample.Cache` the tokens follow those it has seen."""
        if self.techniques is not None:
            return self.techniques.hidden(self, tokens_BT, window_blocks, cache, ngrams)
        L = self.config.num_layers
        seen_BS = tokens_BT if cache is None else cache.extend(tokens_BT)
        begin, end = seen_BS.size(1) - tokens_BT.size(1), seen_BS.size(1)
        rotary = tuple(table[begin:end] for table in self.rotary(end))
        windows = window_blocks, schedule.short_window(window_blocks, self.config)
        plan_long, plan_short = (self.plan(seen_BS, blocks) for blocks in windows)
        skip_w_L, lambdas, attention_lambdas = self.scalars.split([L, 3 * L, 2 * L])
        # Four a row: where a layer's scalars lie on 16 bytes, the compiler reads with its widest loads. It adds the
        # gradients of rows that were selected in one kernel; those of unbound ones it copies by one kernel each.
        attention_lambdas_L4 = F.pad(attention_lambdas.view(L, 2), (0, 2))

        x00_BTD = norm(techniques.looked_up(self.embed1, tokens_BT, self.impls["tables"]))
        rows2_BT, rows_v_BT = (rows(seen_BS)[:, begin:] for rows in (self.rows2, self.rows_v))
        shared = [x00_BTD]  # by all layers, which mix it into the stream
        if self.embed2 is not None:
            shared.append(norm(techniques.looked_up(self.embed2, rows2_BT, self.impls["tables"])))
        mixes = mixes_of_layers(lambdas.view(L, 3)[:, : 1 + len(shared)], shared, impl=self.impls["mix"])
        values = techniques.values_of_layers(self, rows_v_BT)
        x_BTD, outputs, impls_at = x00_BTD, {}, products.of_layers(self.impls, self.blocks)
        for layer, block in enumerate(self.blocks):
            if layer in self.skips:
                x_BTD = x_BTD + skip_w_L[layer] * outputs[self.skips[layer]]
            plan = plan_long if block.long_window else plan_short
            values_2 = attention_lambdas_L4[layer, :2]
            x_BTD = block(x_BTD, mixes[layer], values.get(layer), values_2, plan, rotary, impls_at(layer), cache)
            if layer in self.skips.values():
                outputs[layer] = x_BTD
        return norm(x_BTD)

    def forward(
        self, tokens_BT, targets_BT=None, *,
        window_blocks=None, reduction="mean", cache=None, target_weights=None, ngrams=None, classes=None,
    ):  # fmt: skip
        """Cross-entropy in nats per token if targets are given, else float32 logits (B, T, V).

        `window_blocks`: the long window, an int or a 0-d int tensor; by default the full window.
        `reduction`: mean, sum or none (then (B, T) losses).
        `cache`: a `trainer.sample.Cache` with the tokens before these.
        `target_weights`: float32 (K,): a token's loss is their sum over K targets (`mtp`, `prefix_loss`).
        `ngrams`: (B, T, D) of `ngram_rows`; by default the model looks them up itself.
        `classes`: int64 (P,), rows of the head that the softmax is over and targets are places in; None: all."""
        if window_blocks is None:
            window_blocks = schedule.validation_window_at(self.config.num_iterations, self.config)
        x_ND = self.hidden(tokens_BT, window_blocks, cache, ngrams).flatten(0, 1)
        cap = None if self.config.soft_cap == "none" else self.config.soft_cap
        if targets_BT is None:
            logits = softcapped_logits(x_ND, self.head_w, softcap=cap)[:, : self.config.vocab_size]
            return logits.view(*tokens_BT.shape, -1)
        fp8 = products.of_head(self.impls, self.config)
        how = dict(softcap=cap, reduction=reduction, fp8=fp8, impl=self.impls["loss"])
        targets = targets_BT.flatten()
        if target_weights is not None:
            targets = techniques.Targets.columns(targets_BT, len(target_weights), self.prefixes).flatten(0, 1)
        head_w = products.head(self.head_w, self.impls, classes)
        loss = linear_cross_entropy(x_ND, head_w, targets, target_weights=target_weights, **how)
        return loss.view_as(targets_BT) if reduction == "none" else loss


def flops_per_token(model: GPT) -> float:
    """Training FLOPs a token in matrix products, forward and backward: 6 a weight; attention not counted,
    and of the head the classes that are trained on (`sampled_softmax`)."""
    networks = [p for n, p in model.named_parameters() if "dynamic" in n or "head_mixing" in n]
    head = sampled_softmax.mean_share(model.config) * model.head_w.numel()
    return 6.0 * (sum(p.numel() for p in (*model.blocks.parameters(), *networks)) + head)


# ---- Optimizers ----------------------------------------------------------------------------------------------


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape and on the device of `like`; of a meta tensor, torch.zeros_like would import the compiler."""
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


class Muon:
    """Momentum, orthogonalised (Jordan et al. 2024), for the matrices of the blocks.

    A bfloat16 weight keeps its lower 16 mantissa bits beside it, so that the pair is a float32 master
    (@YouJiacheng); momentum is float32. Matrices of one shape are orthogonalised as one batch."""

    def __init__(self, named: dict[str, nn.Parameter], config: Config, impl: str):
        self.config, self.impl, self.named = config, impl, named
        self.dtype = getattr(torch, config.dtype)
        self.momentum = {name: zeros(p, torch.float32) for name, p in named.items()}
        halves = {n: p for n, p in named.items() if p.dtype == torch.bfloat16}
        self.mantissa = {n: zeros(p, torch.int16) for n, p in halves.items()}
        shapes: dict[tuple, list[str]] = {}
        for name in named:
            shapes.setdefault(tuple(sorted(named[name].shape[-2:])), []).append(name)
        self.groups = list(shapes.values())

    @torch.no_grad()
    def step(self, step: int) -> None:
        """One update from the `.grad` of every parameter; `step` sets learning rate and momentum."""
        c = self.config
        lr, momentum = c.muon_lr * schedule.learning_rate_factor(step, c), schedule.muon_momentum_at(step, c)
        for names in self.groups:
            updates = [momentum_(self.momentum[n], self.named[n].grad, momentum, impl=self.impl) for n in names]
            for name, update in zip(names, self.orthogonal(updates)):
                p = self.named[name]
                decay = c.muon_weight_decay * (2 if "mlp" in name else 1)
                scale = max(1, p.size(-2) / p.size(-1)) ** 0.5
                how = dict(lr=lr * scale, weight_decay=lr * decay, impl=self.impl)
                apply_update_(p, self.mantissa.get(name), update, **how)

    def orthogonal(self, updates: list[Tensor]) -> list[Tensor]:
        """Each update orthogonalised; tall matrices are turned so that one batch holds all of a group."""
        flat = [u.view(-1, *u.shape[-2:]) for u in updates]
        wide = [u.mT if u.size(-2) > u.size(-1) else u for u in flat]
        batch = torch.cat(wide) if len(wide) > 1 else wide[0]
        batch = orthogonalize(batch, coefficients=self.config.muon_coefficients, dtype=self.dtype, impl=self.impl)
        parts = batch.split([u.size(0) for u in flat])
        return [(o.mT if u.size(-2) > u.size(-1) else o).view_as(u) for o, u in zip(parts, updates)]

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; live, not copies."""
        momentum = {f"muon.momentum.{name}": t for name, t in self.momentum.items()}
        return momentum | {f"muon.mantissa.{name}": t for name, t in self.mantissa.items()}


class AdamW:
    """Adam without weight decay for the head, the embeddings and the scalars, with the run's learning-rate schedule.

    torch's own update, called as a function: the class around it would import torch's compiler, a second at
    every start."""

    def __init__(self, named: dict[str, nn.Parameter], config: Config):
        self.config, self.named = config, named
        c = config
        self.rates = {n: c.head_lr if n == "head_w" else c.scalar_lr if n == "scalars" else c.embed_lr for n in named}
        self.steps = {n: torch.zeros((), dtype=torch.float32, device=p.device) for n, p in named.items()}
        self.means, self.squares = ({n: zeros(p, p.dtype) for n, p in named.items()} for _ in range(2))

    @torch.no_grad()
    def step(self, step: int) -> None:
        """One update from the `.grad` of every parameter, which it takes away; `step` sets the learning rate."""
        c, factor = self.config, schedule.learning_rate_factor(step, self.config)
        how = dict(amsgrad=False, beta1=c.adam_beta1, beta2=c.adam_beta2, weight_decay=0.0, eps=1e-10, maximize=False)
        due = {n: p for n, p in self.named.items() if p.grad is not None}  # not a table whose layer has no attention
        for rate in {self.rates[n] for n in due}:
            names = [n for n in due if self.rates[n] == rate]
            state = ([kind[n] for n in names] for kind in (self.means, self.squares))
            given = [due[n] for n in names], [due[n].grad for n in names], *state, [], [self.steps[n] for n in names]
            adamw(*given, **how, lr=rate * factor, fused=True)
        for p in due.values():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; live, not copies."""
        kinds = dict(step=self.steps, exp_avg=self.means, exp_avg_sq=self.squares)
        return {f"adam.{key}.{n}": kind[n] for n in self.named for key, kind in kinds.items()}


class Trainer:
    """Model, optimizers and the gradients' way between processes: one object with one `step`."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        with device:
            self.model = GPT(config)
        self.model.at_step(0)
        positions = max(config.train_seq_len, config.val_seq_len) * (2 if config.paired_heads else 1)
        self.model.rotary(positions)  # kept, before anything is compiled
        self.world_size = world_size()
        matrices, tables, head, others = self.parameters()
        self.matrices = list(matrices.values())
        overlap = config.communication == "overlap" or (config.communication == "auto" and device.type == "cuda")
        exchange = GradientExchange if overlap and self.world_size > 1 else PlainExchange
        slow = [name for name in tables if config.adam_period and is_slow(name)]
        self.exchange = exchange(matrices, tables, head, others, self.model.pickers(tables), slow)
        self.model.impls |= self.exchange.early
        compiles = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
        mine = self.exchange.my_matrices, self.exchange.my_others
        self.muon, self.adam, self.average, self.ahead = self.optimizers(*mine, compiles)
        table = self.model.techniques and self.model.techniques.ngrams
        self.rows = RowExchange(table, config, device) if table else NoRows()
        self.exchange.cut = self.rows.cut
        self.norm: GradientNorm | None = None
        self.window = torch.zeros((), dtype=torch.int32, device=device)  # a tensor: growing it compiles nothing
        self.targets = techniques.Targets(config, self.model, device)  # and their weights, likewise
        how = dict(dynamic=False, fullgraph=True, options=compiler_options(config.tune))
        self.forward = torch.compile(self.model, **how) if compiles else self.model
        if self.world_size > 1:
            for p in self.model.parameters():
                dist.broadcast(as_bytes(p), 0)

    def parameters(self) -> tuple[dict[str, nn.Parameter], ...]:
        """The model's parameters by name: matrices of the blocks, embedding tables, head, scalars and all else."""
        kinds: dict[str, dict[str, nn.Parameter]] = dict(blocks={}, embed={}, head_w={}, scalars={})
        for name, p in ((name, p) for name, p in self.model.named_parameters() if p.requires_grad):
            gates = "_gates" in name and "dynamic" not in name and self.config.gate_optimizer == "muon"
            kinds["blocks" if gates else next((kind for kind in kinds if kind in name), "scalars")][name] = p
        return tuple(kinds.values())

    def optimizers(self, matrices: dict, others: dict, compiled: bool = False):
        """(of matrices, of all else, average of the weights, way ahead of them): Muon and AdamW, or those of
        trainer/normuon.py and trainer/adam.py where a field asks for them; None, or trainer/averages.py's; likewise."""
        c, impl = self.config, self.model.impls["muon"]
        kind = MatrixAdamW if c.matrix_optimizer == "adamw" else NorMuon if c.normuon_beta2 else Muon
        muon = kind(matrices, c, impl)
        other = Adam(others, c, self.exchange, compiled) if techniques.own_adam(c) else AdamW(others, c)
        ahead = Ahead(c, matrices, others, muon.mantissa) if c.ema_nesterov else None
        return muon, other, TailAverage(c, matrices, others, muon.mantissa) if c.tail_ema else None, ahead

    def state(self) -> dict[str, Tensor]:
        """All that training changes and that this process holds: parameters, its share of the optimizers' state; by
        name, live, not copies."""
        self.exchange.wait_weights()
        parameters = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        parts = self.muon, self.adam, self.average, self.ahead, self.rows
        return parameters | {n: t for part in parts if part is not None for n, t in part.state().items()}

    def layout(self) -> dict[str, Tensor]:
        """Shapes and types of all processes' state together, as tensors without memory."""
        matrices, *others = [{n: nn.Parameter(p.to("meta")) for n, p in kind.items()} for kind in self.parameters()]
        named = {n: p for kind in others for n, p in kind.items()}
        parameters = {f"model.{n}": p.detach().to("meta") for n, p in self.model.named_parameters()}
        states = [part.state() for part in self.optimizers(matrices, named) if part is not None]
        return {name: t for state in (parameters, *states, self.rows.layout()) for name, t in state.items()}

    def whole_state(self) -> dict[str, Tensor]:
        """On rank 0 all processes' state together, elsewhere nothing. Collective."""
        return gather_state(self.exchange, self.state(), self.layout())

    def load(self, whole: dict[str, Tensor], layout: dict[str, Tensor]) -> None:
        """Put rank 0's `whole` (as `whole_state` names it) in place on every process; layout: all of `layout()`, or the
        part of it that is to be loaded. Collective."""
        spread_state(self.exchange, self.state(), layout, whole)

    def set_window(self, step: int, window_at: Callable[[int, Config], int] = schedule.window_blocks_at) -> None:
        self.window.fill_(window_at(step, self.config))
        self.model.at_step(step)

    def step(self, step: int, batches) -> Tensor:
        """Accumulate gradients over this process's (inputs_T, targets_T) on the host, then update. Returns their
        mean loss, detached."""
        sequences = schedule.sequences(self.config)
        self.set_window(step)
        self.exchange.wait_weights()
        due = dict(others=schedule.adam_steps(step, self.config), slow=schedule.tables_step(step, self.config))
        self.exchange.begin([inputs_T for inputs_T, _ in batches], **due)
        losses, how = [], self.targets.at(step)
        for number, batch in enumerate(batches, 1):
            batch, sampled = self.targets.sampled(step, rank() + (number - 1) * self.world_size, batch)
            inputs_T, targets_T = to_device(batch, self.device)
            how |= self.rows.fetch(batch[0]) | sampled
            loss = self.forward(inputs_T[None], targets_T[None], window_blocks=self.window, **how)
            if number == len(batches):
                self.exchange.arm()
            (loss / sequences).backward()
            self.rows.collect()
            losses.append(loss.detach() / len(inputs_T) if self.config.loss_sum else loss.detach())
        self.update(step)
        if self.average is not None:
            self.average.take(step, self.exchange)
        return torch.stack(losses).mean()

    def update(self, step: int) -> None:
        """Update the matrices, and on steps of `adam_every` all else, on the gradients since its last time."""
        self.exchange.wait_matrices()  # sums: each process has already divided by the sequences of the whole step
        if self.norm:
            self.norm.add(self.exchange.my_matrices)
        self.muon.step(step)
        if self.ahead is not None:
            self.ahead.after(step, self.exchange.my_matrices)
        self.exchange.publish_matrices()
        if not schedule.adam_steps(step, self.config):
            for p in self.matrices:
                p.grad = None
            return
        self.exchange.wait_others()
        waiting = waiting_at(step, self.exchange.my_others, self.config)
        updated = {name: p for name, p in self.exchange.my_others.items() if name not in waiting}
        if self.norm:
            self.norm.add(updated)
        self.adam.step(step)
        if self.ahead is not None:
            self.ahead.after(step, updated)
        self.exchange.publish_head()
        self.rows.step(step, self.norm)
        for name, p in self.model.named_parameters():
            p.grad = p.grad if name in waiting else None
        if step <= schedule.split_step(self.config):
            self.exchange.wait_weights()
            self.adam.follow(step, self.model.head_w, self.model.embed1.weight)


# ---- Data and evaluation -------------------------------------------------------------------------------------


@torch.no_grad()
def validate(trainer: Trainer, stream: TokenStream, step: int, ends: Callable[[], int] = lambda: 0) -> float | None:
    """Mean loss in nats per token over the validation tokens, with its window after `step`; equal on all ranks.

    ends: asked before each sequence, by all ranks; at a yes the validation is given up, and None returned."""
    c = trainer.config
    trainer.set_window(step, schedule.validation_window_at)
    trainer.exchange.wait_weights()
    total = torch.zeros((), dtype=torch.float64, device=trainer.device)
    count = c.val_tokens // c.val_seq_len
    mine = range(rank(), count, trainer.world_size)
    batches = stream.prefetch(((0, number) for number in mine), pin_memory=trainer.device.type == "cuda")
    for turn in range(-(-count // trainer.world_size)):
        if ends():
            batches.close()
            return None
        if turn == len(mine):  # others have a sequence more and ask for its rows
            trainer.rows.fetch(torch.zeros(0))
            continue
        batch = next(batches)
        inputs_T, targets_T = to_device(batch, trainer.device)
        how = trainer.rows.fetch(batch[0])
        total += trainer.forward(inputs_T[None], targets_T[None], window_blocks=trainer.window, **how)
    if trainer.world_size > 1:
        dist.all_reduce(total)
    return total.item() / count


# ---- The run -------------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = "train_gpt-1"  # parameters and optimizer state, with the configuration in the header


def checkpoint_config(path: str | Path, told: dict[str, str]) -> Config:
    """The configuration in a checkpoint's header. Raises CheckpointError."""
    try:
        return check_config(from_json(Config, told["config"]))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration makes no sense ({error})") from error


def load_model(path: str | Path, device: str = "cpu") -> tuple[GPT, Config]:
    """The model of a checkpoint, in evaluation mode, and its configuration. Raises CheckpointError."""
    told, tensors = checkpoints.load_tensors(path, CHECKPOINT_FORMAT)
    config = dataclasses.replace(checkpoint_config(path, told), device=torch.device(device).type)
    if config.num_layers > len(tensors):
        raise CheckpointError(f"{path}: {config.num_layers} layers by its configuration, {len(tensors)} tensors")
    try:
        with checkpoints.WithoutValues(), torch.device("meta"):
            model = GPT(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond all bounds
        raise CheckpointError(f"{path}: its configuration makes no sense ({error})") from error
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    checkpoints.check_tensors(path, weights, model.state_dict())
    model.load_state_dict(weights, strict=False, assign=True)
    model.to(device).eval().at_step(checkpoints.step_of(path, told, config.num_iterations))
    return model, config


def set_up(config: Config) -> torch.device:
    """Choose this process's device and join the group that torchrun describes, if it does. Raises UsageError."""
    c = config
    device = processes.choose_device(c.device, c.deterministic)
    width, dtype = c.model_dim // c.num_heads, getattr(torch, c.dtype)
    implementations.check_device(c.kernels, width, device, dtype)
    processes.join_group(device, c.patience)
    return device


def resume(trainer: Trainer, log: RunLog, folder: Path, record: TokenRecord, val_stream: TokenStream) -> Done:
    """Load the checkpoint that `--resume` asks for; returns how far its run had come. Raises CheckpointError.

    Only rank 0 reads it: other hosts need not see its disk. Everyone reads its share of the tokens of those steps."""
    c, tensors = trainer.config, {}
    if not c.resume:
        return Done()
    layout, find = trainer.layout(), lambda: checkpoints.find_run(c.resume, folder, CHECKPOINT_FORMAT)
    config_of = lambda *told: _decisive(checkpoint_config(*told))  # noqa: E731
    done, told = on_rank_0(lambda: checkpoints.read_run(find(), _decisive(c), config_of, layout, tensors))
    if told:
        check_same_data(told, done.step, record, val_stream, log.environment["hashes"]["val_data_hash"])
    on_rank_0(lambda: log.cut_back_to(done.step if told else -1))
    if told:
        trainer.load(tensors, layout)
    return done


class Stretch:
    """The timed run: what its steps share. `saved`: the last step that a checkpoint of it has, or 0."""

    def __init__(self, trainer: Trainer, log: RunLog, streams: tuple[TokenStream, TokenStream], ceiling: float):
        self.trainer, self.config, self.log = trainer, trainer.config, log
        self.stream, self.val_stream = streams
        self.folder = log.folder / f"{log.name}.checkpoints"
        self.clock, self.record = Clock(trainer.device), TokenRecord(self.stream, self.val_stream, log.line)
        done = resume(trainer, log, self.folder, self.record, self.val_stream)
        self.start = self.saved = done.step
        self.clock.seconds, log.validation[:], log.train_losses[:] = done.seconds, done.validation, done.losses
        c, flops = self.config, flops_per_token(trainer.model)
        self.watch = Watch(c, log, trainer, self.start, self.clock)
        tokens = lambda step: schedule.tokens_until(step, c)  # noqa: E731
        self.progress = Progress(c.num_iterations, self.start, tokens, flops, ceiling, shows=rank() == 0)

    def train(self, stop: StopRequest) -> int:
        """Train to the end, or until a signal stops it. Returns that signal, or 0."""
        c, trainer = self.config, self.trainer
        mine = schedule.my_sequences(c, rank(), trainer.world_size)
        end = max(self.start, schedule.last_step(c))
        order = ((step, sequence) for step in range(self.start, end) for sequence in mine)
        pin_memory = trainer.device.type == "cuda"
        batches = self.stream.prefetch(order, record=self.record, pin_memory=pin_memory)
        self.clock.start()
        try:
            for step in range(self.start, end + 1):
                last = step == end
                heard = stop.heard if step % schedule.whole_steps(c) == 0 else lambda: 0  # at others a gradient waits
                if not (asked := heard()) and (last or (c.val_loss_every and step % c.val_loss_every == 0)):
                    asked = self.validate(step, heard)
                if asked or (last and c.save_final) or (c.checkpoint_every and step % c.checkpoint_every == 0):
                    self.save(step)
                if asked or last:
                    break
                self.watch.before(step)
                self.told(step + 1, trainer.step(step, [next(batches) for _ in mine]))
        finally:
            self.progress.close()
            self.watch.close()
            batches.close()
        self.clock.stop()
        return asked

    def validate(self, step: int, heard: Callable[[], int]) -> int:
        """Validate after `step` steps, unless a resumed run has it already; the clock stands still meanwhile.

        Returns the signal for which the validation was given up, or 0; the run that goes on makes it anew."""
        if any(point["step"] == step for point in self.log.validation):
            return 0
        elapsed = self.clock.stop()
        loss = validate(self.trainer, self.val_stream, step, heard)
        if loss is not None:
            self.record.advance(step)
            loss = checkpoints.finite(loss, f"validation loss after step {step}")
            self.log.validated(step, elapsed, loss, **self.record.told())
            self.log.summary("running")
        self.clock.start()
        return heard() if loss is None else 0

    def save(self, step: int) -> None:
        """A checkpoint after `step` steps, unless there is one."""
        if step > self.saved:
            self.clock.stop()
            self.record.advance(step)
            c, log, state = self.config, self.log, self.trainer.whole_state()
            told = dict(format=CHECKPOINT_FORMAT, config=json.dumps(dataclasses.asdict(c)), run_name=log.name)
            told |= Done(step, self.clock.seconds, log.validation, log.train_losses).texts() | log.environment["hashes"]
            told |= {name: str(value) for name, value in self.record.told().items()}
            path = on_rank_0(lambda: checkpoints.save_run(self.folder, step, state, told, c.keep_checkpoints))
            log.line(f"checkpoint:{step} {self.folder.name}/{path.name}", echo=False)
            self.saved = step
            self.clock.start()

    def told(self, step: int, loss: Tensor) -> None:
        """Log step number `step`, from 1."""
        shown = None
        if self.config.log_train_loss:
            shown = checkpoints.finite(processes.mean_over_ranks(loss), f"training loss at step {step}")
        c, before = self.config, step - 1
        lr = c.muon_lr * schedule.learning_rate_factor(before, c)
        window = schedule.window_blocks_at(before, c) * c.block_tokens
        self.log.trained(step, self.clock.read(), shown, **self.watch.words(lr, window))
        self.progress.update(step, self.clock.read(), loss)


def run(config: Config) -> int:
    """Everything from set-up to the report. Returns the exit code; errors are raised after they are logged."""
    if config.dry_run:
        print(schedule.table(config))
        return 0
    stop = StopRequest()
    device = set_up(config)
    config = on_rank_0(lambda: with_all_validation(config))  # files that it was read from may be on one host only
    asked, length = config, processes.sequence_length_for(world_size(), config.tokens_per_step, config.train_seq_len)
    config = check_config(dataclasses.replace(config, train_seq_len=length))
    streams = open_streams(config)
    trainer = Trainer(config, device)
    log = report.open_log(config, trainer, streams, __file__, SOURCE, config_hash(config))
    stop.at_once = lambda: log.summary("interrupted")
    with log.failure_told():
        if config != asked:
            log.line(processes.cut_sequences_note(trainer.world_size, asked.train_seq_len, config.train_seq_len))
        log.summary("running")
        ceiling = matmul_ceiling(device, getattr(torch, config.dtype), trainer.world_size)
        start_from(trainer, log, CHECKPOINT_FORMAT)
        warm_up(trainer, stop)
        stretch = Stretch(trainer, log, streams, ceiling)
        signal_number = stretch.train(stop)
        report.report(log, config, device, signal_number, stretch.saved)
    return 128 + signal_number if signal_number else 0


EXIT_CODES = {UsageError: 2, ShardError: 3, CheckpointError: 3, NonFinite: 4, OSError: 5}
COMMANDS = {"sample": sample.sample_command, "evaluate": evaluate.evaluate_command, "export": export.export_command}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code of the module's docstring."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with processes.exit_code(EXIT_CODES) as ended:
        if arguments and arguments[0] in COMMANDS:
            ended.code = COMMANDS[arguments[0]](arguments[1:], load_model)
        elif arguments[:1] == ["explain"]:
            ended.code = explain_command(arguments[1:], Config, PRESETS)
        elif wants_help(arguments):
            print(__doc__, help_text(Config, PRESETS, beside="nano"), sep="\n")
        else:
            ended.code = run(parse_config(arguments))
    return ended.code


if __name__ == "__main__":
    sys.exit(main())
