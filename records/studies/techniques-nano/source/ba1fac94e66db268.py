"""Train a GPT to a target validation loss, as fast as the machine allows, and leave evidence that holds.

Contract of the `medium` preset: a 350M-class GPT with two input embeddings reaches 2.92 validation loss on
FineWeb within 5690 steps of 524,288 tokens on 8 GPUs. The same file and the same code path train the `nano`
preset (about 0.2M parameters, bytes) on a laptop. What has been measured, where, and how often: README.md.

    torchrun --nproc_per_node=8 train_gpt.py                      # medium; 1, 2, 4 or 8 processes train alike
    python train_gpt.py --preset=nano --seed=1                    # one process, no GPU needed
    python train_gpt.py --help                                    # every field with its unit
    python train_gpt.py sample CHECKPOINT --prompt "Once upon"    # text from what was trained

Exit codes: 0 trained; 2 usage; 3 bad data or checkpoint; 4 non-finite loss; 5 input or output failed (disk
full, read-only folder); 130 or 143 stopped by SIGINT or SIGTERM, after a checkpoint.

Credits. The track, its protocol (the log embeds the code, warm up and reset, stop the clock for validation)
and most techniques are the modded-nanogpt community's (https://github.com/KellerJordan/modded-nanogpt):
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), value embeddings and U-net skips
(@Grad62304977, @KoszarskyB, @brendanh0gan), the second input embedding and the sliding-window schedule of the
medium track. Ideas are theirs; the lines are ours, and other credits stand where an idea enters.
"""

import os
import sys
from pathlib import Path

SOURCE = Path(__file__).read_text()  # read before anything can change it: the log embeds what really runs

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import re
import signal
import uuid

from trainer.threads import bound_spinning

bound_spinning()  # what OpenMP reads when torch loads it

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.shards import ShardError, TokenStream
from kernels.attention import attention, attention_inputs, attention_plan
from kernels.attention import implementation as attention_implementation
from kernels.cross_entropy import linear_cross_entropy, softcapped_logits
from kernels.mlp import relu_squared_mlp
from kernels.muon import apply_update_, momentum_, orthogonalize
from kernels.norm import rms_norm as norm
from kernels.residual import residual_mix
from trainer.checkpoints import CheckpointError, checkpoints_of, load_tensors, newest_whole, save_tensors
from trainer.exchange import GradientExchange, PlainExchange
from trainer.log import Clock, Progress, RunLog, now, say
from trainer.options import UsageError, help_text, parse_options, setting
from trainer.processes import StopRequest, agree, join_group, on_rank_0, rank, world_size
from trainer.program import describe_environment, matmul_ceiling

# Dimension key. B batch (1 in training: one packed sequence), T time, D model width, H heads, Dh head width,
# F hidden width of the MLP, V vocabulary (padded where the head is concerned), L layers, N tokens (B * T).

# -------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes; the defaults are the `medium` preset."""

    preset: str = setting("medium", "name", "table row of PRESETS that the other fields start from")
    # Data
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "glob", "training shards, or 'embedded'")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "glob", "validation shards, or 'embedded'")
    vocab_size: int = setting(50257, "tokens", "token ids are below this; the head pads it up to 128s")
    eos_id: int = setting(50256, "token", "opens every document")
    drop_shard_tail: bool = setting(False, "flag", "skip each shard's last incomplete step, as the public code")
    # Length of the run
    num_iterations: int = setting(5690, "steps", "optimizer steps")
    tokens_per_step: int = setting(524288, "tokens", "over all processes; split into packed sequences")
    train_seq_len: int = setting(65536, "tokens", "packed training sequence; smaller for smaller GPUs")
    val_seq_len: int = setting(262144, "tokens", "packed validation sequence")
    val_tokens: int = setting(10485760, "tokens", "validation tokens, from the start of the shard")
    val_loss_every: int = setting(125, "steps", "between validations; 0: only at the end")
    cooldown_frac: float = setting(0.7, "fraction", "of the run, at its end, with the learning rate falling to 0")
    warmup_steps: int = setting(10, "steps", "compile and warm up before the clock, then reset all state")
    target_loss: float = setting(2.92, "nats", "the loss that a series of runs is judged against")
    # Model
    num_layers: int = setting(16, "layers", "blocks of attention and MLP")
    model_dim: int = setting(1024, "width", "D")
    num_heads: int = setting(8, "heads", "H; the head width is D / H")
    mlp_ratio: int = setting(4, "ratio", "hidden width of the MLP over D")
    attention_scale: float = setting(0.12, "factor", "on the logits of attention")
    soft_cap: str = setting("rsqrt", "name", "on the head's logits: rsqrt, sigmoid or none")
    second_input_embedding: bool = setting(True, "flag", "a second embedding table mixed into every layer")
    value_embeddings: int = setting(5, "tables", "added to the values of the first and last so many layers; 0: off")
    unet_skips: str = setting("6>9,4>10,2>11", "layers", "output of the first added on entering the second; '': off")
    attention_free_layers: str = setting("7", "layers", "with an MLP only; '': none")
    half_truncated_rotary: bool = setting(True, "flag", "half of the rotary frequencies are zero")
    # Attention windows
    block_tokens: int = setting(128, "tokens", "windows are counted in blocks of this many")
    window_max_tokens: int = setting(3456, "tokens", "the long window at the end of the run")
    long_window_layers: str = setting("0,4,11,15", "layers", "with the long window; the others have half of it")
    growing_window: bool = setting(True, "flag", "the window grows along a cubic; off: full size from the start")
    window_growth_frac: float = setting(1.0, "fraction", "of the run, at its start, in which the window grows")
    # Optimizers
    head_lr: float = setting(1 / 320, "rate", "AdamW, output head")
    embed_lr: float = setting(0.3, "rate", "AdamW, all embedding tables")
    scalar_lr: float = setting(0.015, "rate", "AdamW, skip weights and lambdas")
    adam_beta1: float = setting(0.8, "factor", "AdamW")
    adam_beta2: float = setting(0.95, "factor", "AdamW")
    muon_lr: float = setting(0.025, "rate", "Muon, matrices of the blocks")
    muon_weight_decay: float = setting(0.01, "rate", "times the learning rate; doubled for the MLP")
    muon_momentum: float = setting(0.95, "factor", "after its warm-up from 0.85")
    muon_momentum_warmup: int = setting(300, "steps", "over which the momentum grows")
    muon_coefficients: str = setting("spec", "name", "of the orthogonalisation: spec or polar_express")
    # Machine
    seed: int = setting(0, "number", "of the initial weights; the data order does not depend on it")
    dtype: str = setting("bfloat16", "name", "of activations, embeddings and block weights: bfloat16 or float32")
    device: str = setting("auto", "name", "auto, cuda or cpu")
    compile: str = setting("auto", "name", "torch.compile: auto (on GPUs), on or off")
    kernels: str = setting("auto", "name", "auto, triton or reference (FlexAttention and eager loss on GPUs)")
    communication: str = setting("auto", "name", "of gradients: plain, overlap, or auto: overlap on several GPUs")
    deterministic: bool = setting(False, "flag", "ask torch for bitwise repeatable algorithms (slower on GPUs)")
    # Output
    output_dir: str = setting("local/runs", "folder", "for the log, its JSON and the checkpoints")
    run_name: str = setting("", "name", "of the log; '': preset, time and a random suffix")
    log_train_loss: bool = setting(False, "flag", "training loss in every step's line (waits for the GPU)")
    checkpoint_every: int = setting(0, "steps", "between checkpoints; 0: only at the end or when stopped")
    keep_checkpoints: int = setting(2, "files", "newest so many stay; 0: all")
    save_final: bool = setting(True, "flag", "checkpoint at the end of the run")
    resume: str = setting("", "name", "'auto': from this run's newest good checkpoint; or a checkpoint's path")
    overwrite: bool = setting(False, "flag", "replace an existing run of the same name")
    plan_hash: str = setting("", "hash", "of the statistical plan that the run belongs to")
    data_dir: str = setting("", "folder", "for the embedded corpus; '': a cache folder beside this file")


# What a run computes does not depend on these, so a checkpoint may be resumed with others.
_RUN_FIELDS = frozenset(
    "output_dir run_name checkpoint_every keep_checkpoints save_final resume overwrite plan_hash data_dir "
    "device compile kernels communication log_train_loss deterministic warmup_steps".split()
)

# fmt: off
PRESETS: dict[str, dict] = {
    # The reference run of the medium track, second input embedding.
    "medium": {},
    # The 124M class on the same data: 12 layers of 768.
    "small": dict(
        num_layers=12, model_dim=768, num_heads=6, num_iterations=3000, target_loss=3.28,
        value_embeddings=3, unet_skips="4>7,2>8,1>9", attention_free_layers="", long_window_layers="0,3,8,11",
    ),
    # The same architecture at 0.2M parameters on bytes, for a laptop without a GPU.
    "nano": dict(
        train_files="embedded", val_files="embedded", vocab_size=256, eos_id=0,
        num_iterations=700, tokens_per_step=1024, train_seq_len=1024, val_seq_len=8192, val_tokens=65536,
        val_loss_every=100, target_loss=0.7,
        num_layers=4, model_dim=64, num_heads=2, value_embeddings=1, unet_skips="1>3", attention_free_layers="",
        attention_scale=0.4,  # the medium preset's bound on logits, scale times head width, a little lower
        block_tokens=32, window_max_tokens=256, long_window_layers="0,3",
        window_growth_frac=0.6,  # later, the learning rate is too low to learn the new distances (docs/LOG.md)
        embed_lr=0.1, head_lr=0.01, muon_momentum=0.9, muon_momentum_warmup=100, dtype="float32", log_train_loss=True,
    ),
}
# fmt: on


def parse_config(arguments: list[str]) -> Config:
    """Config from `--field=value` (or `--field value`; a bare `--flag` is true). Raises UsageError."""
    return check_config(parse_options(Config, PRESETS, arguments, bare={"resume": "auto"}))


def _layers(text: str) -> frozenset[int]:
    return frozenset(int(number) for number in text.split(",") if number.strip())


def _skips(text: str) -> dict[int, int]:
    """{layer entered: layer whose output is added} from '6>9,4>10'."""
    pairs = [pair.split(">") for pair in text.split(",") if pair.strip() and text.strip() != "none"]
    return {int(target): int(source) for source, target in pairs}


def check_config(config: Config) -> Config:
    """`config` itself, or UsageError that names the field at fault and what it must be."""
    c = config
    positive = (
        "vocab_size num_iterations tokens_per_step train_seq_len val_seq_len val_tokens num_layers model_dim "
        "num_heads mlp_ratio block_tokens window_max_tokens"
    )
    for name in positive.split():
        if not 1 <= getattr(c, name) < 2**31:
            raise UsageError(f"--{name}={getattr(c, name)}: at least 1, below 2^31")
    if c.attention_scale <= 0:
        raise UsageError(f"--attention_scale={c.attention_scale}: above 0")
    for name in ("val_loss_every", "warmup_steps", "checkpoint_every", "keep_checkpoints", "muon_momentum_warmup"):
        if getattr(c, name) < 0:
            raise UsageError(f"--{name}={getattr(c, name)}: at least 0")
    choices = {
        "dtype": ("bfloat16", "float32"),
        "device": ("auto", "cuda", "cpu"),
        "compile": ("auto", "on", "off"),
        "kernels": ("auto", "triton", "reference"),
        "soft_cap": ("rsqrt", "sigmoid", "none"),
        "communication": ("auto", "plain", "overlap"),
        "muon_coefficients": ("spec", "polar_express"),
    }
    for name, allowed in choices.items():
        if getattr(c, name) not in allowed:
            raise UsageError(f"--{name}={getattr(c, name)}: one of {', '.join(allowed)}")
    divisors = dict(train_seq_len="tokens_per_step", val_seq_len="val_tokens", num_heads="model_dim")
    for small, large in divisors.items():
        if getattr(c, large) % getattr(c, small):
            raise UsageError(f"--{large}={getattr(c, large)} is not a multiple of --{small}={getattr(c, small)}")
    if (c.model_dim // c.num_heads) % 4:
        raise UsageError(f"--model_dim / --num_heads = {c.model_dim // c.num_heads}: rotary needs a multiple of 4")
    if not 0 <= c.eos_id < c.vocab_size:
        raise UsageError(f"--eos_id={c.eos_id} is not below --vocab_size={c.vocab_size}")
    for name in ("cooldown_frac", "window_growth_frac"):
        if not 0 < getattr(c, name) <= 1:
            raise UsageError(f"--{name}={getattr(c, name)}: above 0 and at most 1")
    if not 0 <= 2 * c.value_embeddings <= c.num_layers:
        raise UsageError(f"--value_embeddings={c.value_embeddings}: from 0 to half of --num_layers={c.num_layers}")
    try:
        skips = _skips(c.unet_skips)
        named = _layers(c.attention_free_layers) | _layers(c.long_window_layers) | skips.keys() | set(skips.values())
    except ValueError:
        raise UsageError("--unet_skips is written 6>9,4>10 and the layer lists 0,4,11") from None
    if any(not 0 <= layer < c.num_layers for layer in named):
        raise UsageError(f"a layer list names layer {max(named)}, but there are only --num_layers={c.num_layers}")
    if any(source >= target for target, source in skips.items()):
        raise UsageError(f"--unet_skips={c.unet_skips}: a skip leads from an earlier to a later layer")
    if c.run_name != Path(c.run_name).name or c.run_name.startswith("."):
        raise UsageError(f"--run_name={c.run_name}: a plain file name, no folder")
    return config


def config_hash(config: Config) -> str:
    """sha256 over the fields that decide what a run computes, the seed left out: one hash a series."""
    told = {k: v for k, v in dataclasses.asdict(config).items() if k not in _RUN_FIELDS and k != "seed"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------
# Schedules. Each is a pure function of the step.


def learning_rate_factor(step: int, config: Config) -> float:
    """1 until the cooldown starts, then linearly to 0 at the end of the run."""
    remaining = 1 - step / config.num_iterations
    return min(1.0, remaining / config.cooldown_frac)


def window_blocks_at(step: int, config: Config) -> int:
    """The long window in blocks: window_max_tokens along the cubic 4x^3 - 6x^2 + 3x, which is steep at both ends
    and flat in the middle of its growth, rounded up to whole blocks; at least one."""
    x = min(step / (config.window_growth_frac * config.num_iterations), 1.0)
    factor = 4 * x**3 - 6 * x**2 + 3 * x if config.growing_window else 1.0
    return max(1, math.ceil(factor * config.window_max_tokens / config.block_tokens))


def muon_momentum_at(step: int, config: Config) -> float:
    """From 0.85 linearly to `muon_momentum` over the warm-up."""
    fraction = min(step / max(config.muon_momentum_warmup, 1), 1.0)
    return (1 - fraction) * 0.85 + fraction * config.muon_momentum


# -------------------------------------------------------------------------------------------------------------
# Model


def next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def rotary_tables(length: int, head_dim: int, truncate_half: bool, device) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 (length, head_dim / 2), for positions 0..length-1.

    Half-truncated rotary (@YouJiacheng): the lower half of the frequencies is (1/1024)^u, u from 0 to 1, the
    other half zero, so that half of each head carries no position."""
    rotating = head_dim // 4 if truncate_half else head_dim // 2
    frequencies = (1 / 1024) ** torch.linspace(0, 1, steps=rotating, dtype=torch.float32, device=device)
    frequencies = torch.cat([frequencies, frequencies.new_zeros(head_dim // 2 - rotating)])
    angles_TR = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles_TR.cos(), angles_TR.sin()


class Block(nn.Module):
    """Residual mix, attention (if the layer has it), MLP."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        c, dtype = config, getattr(torch, config.dtype)
        hidden = c.mlp_ratio * c.model_dim
        self.config, self.layer = c, layer
        self.long_window = layer in _layers(c.long_window_layers)
        self.has_attention = layer not in _layers(c.attention_free_layers)
        if self.has_attention:  # Q, K, V and O in one tensor: one Muon batch
            self.qkvo_w = nn.Parameter(torch.empty(4, c.model_dim, c.model_dim, dtype=dtype))
        self.mlp_in_w = nn.Parameter(torch.empty(hidden, c.model_dim, dtype=dtype))
        self.mlp_out_w = nn.Parameter(torch.empty(c.model_dim, hidden, dtype=dtype))

    def reset_parameters(self) -> None:
        """Uniform with half of the usual standard deviation; what writes to the residual stream starts at zero."""
        bound = 3**0.5 * 0.5 * self.config.model_dim**-0.5
        if self.has_attention:
            self.qkvo_w[:3].uniform_(-bound, bound)
            self.qkvo_w[3].zero_()
        self.mlp_in_w.uniform_(-bound, bound)
        self.mlp_out_w.zero_()

    def forward(self, x_BTD, x00_BTD, x01_BTD, ve_BTD, lambdas_3, attention_lambdas_2, plan, rotary, impls):
        if x01_BTD is None:
            x_BTD = lambdas_3[0] * x_BTD + lambdas_3[1] * x00_BTD
        else:
            x_BTD = residual_mix(x_BTD, x00_BTD, x01_BTD, lambdas_3, impl=impls["residual"])
        if self.has_attention:
            x_BTD = x_BTD + self.attend(x_BTD, ve_BTD, attention_lambdas_2, plan, rotary, impls)
        h_ND = norm(x_BTD).flatten(0, 1)
        y_ND = relu_squared_mlp(h_ND, self.mlp_in_w, self.mlp_out_w, impl=impls["mlp"])
        return x_BTD + y_ND.view_as(x_BTD)

    def attend(self, x_BTD, ve_BTD, lambdas_2, plan, rotary, impls):
        """Attention over normed queries, keys and values; the values are mixed with an embedding of the token."""
        (B, T, D), H = x_BTD.shape, self.config.num_heads
        qkv = F.linear(x_BTD, self.qkvo_w[:3].flatten(0, 1)).view(B, T, 3 * H, D // H)
        q_BTHDh, k_BTHDh, v_BTHDh = qkv.chunk(3, dim=2)
        ve_BTHDh = None if ve_BTD is None else ve_BTD.view(B, T, H, D // H)
        q, k, v = attention_inputs(
            q_BTHDh, k_BTHDh, v_BTHDh, ve_BTHDh, lambdas_2, *rotary, impl=impls["attention_inputs"]
        )
        y_BTHDh = attention(q, k, v, plan, scale=self.config.attention_scale, impl=impls["attention"])
        return F.linear(y_BTHDh.reshape(B, T, D), self.qkvo_w[3])


class GPT(nn.Module):
    """The model of SPEC: two input embeddings mixed into every layer, value embeddings, U-net skips.

    All learned scalars live in one float32 vector: L skip weights, then L x 3 residual lambdas (stream, first
    and second embedding), then L x 2 attention lambdas (value, value embedding)."""

    def __init__(self, config: Config):
        super().__init__()
        c, dtype = config, getattr(torch, config.dtype)
        self.config = c
        self.skips = _skips(c.unet_skips)
        self.embed1 = nn.Embedding(c.vocab_size, c.model_dim, dtype=dtype)
        self.embed2 = nn.Embedding(c.vocab_size, c.model_dim, dtype=dtype) if c.second_input_embedding else None
        tables = [nn.Embedding(c.vocab_size, c.model_dim, dtype=dtype) for _ in range(c.value_embeddings)]
        self.value_embeds = nn.ModuleList(tables)
        self.blocks = nn.ModuleList([Block(c, layer) for layer in range(c.num_layers)])
        # A multiple of 128 keeps the product's tiles whole. The padding classes take part in the softmax.
        self.head_w = nn.Parameter(torch.empty(next_multiple(c.vocab_size, 128), c.model_dim, dtype=torch.float32))
        self.scalars = nn.Parameter(torch.empty(c.num_layers * 6, dtype=torch.float32))
        self.impls = implementations(c)
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values, drawn from torch's generator of the parameters' device in the order of construction."""
        for table in (self.embed1, self.embed2, *self.value_embeds):
            if table is not None:
                table.weight.normal_()
        for block in self.blocks:
            block.reset_parameters()
        self.head_w.zero_()
        L = self.config.num_layers
        initial = torch.cat([torch.ones(L), torch.tensor([1.0, 0, 0] * L), torch.tensor([0.5, 0.5] * L)])
        self.scalars.copy_(initial.to(self.scalars.device))

    def prepare(self, length: int) -> None:
        """Make rotary tables for sequences up to `length` tokens (outside of any compiled graph)."""
        device = self.head_w.device
        if self.rotary is None or self.rotary[0].size(0) < length or self.rotary[0].device != device:
            c = self.config
            self.rotary = rotary_tables(length, c.model_dim // c.num_heads, c.half_truncated_rotary, device)

    def hidden(self, tokens_BT: Tensor, window_blocks) -> Tensor:
        """Final hidden states, normed: (B, T, D)."""
        c, L = self.config, self.config.num_layers
        T = tokens_BT.size(1)
        rotary = (self.rotary[0][:T], self.rotary[1][:T])
        mask = dict(eos_id=c.eos_id, block_tokens=c.block_tokens)
        plan_long = attention_plan(tokens_BT, window_blocks=window_blocks, **mask)
        plan_short = attention_plan(tokens_BT, window_blocks=window_blocks // 2, **mask)
        skip_w_L, lambdas_L3, attention_lambdas_L2 = self.scalars.split([L, 3 * L, 2 * L])
        lambdas_L3, attention_lambdas_L2 = lambdas_L3.view(L, 3), attention_lambdas_L2.view(L, 2)

        x00_BTD = norm(self.embed1(tokens_BT))
        x01_BTD = None if self.embed2 is None else norm(self.embed2(tokens_BT))
        tables = [table(tokens_BT) for table in self.value_embeds]
        values = dict(enumerate(tables)) | {L - len(tables) + i: ve for i, ve in enumerate(tables)}
        x_BTD, outputs = x00_BTD, {}
        for layer, block in enumerate(self.blocks):
            if layer in self.skips:
                x_BTD = x_BTD + skip_w_L[layer] * outputs[self.skips[layer]]
            plan = plan_long if block.long_window else plan_short
            scalars = lambdas_L3[layer], attention_lambdas_L2[layer]
            x_BTD = block(x_BTD, x00_BTD, x01_BTD, values.get(layer), *scalars, plan, rotary, self.impls)
            if layer in self.skips.values():
                outputs[layer] = x_BTD
        return norm(x_BTD)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, window_blocks=None, reduction="mean"):
        """Cross-entropy in nats per token if targets are given, else float32 logits (B, T, V).

        `window_blocks`: the long window, an int or a 0-d int tensor; by default the full window.
        `reduction`: mean, sum or none (then (B, T) losses)."""
        if window_blocks is None:
            window_blocks = window_blocks_at(self.config.num_iterations, self.config)
        if not torch.compiler.is_compiling():
            self.prepare(tokens_BT.size(1))
        x_ND = self.hidden(tokens_BT, window_blocks).flatten(0, 1)
        cap = None if self.config.soft_cap == "none" else self.config.soft_cap
        if targets_BT is None:
            logits = softcapped_logits(x_ND, self.head_w, softcap=cap)[:, : self.config.vocab_size]
            return logits.view(*tokens_BT.shape, -1)
        loss = linear_cross_entropy(
            x_ND, self.head_w, targets_BT.flatten(), softcap=cap, reduction=reduction, impl=self.impls["loss"]
        )
        return loss.view_as(targets_BT) if reduction == "none" else loss


def implementations(config: Config) -> dict[str, str]:
    """Which implementation each kernel family is asked for: `--kernels` spelled out."""
    if config.kernels == "reference":  # the plain way on a GPU: FlexAttention and eager torch
        flex = "flex" if torch.cuda.is_available() and config.device != "cpu" else "banded"
        plain = dict.fromkeys(("attention_inputs", "mlp", "residual", "loss", "muon"), "reference")
        return plain | {"attention": flex}
    return dict.fromkeys(("attention", "attention_inputs", "mlp", "residual", "loss", "muon"), config.kernels)


def flops_per_token(model: GPT) -> float:
    """Training FLOPs a token in matrix products, forward and backward: 6 a weight; attention not counted."""
    matrices = sum(p.numel() for b in model.blocks for p in b.parameters()) + model.head_w.numel()
    return 6.0 * matrices


# -------------------------------------------------------------------------------------------------------------
# Optimizers


class Muon:
    """Momentum, orthogonalised (Jordan et al. 2024), for the matrices of the blocks.

    A bfloat16 weight keeps its lower 16 mantissa bits beside it, so that the pair is a float32 master
    (@YouJiacheng); momentum is float32. Matrices of one shape are orthogonalised as one batch."""

    def __init__(self, named: dict[str, nn.Parameter], config: Config, impl: str, mine: list[str] | None = None):
        """`mine`: names of those that this process updates; by default all."""
        self.config, self.impl = config, impl
        self.named = named
        self.dtype = getattr(torch, config.dtype)
        self.momentum = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
        low = {n: torch.zeros_like(p, dtype=torch.int16) for n, p in named.items() if p.dtype == torch.bfloat16}
        self.mantissa = low
        shapes: dict[tuple, list[str]] = {}
        for name in named if mine is None else mine:
            shapes.setdefault(tuple(sorted(named[name].shape[-2:])), []).append(name)
        self.groups = list(shapes.values())

    @torch.no_grad()
    def step(self, step: int) -> None:
        """One update from the `.grad` of every parameter; `step` sets learning rate and momentum."""
        c = self.config
        lr, momentum = c.muon_lr * learning_rate_factor(step, c), muon_momentum_at(step, c)
        for names in self.groups:
            updates = [momentum_(self.momentum[n], self.named[n].grad, momentum) for n in names]
            for name, update in zip(names, self.orthogonal(updates)):
                p = self.named[name]
                decay = c.muon_weight_decay * (2 if "mlp" in name else 1)
                scale = max(1, p.size(-2) / p.size(-1)) ** 0.5
                apply_update_(p, self.mantissa.get(name), update, lr=lr * scale, weight_decay=lr * decay)

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
    """torch's AdamW for the head, the embeddings and the scalars, with the run's learning-rate schedule."""

    def __init__(self, named: dict[str, nn.Parameter], config: Config, head_rows: slice = slice(None)):
        """`head_rows`: the rows of the head that this process updates."""
        self.config, self.named = config, named
        c = config
        rates = {n: c.head_lr if n == "head_w" else c.scalar_lr if n == "scalars" else c.embed_lr for n in named}
        self.rows = {n: head_rows if n == "head_w" else slice(None) for n in named}
        self.parts = {n: nn.Parameter(p.detach()[self.rows[n]]) for n, p in named.items()}  # views, not copies
        groups = [dict(params=[p], lr=rates[n], initial_lr=rates[n]) for n, p in self.parts.items()]
        betas = (c.adam_beta1, c.adam_beta2)
        self.inner = torch.optim.AdamW(groups, betas=betas, eps=1e-10, weight_decay=0.0, fused=True)
        # Made now rather than at the first step, and whole, so that a checkpoint does not depend on who updates what.
        self.moments = {n: {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")} for n, p in named.items()}
        self.steps = {n: torch.zeros((), dtype=torch.float32, device=p.device) for n, p in named.items()}
        for n, part in self.parts.items():
            moments = {key: moment[self.rows[n]] for key, moment in self.moments[n].items()}
            self.inner.state[part] = {"step": self.steps[n]} | moments

    def step(self, step: int) -> None:
        for group in self.inner.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(step, self.config)
        for name, part in self.parts.items():
            part.grad = self.named[name].grad[self.rows[name]]
        self.inner.step()
        self.inner.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; live, not copies."""
        moments = {f"adam.{key}.{n}": t for n, pair in self.moments.items() for key, t in pair.items()}
        return moments | {f"adam.step.{n}": t for n, t in self.steps.items()}


class Trainer:
    """Model, optimizers and the gradients' way between processes: one object with one `step`."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        with device:
            self.model = GPT(config)
        self.world_size = world_size()
        matrices = {n: p for n, p in self.model.named_parameters() if n.startswith("blocks.")}
        others = {n: p for n, p in self.model.named_parameters() if not n.startswith("blocks.")}
        overlap = config.communication == "overlap" or (config.communication == "auto" and device.type == "cuda")
        exchange = GradientExchange if overlap and self.world_size > 1 else PlainExchange
        tables = {n: p for n, p in others.items() if "embed" in n}
        self.exchange = exchange(matrices, tables, self.model.head_w, [self.model.scalars])
        self.muon = Muon(matrices, config, self.model.impls["muon"], mine=self.exchange.mine)
        self.adam = AdamW(others, config, head_rows=self.exchange.head_rows)
        self.window = torch.zeros((), dtype=torch.int32, device=device)  # a tensor: growing it compiles nothing
        compiled = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
        self.forward = torch.compile(self.model, dynamic=False, fullgraph=True) if compiled else self.model
        self.share_state()

    def share_state(self) -> None:
        """Give every process rank 0's state."""
        if self.world_size > 1:
            for tensor in self.state().values():
                dist.broadcast(tensor, 0)

    def state(self) -> dict[str, Tensor]:
        """All that training changes: parameters and optimizer state by name; live, not copies."""
        self.exchange.wait_weights()
        parameters = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        return parameters | self.muon.state() | self.adam.state()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy `tensors` (as `state()` names them) into place."""
        for name, live in self.state().items():
            live.copy_(tensors[name])

    def set_window(self, step: int) -> None:
        self.window.fill_(window_blocks_at(step, self.config))

    def whole_state(self) -> dict[str, Tensor]:
        """`state()` with every process's share of the optimizers in it. Collective."""
        low = self.muon.mantissa
        shares = {n: [m, *([low[n]] if n in low else [])] for n, m in self.muon.momentum.items()}
        self.exchange.gather_state(shares, list(self.adam.moments["head_w"].values()))
        return self.state()

    def step(self, step: int, batches) -> Tensor:
        """Accumulate gradients over this process's (inputs_T, targets_T) on the host, then update. Returns their
        mean loss, detached."""
        sequences = self.config.tokens_per_step // self.config.train_seq_len
        self.set_window(step)
        self.exchange.wait_weights()
        self.exchange.begin([inputs_T for inputs_T, _ in batches])
        losses = []
        for number, batch in enumerate(batches, 1):
            inputs_T, targets_T = _to_device(batch, self.device)
            loss = self.forward(inputs_T[None], targets_T[None], window_blocks=self.window)
            if number == len(batches):
                self.exchange.arm()
            (loss / sequences).backward()
            losses.append(loss.detach())
        self.exchange.wait_gradients()  # sums: each process has already divided by the sequences of the whole step
        self.muon.step(step)
        self.exchange.publish_matrices()
        self.adam.step(step)
        self.exchange.publish_head()
        self.model.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()


# -------------------------------------------------------------------------------------------------------------
# Data and evaluation


def embedded_files(config: Config) -> Config:
    """`config` with 'embedded' replaced by the shards of the embedded corpus, which is generated if need be."""
    if "embedded" not in (config.train_files, config.val_files):
        return config
    from data.corpus import ensure_corpus

    folder = config.data_dir or str(Path(__file__).resolve().parent / "data" / "embedded")
    corpus = ensure_corpus(folder)  # one process writes, the others wait
    found = {"train_files": str(corpus.train_files), "val_files": str(corpus.val_files)}
    return dataclasses.replace(config, **{k: v for k, v in found.items() if getattr(config, k) == "embedded"})


def open_streams(config: Config) -> tuple[TokenStream, TokenStream]:
    """Training and validation streams. Raises ShardError that names file and cause."""
    files = embedded_files(config)
    sequences = config.tokens_per_step // config.train_seq_len
    train = TokenStream(
        files.train_files,
        sequence_tokens=config.train_seq_len,
        sequences_per_step=sequences,
        vocab_size=config.vocab_size,
        drop_shard_tail=config.drop_shard_tail,
    )
    val = TokenStream(
        files.val_files,
        sequence_tokens=config.val_seq_len,
        sequences_per_step=config.val_tokens // config.val_seq_len,
        vocab_size=config.vocab_size,
        cycle=False,
    )
    return train, val


def loss_floor(config: Config) -> float | None:
    """The least mean loss that anything could reach on the validation tokens, if they are of the embedded corpus,
    whose grammar tells every document's exact probability (data/corpus.py)."""
    if config.val_files != "embedded":
        return None
    from data.corpus import best_loss
    from data.shards import open_shard

    return best_loss(open_shard(embedded_files(config).val_files)[: config.val_tokens + 1])


def my_sequences(config: Config, rank: int, world_size: int) -> range:
    """The sequences of a step that this process works on; all processes together cover each once."""
    return range(rank, config.tokens_per_step // config.train_seq_len, world_size)


@torch.no_grad()
def validate(trainer: Trainer, stream: TokenStream, step: int) -> float:
    """Mean loss in nats per token over the validation tokens, with the window of `step`; equal on all ranks."""
    c = trainer.config
    trainer.set_window(step)
    trainer.exchange.wait_weights()
    total = torch.zeros((), dtype=torch.float64, device=trainer.device)
    count = c.val_tokens // c.val_seq_len
    for sequence in range(rank(), count, trainer.world_size):
        inputs_T, targets_T = _to_device(stream.batch(0, sequence), trainer.device)
        total += trainer.forward(inputs_T[None], targets_T[None], window_blocks=trainer.window)
    if trainer.world_size > 1:
        dist.all_reduce(total)
    return total.item() / count


def _to_device(batch, device):
    """A batch from the host, as int32 inputs and int64 targets."""
    inputs, targets = (torch.as_tensor(part) for part in batch)
    inputs = inputs.to(device, torch.int32, non_blocking=True)
    return inputs, targets.to(device, torch.int64, non_blocking=True)


# -------------------------------------------------------------------------------------------------------------
# Checkpoints: parameters and optimizer state in one safetensors file, with the configuration in its header.

CHECKPOINT_FORMAT = "train_gpt-1"


def checkpoint_config(path: str | Path, told: dict[str, str]) -> Config:
    """The configuration in a checkpoint's header. Raises CheckpointError."""
    known = {field.name: field.type for field in dataclasses.fields(Config)}
    try:
        stored = json.loads(told["config"])
        values = {name: known[name](value) for name, value in stored.items() if name in known}
        return check_config(Config(**values))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration makes no sense ({error})") from error


def check_tensors(path: str | Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless `found` has all tensors of `wanted` in their shapes and types."""
    for name, tensor in wanted.items():
        if name not in found or (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(f"{path}: its tensors do not fit its configuration ({name})")


def load_model(path: str | Path, device: str = "cpu") -> tuple[GPT, Config]:
    """The model of a checkpoint, in evaluation mode, and its configuration. Raises CheckpointError."""
    told, tensors = load_tensors(path, CHECKPOINT_FORMAT)
    config = checkpoint_config(path, told)
    config = dataclasses.replace(config, device=torch.device(device).type)
    if config.num_layers > len(tensors):
        raise CheckpointError(f"{path}: {config.num_layers} layers by its configuration, {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            model = GPT(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond all bounds
        raise CheckpointError(f"{path}: its configuration makes no sense ({error})") from error
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    check_tensors(path, weights, model.state_dict())
    model.load_state_dict(weights, strict=False, assign=True)
    return model.to(device).eval(), config


# -------------------------------------------------------------------------------------------------------------
# The run


class NonFiniteLoss(ArithmeticError):
    """The loss or a weight is NaN or infinite; training stops and the last good checkpoint stays."""


def set_up(config: Config) -> torch.device:
    """Choose this process's device and join the group that torchrun describes, if it does. Raises UsageError."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch sees no GPU here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    join_group(device)
    torch.use_deterministic_algorithms(config.deterministic)
    return device


def fit_to_world(config: Config, world_size: int) -> Config:
    """Give every process at least one sequence of each step: beyond that many processes, sequences are cut."""
    sequences = config.tokens_per_step // config.train_seq_len
    if sequences < world_size and config.tokens_per_step % world_size == 0:
        config = dataclasses.replace(config, train_seq_len=config.tokens_per_step // world_size)
        sequences = world_size
    if sequences % world_size:
        raise UsageError(
            f"{sequences} sequences a step do not divide over {world_size} processes; use 1, 2, 4 or 8, or a larger "
            f"number that divides --tokens_per_step={config.tokens_per_step}"
        )
    return config


def warm_up(trainer: Trainer) -> None:
    """Train on random tokens so that everything is compiled and allocated, then put all state back.

    The windows of the start and the end of the run both occur, as does a validation."""
    c, device = trainer.config, trainer.device
    if not c.warmup_steps:
        return
    before = {name: t.clone() for name, t in trainer.state().items()}
    random = torch.Generator().manual_seed(c.seed)
    draw = lambda length: torch.randint(c.vocab_size, (length,), generator=random)  # noqa: E731
    mine = len(my_sequences(c, rank(), trainer.world_size))
    for i in range(c.warmup_steps):
        step = 0 if i % 2 else c.num_iterations - 1
        batches = [(draw(c.train_seq_len), draw(c.train_seq_len)) for _ in range(mine)]
        trainer.step(step, batches)
    with torch.no_grad():
        tokens, targets = _to_device((draw(c.val_seq_len), draw(c.val_seq_len)), device)
        trainer.forward(tokens[None], targets[None], window_blocks=trainer.window)
    trainer.load(before)


def resume(trainer: Trainer, log: RunLog, clock: Clock, folder: Path) -> int:
    """Load the checkpoint that `--resume` asks for; returns the number of steps already done.

    Only rank 0 reads: other hosts need not see its disk."""
    if not trainer.config.resume:
        return 0
    step, clock.seconds, log.validation[:], log.train_losses[:] = on_rank_0(lambda: _load(trainer, log, folder))
    trainer.share_state()
    return step


def _load(trainer: Trainer, log: RunLog, folder: Path) -> tuple[int, float, list, list]:
    """Put a checkpoint in place: steps done, training seconds, validations and losses so far. CheckpointError."""
    c = trainer.config
    if c.resume == "auto":
        found = newest_whole(folder, CHECKPOINT_FORMAT, say)
        if found is None:
            log.cut_back_to(-1)
            return 0, 0.0, [], []
    else:
        found = Path(c.resume), *load_tensors(c.resume, CHECKPOINT_FORMAT)
    path, told, tensors = found
    here, there = dataclasses.asdict(c), dataclasses.asdict(checkpoint_config(path, told))
    differing = [name for name in here if name not in _RUN_FIELDS and here[name] != there[name]]
    if differing:
        names = ", ".join(differing)
        raise CheckpointError(f"{path}: made with another configuration; these fields differ: {names}")
    for key, files in (("data_hash", c.train_files), ("val_data_hash", c.val_files)):
        if told.get(key) != log.environment["hashes"][key]:
            raise CheckpointError(f"{path}: made with other data; what {files} holds has changed since")
    check_tensors(path, tensors, trainer.state())
    try:
        step, seconds = int(told["step"]), float(told["train_time_s"])
        validation, losses = json.loads(told["validation"]), json.loads(told["train_loss"])
        sane = 0 <= step <= c.num_iterations and 0 <= seconds < math.inf
        if not sane or any(not 0 <= p["step"] <= step or not math.isfinite(p["loss"]) for p in validation):
            raise ValueError(f"step {step}, {seconds} s")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: what it says of its run makes no sense ({error})") from error
    trainer.load(tensors)
    log.cut_back_to(step)
    return step, seconds, validation, losses


def save_run(trainer: Trainer, log: RunLog, clock: Clock, folder: Path, step: int) -> None:
    """A checkpoint after `step` steps; older ones beyond `keep_checkpoints` go once it is safely there."""
    state = trainer.whole_state()
    on_rank_0(lambda: _save(state, trainer.config, log, clock, folder, step))


def _save(state: dict[str, Tensor], config: Config, log: RunLog, clock: Clock, folder: Path, step: int) -> None:
    if any(not torch.isfinite(t).all() for t in state.values() if t.is_floating_point()):
        raise NonFiniteLoss(f"a weight is not finite after step {step}: no checkpoint written")
    hashes = log.environment["hashes"]
    told = dict(
        format=CHECKPOINT_FORMAT,
        config=json.dumps(dataclasses.asdict(config)),
        step=str(step),
        run_name=log.name,
        train_time_s=repr(clock.seconds),
        validation=json.dumps(log.validation),
        train_loss=json.dumps(log.train_losses),
        **{k: hashes[k] for k in ("code_hash", "data_hash", "val_data_hash")},
    )
    for left in folder.glob(".*.part"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    save_tensors(folder / f"step-{step:06d}.safetensors", state, told)
    keep = config.keep_checkpoints
    for old in checkpoints_of(folder)[keep:] if keep else []:
        old.unlink(missing_ok=True)
    log.line(f"checkpoint:{step} {folder.name}/step-{step:06d}.safetensors", echo=False)


def train(trainer: Trainer, log: RunLog, streams, ceiling: float, stop: StopRequest) -> int:
    """The timed run. Returns the signal that stopped it, or 0 if it trained to its end."""
    c, (stream, val_stream) = trainer.config, streams
    folder = log.folder / f"{log.name}.checkpoints"
    clock = Clock(trainer.device)
    start = resume(trainer, log, clock, folder)
    mine = my_sequences(c, rank(), trainer.world_size)
    order = ((step, sequence) for step in range(start, c.num_iterations) for sequence in mine)
    batches = stream.prefetch(order)
    flops = flops_per_token(trainer.model)
    progress = Progress(c.num_iterations, start, c.tokens_per_step, flops, ceiling, shows=rank() == 0)
    saved = start if start else -1
    clock.start()
    try:
        for step in range(start, c.num_iterations + 1):
            last = step == c.num_iterations
            due = last or (c.val_loss_every and step % c.val_loss_every == 0)
            if due and not any(point["step"] == step for point in log.validation):
                elapsed = clock.stop()
                loss = validate(trainer, val_stream, step)
                if not math.isfinite(loss):
                    raise NonFiniteLoss(f"validation loss is {loss} after step {step}")
                log.validated(step, elapsed, loss)
                log.summary("running")
                clock.start()
            (asked,) = agree([stop.signal])
            wanted = asked or (last and c.save_final) or (c.checkpoint_every and step % c.checkpoint_every == 0)
            if wanted and step > 0 and step != saved:
                clock.stop()
                save_run(trainer, log, clock, folder, step)
                saved = step
                clock.start()
            if asked or last:
                clock.stop()
                return int(asked)
            loss = trainer.step(step, [next(batches) for _ in mine])
            shown = None
            if c.log_train_loss:
                value = _mean_over_ranks(loss)
                if not math.isfinite(value):
                    raise NonFiniteLoss(f"training loss is {value} at step {step + 1}")
                shown = value
            log.trained(step + 1, clock.read(), shown)
            progress.update(step + 1, clock.read(), loss)
    finally:
        progress.close()
    raise AssertionError("unreachable: the loop returns at its last step")


def _mean_over_ranks(loss: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= world_size()
    return loss.item()


def unique_name(config: Config) -> str:
    """The run's name: as given, or preset, time and a random suffix, the same on every rank."""
    drawn = f"{config.preset}-{now()[:19].replace(':', '')}-{uuid.uuid4().hex[:6]}"
    return on_rank_0(lambda: config.run_name or drawn)


def describe(config: Config, trainer: Trainer, streams) -> dict:
    """The environment as the log tells it, with the names of the kernels that run."""
    sample = torch.empty(0, device=trainer.device, dtype=getattr(torch, config.dtype))
    ran = trainer.model.impls | {"attention": attention_implementation(trainer.model.impls["attention"], sample)}
    return describe_environment(
        trainer.device,
        world_size=trainer.world_size,
        source=SOURCE,
        implementations=ran,
        data_hash=streams[0].data_hash(),
        val_data_hash=streams[1].data_hash(),
        plan_hash=config.plan_hash,
    )


def run(config: Config) -> int:
    """Everything from set-up to the report. Returns the exit code; errors are raised after they are logged."""
    stop = StopRequest()
    device = set_up(config)
    asked, config = config, fit_to_world(config, world_size())
    streams = open_streams(config)
    trainer = Trainer(config, device)
    environment = describe(config, trainer, streams)
    log = RunLog(
        config.output_dir,
        unique_name(config),
        dataclasses.asdict(config),
        environment,
        SOURCE,
        config_hash(config),
        writes=rank() == 0,
    )
    on_rank_0(lambda: log.open(resuming=bool(config.resume), overwrite=config.overwrite))
    try:
        if config != asked:
            log.line(
                f"{trainer.world_size} processes: training sequences cut from {asked.train_seq_len} to "
                f"{config.train_seq_len} tokens. Documents and windows end at their borders, so this is another run "
                "than with 8 processes: its loss may be slightly higher, and its checkpoints need as many processes"
            )
        log.summary("running")
        ceiling = matmul_ceiling(device, getattr(torch, config.dtype), trainer.world_size)
        warm_up(trainer)
        signal_number = train(trainer, log, streams, ceiling, stop)
    except BaseException as error:
        with contextlib.suppress(OSError):
            log.summary("failed", error=f"{type(error).__name__}: {error}")
            log.line(f"failed: {error}", echo=False)
        raise
    memory = {}
    if device.type == "cuda":
        memory = dict(peak_memory_mib=torch.cuda.max_memory_allocated() >> 20)
        reserved = torch.cuda.max_memory_reserved() >> 20
        log.line(f"peak memory allocated: {memory['peak_memory_mib']} MiB reserved: {reserved} MiB")
    else:
        import resource

        memory = dict(peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
        log.line(f"peak memory resident: {memory['peak_memory_mib']} MiB")
    floor = None if signal_number else on_rank_0(lambda: loss_floor(config))
    if floor is not None:
        above = log.validation[-1]["loss"] - floor
        log.line(f"best possible on these tokens: {floor:.6f} nats; the final loss is {above:.6f} above it")
    log.summary("interrupted" if signal_number else "finished", loss_floor=floor, **memory)
    if signal_number:
        log.line(f"stopped by {signal.Signals(signal_number).name} after a checkpoint; --resume=auto continues")
    return 128 + signal_number if signal_number else 0


# -------------------------------------------------------------------------------------------------------------
# Talking to what was trained


@torch.no_grad()
def generate(
    model: GPT, tokens: list[int], max_new_tokens: int, *, temperature=1.0, top_k=0, top_p=1.0, generator=None
):
    """Yield new token ids until the end-of-text token or `max_new_tokens`.

    `temperature` 0 takes the likeliest token; `top_k` (0: off) and `top_p` (1: off) cut the tail before sampling
    (nucleus sampling: Holtzman et al. 2020)."""
    device, limit = model.head_w.device, max(model.config.window_max_tokens, 1024)
    tokens = [model.config.eos_id, *tokens]
    for _ in range(max_new_tokens):
        logits_V = model(torch.tensor([tokens[-limit:]], device=device))[0, -1]
        token = int(pick(logits_V, temperature, top_k, top_p, generator))
        if token == model.config.eos_id:
            return
        tokens.append(token)
        yield token


def pick(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, generator=None) -> Tensor:
    """Token ids (...) from logits (V) or (B, V)."""
    if temperature <= 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        unlikely = p.cumsum(-1) - p >= top_p  # the likelier ones before it have top_p already
        logits = logits.masked_fill(unlikely.gather(-1, index.argsort(-1)), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[..., 0]


def sample_command(arguments: list[str]) -> int:
    """`train_gpt.py sample CHECKPOINT`: write text, token by token."""
    parser = argparse.ArgumentParser(prog="train_gpt.py sample", description="Write text from a checkpoint.")
    parser.add_argument("checkpoint", help="a .safetensors file of train_gpt.py")
    parser.add_argument("--prompt", default="", help="the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=300, help="at most this many tokens a sample")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="sample from this many tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=0.95, help="sample from the tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", default="", help="folder with encoder.json and vocab.bpe (GPT-2 tokens offline)")
    options = parser.parse_args(arguments)
    model, config = load_model(options.checkpoint, options.device)
    from data.encoding import TokenizeError, encoding_for  # late: only this needs it

    try:
        encoding = encoding_for(config.vocab_size, options.vocab or None)
        prompt = encoding.encode(options.prompt)
    except TokenizeError as error:
        raise UsageError(str(error)) from error
    generator = torch.Generator(options.device).manual_seed(options.seed)
    for number in range(options.num_samples):
        if number:
            print("\n" + "-" * 40)
        decoder = encoding.stream_decoder()
        print(options.prompt, end="", flush=True)
        new = generate(
            model,
            prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
        )
        for token in new:
            print(decoder(token), end="", flush=True)
        print()
    return 0


EXIT_CODES = {UsageError: 2, ShardError: 3, CheckpointError: 3, NonFiniteLoss: 4, OSError: 5}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code of the module's docstring."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments[:1] or "-h" in arguments[:1]:
        print(__doc__, help_text(Config, PRESETS, beside="nano"), sep="\n")
        return 0
    try:
        if arguments[:1] == ["sample"]:
            return sample_command(arguments[1:])
        return run(parse_config(arguments))
    except tuple(EXIT_CODES) as error:
        if rank() == 0 or not getattr(error, "shared", False):
            print(f"train_gpt.py: {error}", file=sys.stderr, flush=True)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search("by peer|Broken pipe", str(error)):
            raise
        print(f"train_gpt.py: rank {rank()} lost another process of the run, which says why", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
