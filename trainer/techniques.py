"""What fields of the configuration add to the plain model of train_gpt.py: each technique in one place.

A technique is found by its field's name. Off, as in `medium`, it has no parameters and no line of it runs; `Techniques`
is made only for a model that has one of them (`uses_techniques`), and its `hidden` is then the model's. Sources are
pull requests of the speedrun (https://github.com/KellerJordan/modded-nanogpt) unless said otherwise; formulas are those
of its record 18 on the medium track (#188) and of the proposals #252 and #261. Shapes as in train_gpt.py:
B batch, T time, D width, H heads, Dh head width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.encoding import TokenizeError, prefix_tokens
from kernels.attention import attention
from kernels.cross_entropy import next_targets
from kernels.embedding import implementation as looked_up_by
from kernels.embedding import picked, rows_of_tables
from kernels.heads import HeadOutputs, head_inputs, head_outputs
from kernels.norm import rms_norm as norm
from kernels.residual import mixes_of_layers, weighted_sum
from trainer import adam, products, sampled_softmax
from trainer.draws import Draws
from trainer.gating import DynamicGates, Gates, HeadMixing, mixed_heads
from trainer.ngram_table import NGramTable
from trainer.normuon import factors
from trainer.options import UsageError
from trainer.schedule import short_window, target_weights, yarn_at

GATE_INPUTS = 16  # a gate reads so many dimensions of its input

#: Fields and their values in the plain model: where one differs, the model has techniques.
# fmt: off
PLAIN = dict(
    norm_before_attention=False, value_norm=True, output_scalar=False, mix_lr=0.0, smear=False, skip_gates=False,
    backout_layer=-1, value_gates=False, output_gates=False, key_offset="", exact_windows=False, bigram_rows=0,
    ngram_rows=0, late_attention_source=-1, dynamic_skips="", matrix_dtype="",
    yarn_until=-1, untied_values=False, xsa=False, paired_heads="", dynamic_gates=-1, head_mixing=False,
    narrow_qk=0,
)
# fmt: on


def uses_techniques(config: Any) -> bool:
    """Whether a configuration has anything that the plain model does not."""
    return any(getattr(config, name) != plain for name, plain in PLAIN.items())


def techniques_of(config: Any) -> list[str]:
    """Fields with which a trained model differs from a plain one, whose code therefore cannot run it."""
    others = "tie_embeddings_frac", "window_schedule", "validation_window", "short_window_max"  # tables, windows
    found = [name for name, plain in PLAIN.items() if getattr(config, name) != plain]
    return found + [name for name in others if getattr(config, name)]


def own_adam(config: Any) -> bool:
    """Whether a configuration needs the Adam of trainer/adam.py: AdamW has one pair of betas and knows no kinds."""
    c = config
    fields = c.adam_decay, c.adam_betas, c.cautious_decay, c.tie_embeddings_frac, c.adam_moments != "weights"
    return c.adam_every > 1 or c.adam_period > 0 or any(fields) or uses_techniques(c)


def check_techniques(config: Any, skips: dict[int, int]) -> None:
    """Raise UsageError for techniques that do not go together, naming the field."""
    c = config
    for field in ("backout_layer", "late_attention_source"):
        if getattr(c, field) >= c.num_layers:
            raise UsageError(f"--{field}={getattr(c, field)}: there are only --num_layers={c.num_layers}")
    if c.skip_gates and not skips:
        raise UsageError("--skip_gates: there are no skips; see --unet_skips")
    if c.value_gates and not c.value_embeddings:
        raise UsageError("--value_gates: there are no value embeddings; see --value_embeddings")
    if (c.smear or c.skip_gates or c.value_gates or c.output_gates) and c.model_dim < GATE_INPUTS:
        raise UsageError(f"--model_dim={c.model_dim}: gates read {GATE_INPUTS} dimensions")
    if c.key_offset and not c.half_truncated_rotary:
        raise UsageError("--key_offset moves the dimensions that --half_truncated_rotary leaves still; it is off")
    if (c.two_rate_from or c.muon_head_pairs or c.gram_newton_schulz) and not c.normuon_beta2:
        raise UsageError("--two_rate_from, --muon_head_pairs, --gram_newton_schulz are NorMuon's: give --normuon_beta2")
    if c.matrix_optimizer != "muon" and c.normuon_beta2:
        raise UsageError(f"--normuon_beta2={c.normuon_beta2} is Muon's: not with --matrix_optimizer=adamw")
    if c.muon_head_pairs and c.num_heads % 2:
        raise UsageError(f"--muon_head_pairs: of an even --num_heads, not {c.num_heads}")
    if c.prefix_loss and c.mtp == 1:
        raise UsageError(f"--prefix_loss={c.prefix_loss}: it ends with the second target, so give --mtp=2 or 3")
    if c.tail_ema and c.tail_ema_steps > c.num_iterations:
        raise UsageError(f"--tail_ema_steps={c.tail_ema_steps}: there are only --num_iterations={c.num_iterations}")
    if c.ngram_rows % 16:  # halves for pairs and triples, each over 1, 2, 4 or 8 processes
        raise UsageError(f"--ngram_rows={c.ngram_rows}: a multiple of 16")
    if c.bigram_rows == 1:
        raise UsageError("--bigram_rows=1: the first token has a row of its own, so at least 2")
    if c.adam_period % c.adam_every:
        raise UsageError(f"--adam_period={c.adam_period}: a multiple of --adam_every={c.adam_every}")
    for field in ("num_iterations", "checkpoint_every", "stop_after"):  # else gradients would wait in between
        for every in ("adam_every", "adam_period"):
            if getattr(c, every) and getattr(c, field) % getattr(c, every):
                raise UsageError(f"--{field}={getattr(c, field)}: a multiple of --{every}={getattr(c, every)}")
    if c.adam_period and not (c.value_embeddings or c.bigram_rows):
        raise UsageError(f"--adam_period={c.adam_period}: there are no value or bigram tables")
    sampled_softmax.check(c)
    check_narrow(c)
    for field, read in (
        ("muon_lr_factors", factors),
        ("fp8_scales", three_numbers),
        ("adam_decay", lambda text: adam.by_kind(text, 1)),
        ("adam_betas", lambda text: adam.by_kind(text, 2)),
        ("dynamic_skips", lambda text: dynamic_layers(text, c.num_layers)),
        ("attention_free_layers", lambda text: known_layers(text, c.num_layers)),
        ("long_window_layers", lambda text: known_layers(text, c.num_layers)),
        ("key_offset", lambda text: known_layers(text, c.num_layers)),
        ("paired_heads", lambda text: known_layers(text, c.num_layers)),
        ("narrow_qk_layers", lambda text: known_layers(text, c.num_layers)),
    ):
        try:
            read(getattr(c, field))
        except ValueError as error:
            raise UsageError(f"--{field}={getattr(c, field)}: {error}") from error
    if c.paired_heads and (c.num_heads % 2 or set(numbers(c.paired_heads)) & set(numbers(c.key_offset))):
        raise UsageError(f"--paired_heads={c.paired_heads}: of an even --num_heads, in layers without --key_offset")
    if not -1 <= c.dynamic_gates < c.num_layers or c.dynamic_gates == 0:
        raise UsageError(f"--dynamic_gates={c.dynamic_gates}: -1, or a layer from 1 to {c.num_layers - 1}")
    last = c.num_layers - 1
    if c.head_mixing and last in {*numbers(c.attention_free_layers), *numbers(c.paired_heads)}:
        raise UsageError("--head_mixing: the last layer is without attention, or one of --paired_heads")


def check_narrow(config: Any) -> None:
    """Raise UsageError for queries and keys that cannot be so narrow."""
    c, width = config, config.model_dim // config.num_heads
    if c.narrow_qk and (c.narrow_qk % 4 or not 8 <= c.narrow_qk < width):
        raise UsageError(
            f"--narrow_qk={c.narrow_qk}: 0, or a multiple of 4 from 8 to less than --model_dim / --num_heads = {width}"
        )
    for field in ("narrow_qk_layers", "narrow_qk_scale"):
        if getattr(c, field) and not c.narrow_qk:
            raise UsageError(f"--{field}={getattr(c, field)}: no queries and keys are narrow; see --narrow_qk")


def three_numbers(text: str) -> None:
    """Raises ValueError for what is neither empty nor three positive numbers."""
    if text and (len(text.split(",")) != 3 or not all(float(word) > 0 for word in text.split(","))):
        raise ValueError("three positive numbers: 32,2.25,1.5")


def known_layers(text: str, layers: int) -> list[int]:
    """Layers of a field. Raises ValueError for what is none."""
    try:
        found = numbers(text)
    except ValueError:
        raise ValueError("layers are written 0,4,11") from None
    if any(not 0 <= layer < layers for layer in found):
        raise ValueError(f"layers from 0 to {layers - 1}, of --num_layers={layers}")
    return found


def dynamic_layers(text: str, layers: int) -> list[int]:
    """(early, middle) of `dynamic_skips`. Raises ValueError."""
    found = known_layers(text, layers - 1)
    if text and (len(found) != 2 or found[0] > found[1]):
        raise ValueError("an early layer and a later one, before the last one: 4,11")
    return found


def numbers(text: str) -> list[int]:
    """Layers of a field that is written 0,4,11."""
    return [int(word) for word in text.split(",") if word.strip()]


def scalar_layout(config: Any, skips: int) -> dict[str, Tensor]:
    """Initial values of the learned numbers in the one float32 vector `scalars`, by kind, in their order.

    mixes: (L, 3) factors of stream, first and second embedding on entering a layer (`resid_init`, 0, 0); with
    `mix_lr` only the first of them. values: (L, 2) factors of value and value embedding, or, with `output_scalar`, of
    the projections to q, k, v and back. `skips`: how many there are of them."""
    c, L = config, config.num_layers
    plain = torch.tensor([c.resid_init, 0, 0] * L)
    found = {
        "skips": torch.full((skips,), -1.5) if c.skip_gates else torch.ones(L),
        "mixes": plain[::3] if c.mix_lr else plain,
        "values": torch.tensor([0.5, 1.0 if c.output_scalar else 0.5] * L),
    }
    if c.smear:
        found["smear"] = torch.zeros(1)
    if c.backout_layer >= 0:
        found["backout"] = torch.tensor([0.5])
    if uses_techniques(c):  # a multiple of 8, as wide reads like it
        found["unused"] = torch.zeros(-sum(map(len, found.values())) % 8)
    return found


def replaced(x: Tensor, y: Tensor, factors: tuple[Tensor, ...], *terms: tuple[Tensor, Tensor]) -> Tensor:
    """a x + b (y - x) + other terms, where factors (a, b) stand for those of a stream x and of what made y of it."""
    own, added = factors
    return weighted_sum(x, (own - added, x), (added, y), *terms)


def gate(x_BTD: Tensor, weight_G: Tensor) -> Tensor:
    """sigmoid(w . x[:16]) in (0, 1), for each of the gates in w (G, 16): (B, T, G)."""
    return torch.sigmoid(F.linear(x_BTD[..., :GATE_INPUTS], weight_G))


# ---- smear -----------------------------------------------------------------------------------------------------


def smeared(e_BTD: Tensor, before_B1D: Tensor | None, weight_1G: Tensor, amount: Tensor) -> Tensor:
    """`smear` (#130): e[t] + a sigmoid(g . e[t, :16]) e[t-1], from the raw embedding; not cut at documents.

    before: the embedding of the token before the first one, or None: there is none."""
    first = torch.zeros_like(e_BTD[:, :1]) if before_B1D is None else before_B1D
    earlier_BTD = torch.cat([first, e_BTD[:, :-1]], 1)
    return e_BTD + amount * gate(e_BTD, weight_1G) * earlier_BTD


# ---- bigram_rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BigramRows:
    """`bigram_rows` (#201, #252): the row of a table of so many that a token and the one before it pick.

    ((36313 x[t]) xor (27191 x[t-1])) modulo one less than the rows, in int32 with wrap-around; the first token of a
    sequence picks the last row. Crosses documents."""

    rows: int

    def __len__(self) -> int:
        return self.rows

    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 (..., T). tokens: (..., T), of any integer type."""
        tokens = tokens.to(torch.int32)
        hashed = (36313 * tokens[..., 1:]) ^ (27191 * tokens[..., :-1])
        return F.pad(hashed.remainder(self.rows - 1), (1, 0), value=self.rows - 1).long()


# ---- narrow_qk -------------------------------------------------------------------------------------------------


def narrow_rows(config: Any, layer: int) -> int:
    """`narrow_qk` (#344, by layers #360): rows of a layer's weight to its queries, and of that to its keys, which are
    narrower than its values; 0: all D of them. In such a layer q and k are normed and rotated over their own width,
    with frequencies from 1 to 1 / 1024 as wide ones have, and logits are scaled by `narrow_qk_scale`."""
    c = config
    narrow = c.narrow_qk and (not c.narrow_qk_layers or layer in numbers(c.narrow_qk_layers))
    return c.num_heads * c.narrow_qk if narrow else 0


def head_widths(config: Any) -> list[tuple[int, int]]:
    """Of each layer with attention of a model with techniques: (width of a head's values, of its queries)."""
    c, width = config, config.model_dim // config.num_heads
    layers = set(range(c.num_layers)) - set(numbers(c.attention_free_layers)) if uses_techniques(c) else ()
    return [(width, narrow_rows(c, layer) // c.num_heads or width) for layer in layers]


def looked_up(table: nn.Embedding, rows: Tensor, impl: str) -> Tensor:
    """The table's rows of those numbers, (..., D): by the module where torch does it or somebody hooked on to it, else
    by the kernel whose gradient is deterministic (kernels/embedding.py)."""
    return table(rows) if _by_module(table, rows, impl) else picked(table.weight, rows, impl=impl)


def _by_module(table: nn.Embedding, rows: Tensor, impl: str) -> bool:
    return bool(table._forward_hooks) or looked_up_by(impl, rows) == "reference"


def values_of_layers(gpt: Any, rows_BT: Tensor) -> dict[int, Tensor]:
    """By layer what is mixed into its values, (B, T, D): each table's rows in one of the first layers and in one of the
    last, which with `untied_values` have tables of their own. One kernel makes the gradients of all tables, where it is
    not as in `looked_up`."""
    tables, L, impl = list(gpt.value_embeds), gpt.config.num_layers, gpt.impls["tables"]
    if not tables:
        return {}
    count = gpt.config.value_embeddings
    uses = 2 * count // len(tables)
    if any(_by_module(table, rows_BT, impl) for table in tables):
        found = [[table(rows_BT)] * uses for table in tables]
    else:
        found = rows_of_tables([table.weight for table in tables], rows_BT, uses=uses, impl=impl)
    early, late = [rows[0] for rows in found[:count]], [rows[-1] for rows in found[-count:]]
    return dict(enumerate(early)) | dict(enumerate(late, L - count))


def projections(weights: products.Weights) -> tuple[list[Tensor], Tensor]:
    """(a layer's weights to q, k and v, of which the rows (E, D) follow each other; that back, (D, D)); views."""
    if "qk_w" in weights:
        return [weights["qk_w"].flatten(0, 1), weights["vo_w"][0]], weights["vo_w"][1]
    return products.plain_projections(weights)


def drawn_apart(inwards: list[Tensor], model_dim: int) -> list[tuple[str, Tensor]]:
    """The weights to q, k and v by name, so that v's first values are the same beside narrow q and k. inwards: the
    first of `projections`; of narrow ones, q and k together are "k" (and "q", what is more than D rows)."""
    parts = [part for rows in inwards for part in rows.split(model_dim)]
    return list(zip("vkq", reversed(parts)))


# ---- yarn_until ------------------------------------------------------------------------------------------------


@torch.no_grad()
def turn(gpt: Any, step: int, frequencies_R: Tensor, tables_of: Callable) -> None:
    """`yarn_until` (trainer/schedule.py): rotary's tables and the factor on queries as they are at a step; in place, so
    that nothing compiles anew. frequencies: those without YaRN; tables_of: (length, frequencies) -> (cos, sin)."""
    frequencies, factor = yarn_at(step, gpt.config, frequencies_R.tolist())
    if gpt.query_factor is None:
        gpt.query_factor = torch.ones((), device=gpt.head_w.device)
    gpt.query_factor.fill_(factor)
    if frequencies != gpt.yarn:
        gpt.yarn, kept = frequencies, gpt.rotary_tables or ()
        new = torch.tensor(frequencies, device=gpt.head_w.device)
        for table, values in zip(kept, tables_of(kept[0].size(0), new) if kept else ()):
            table.copy_(values)


# ---- mtp, loss_sum, prefix_loss --------------------------------------------------------------------------------


class Targets:
    """What a training step's loss is made of: `mtp` targets of each token from the same logits (#178; Gloeckle et al.
    2024, arXiv:2404.19737), added up over a sequence with `loss_sum`, and with `prefix_loss` (#337) the longest token
    that is a proper prefix of the next one's bytes: its weight is `prefix_loss` at first, falls to 0 in the second
    twelfth's part of mtp, and a token without such a prefix has none.

    model: its `prefixes` are set here. Raises UsageError where the vocabulary is not to be had."""

    def __init__(self, config: Any, model: Any, device: torch.device):
        self.config, self.device = config, device
        self.sampled = sampled_softmax.SampledClasses(config, device)
        self.kept: dict[int, Tensor] = {}  # weights of so many targets, filled in place: nothing compiles anew
        if config.prefix_loss:
            try:
                table = prefix_tokens(config.vocab_size, config.vocab or None)
            except TokenizeError as error:
                raise UsageError(f"--prefix_loss={config.prefix_loss}: {error}; --vocab=FOLDER") from error
            model.prefixes = torch.from_numpy(table).to(device)

    def weights(self, step: int) -> tuple[float, ...]:
        """Of the next tokens, and after them of the prefix, where it counts."""
        c, found = self.config, target_weights(step, self.config)
        if not c.prefix_loss or len(found) == 1:
            return found
        return *found, c.prefix_loss * (1.0 if len(found) > 2 else 2 * found[1])

    def at(self, step: int) -> dict[str, Any]:
        """What `train_gpt.GPT.forward` is told of a training step's loss."""
        how: dict[str, Any] = dict(reduction="sum") if self.config.loss_sum else {}
        if self.config.mtp > 1:
            weights = self.weights(step)
            kept = self.kept.setdefault(len(weights), torch.ones(len(weights), device=self.device))
            for number, weight in enumerate(weights):
                kept[number].fill_(weight)
            how["target_weights"] = kept
        return how

    @staticmethod
    def columns(targets_BT: Tensor, count: int, prefixes_V: Tensor | None) -> Tensor:
        """(B, T, count) targets; the last of several is the prefix, if there are prefixes."""
        if prefixes_V is None or count == 1:
            return next_targets(targets_BT, count)
        return torch.cat([next_targets(targets_BT, count - 1), prefixes_V[targets_BT][..., None]], -1)


# ---- key_offset, xsa, paired_heads: `offset_keys`, `exclusive`, `interleaved` of kernels/heads.py -----------------


def doubled(tokens_BT: Tensor, eos_id: int) -> Tensor:
    """Tokens for the plan of interleaved positions, (B, 2 T): a document opens at the first of two."""
    return torch.stack([tokens_BT, torch.full_like(tokens_BT, eos_id + 1)], -1).flatten(-2)


# ---- dynamic_skips ---------------------------------------------------------------------------------------------


class DynamicSkips(nn.Module):
    """`dynamic_skips` (#261; dense connections by the token: Xiao et al. 2025, arXiv:2502.12170): two networks of
    `dynamic_hidden` units give for every token the factors with which earlier outputs enter the last layer and
    the head.

    m = sc (W2 gelu(W1 x) + b), eight factors in each of two rows. The biases hold what the plain model would do; they
    are float32, as in bfloat16 (`dynamic_bias_dtype`) most are too large for a step of their optimizer to move."""

    SCALE = 0.2 / 3**0.5

    def __init__(self, config: Any):
        super().__init__()
        c, dtype = config, getattr(torch, config.dtype)
        self.early, self.middle = numbers(c.dynamic_skips)
        self.in_w = nn.Parameter(torch.empty(2, c.dynamic_hidden, c.model_dim, dtype=dtype))
        self.out_w = nn.Parameter(torch.empty(2, 16, c.dynamic_hidden, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(2, 2, 8, dtype=getattr(torch, c.dynamic_bias_dtype)))
        self.config = c

    def reset_parameters(self) -> None:
        c = self.config
        self.in_w.uniform_(-(c.model_dim**-0.5), c.model_dim**-0.5)
        self.out_w.zero_()
        self.bias.zero_()
        self.bias[0, :, 4] = c.resid_init / self.SCALE
        self.bias[0, :, 5] = 1 / self.SCALE
        self.bias[0, 0, 7] = c.bigram_init_weight / self.SCALE
        self.bias[1, 1, 1] = -4.34  # the old backout

    def forward(self, network: int, x_BTD: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Both rows of factors of each token, (B, T, 1) each, in at least float32."""
        h_BTF = F.gelu(F.linear(x_BTD, self.in_w[network]))
        m = F.linear(h_BTF, self.out_w[network]).to(torch.promote_types(x_BTD.dtype, torch.float32))
        m = (m + self.bias[network].flatten()) * self.SCALE
        return tuple(row.split(1, dim=-1) for row in m.chunk(2, dim=-1))

    def before_last(self, x_BTD: Tensor, x0: Tensor, middle: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Before the last layer: (stream, what its values get, the factors that it goes by)."""
        m = first, second = self(0, x_BTD)
        values = weighted_sum(x_BTD, (1.15 * first[0], x0), (1.15 * first[1], middle), (1.15 * first[2], x_BTD))
        return weighted_sum(x_BTD, (1 + second[2], x_BTD), (second[0], x0), (second[1], middle)), values, m

    def before_head(
        self, x_BTD: Tensor, x0: Tensor, outputs: dict[int, Tensor], last: int, table: Tensor | None
    ) -> Tensor:
        """After the last layer; `table`: the rows of the first value embedding."""
        _, second = self(1, x_BTD)
        terms = [(second[0], x0), (second[1], outputs[self.middle]), (second[2], outputs[last - 1])]
        terms += [(second[4], outputs[self.early])] + ([] if table is None else [(second[3], table)])
        return weighted_sum(x_BTD, (torch.ones_like(second[0]), x_BTD), *terms)


# ---- all of them together --------------------------------------------------------------------------------------


class Techniques(nn.Module):
    """The parameters that techniques add, and the pass through the layers that has room for each of them."""

    def __init__(self, config: Any, skips: dict[int, int], value_layers: list[int]):
        super().__init__()
        c, L, D, H = config, config.num_layers, config.model_dim, config.num_heads
        self.config, self.skips = c, skips
        dtype = getattr(torch, config.dtype)
        gate_dtype = getattr(torch, c.matrix_dtype or c.dtype) if c.gate_optimizer == "muon" else dtype
        empty = lambda *shape, dtype=dtype: nn.Parameter(torch.empty(*shape, dtype=dtype))  # noqa: E731
        self.long, self.offset, self.paired = (
            numbers(text) for text in (c.long_window_layers, c.key_offset, c.paired_heads)
        )
        self.dynamic_gates = DynamicGates(c) if c.dynamic_gates > 0 else None
        self.head_mixing = HeadMixing(c) if c.head_mixing else None
        self.xsa_w = empty(L, H, dtype=torch.float32) if c.xsa and not self.dynamic_gates else None
        self.gated = [i for i in value_layers if not (c.dynamic_skips and i == L - 1)]  # whose gate is a network's
        self.mixes = empty(L, 2, dtype=torch.float32) if c.mix_lr else None
        self.smear_w = empty(1, GATE_INPUTS) if c.smear else None
        self.skip_w = empty(len(skips), GATE_INPUTS) if c.skip_gates else None
        self.value_gates = empty(len(self.gated), H, GATE_INPUTS, dtype=gate_dtype) if c.value_gates else None
        self.output_gates = (
            empty(L, H, GATE_INPUTS, dtype=gate_dtype) if c.output_gates and not self.dynamic_gates else None
        )
        self.bigram_embed = nn.Embedding(c.bigram_rows, D, dtype=dtype) if c.bigram_rows else None
        self.bigram_mixes = empty(L, dtype=torch.float32) if c.bigram_rows or c.ngram_rows else None
        self.ngrams = NGramTable(c, dtype) if c.ngram_rows else None
        self.dynamic = DynamicSkips(c) if c.dynamic_skips else None
        self.bigram_rows = BigramRows(c.bigram_rows)

    def reset_parameters(self, draws: Draws) -> None:
        """Zeros, but for the weight of the bigram table and the dynamic skips: at first nothing changes much."""
        for p in self.parameters():
            p.zero_()
        if self.bigram_mixes is not None:
            self.bigram_mixes.fill_(self.config.bigram_init_weight)
        for name in ("dynamic", "dynamic_gates", "head_mixing"):
            if (part := getattr(self, name)) is not None:
                draws(name, part.reset_parameters)

    def hidden(
        self, gpt: Any, tokens_BT: Tensor, window_blocks: Any, cache: Any = None, ngrams: Tensor | None = None
    ) -> Tensor:
        """`train_gpt.GPT.hidden` with techniques: the same steps, and beside each what fields add to it."""
        c, last = self.config, self.config.num_layers - 1
        seen_BS = tokens_BT if cache is None else cache.extend(tokens_BT)
        begin, end = seen_BS.size(1) - tokens_BT.size(1), seen_BS.size(1)
        rotary = tuple(table[begin:end] for table in gpt.rotary(end))
        windows = window_blocks, short_window(window_blocks, c)
        plans = [gpt.plan(seen_BS, window) for window in windows]
        if self.paired:
            turned = [table[2 * begin : 2 * end] for table in gpt.rotary(2 * end)]
            pairs = [(turned, gpt.plan(doubled(seen_BS, c.eos_id), window)) for window in windows]
        scalars = gpt.scalars_by_kind()
        values = values_of_layers(gpt, gpt.rows_v(seen_BS)[:, begin:])
        x0 = self.entered(gpt, seen_BS, begin, scalars)
        shared = [x0]
        if gpt.embed2 is not None:
            shared.append(norm(looked_up(gpt.embed2, gpt.rows2(seen_BS)[:, begin:], gpt.impls["tables"])))
        if (bigram := self.pairs(gpt, seen_BS, begin, ngrams)) is not None:
            shared.append(bigram)
        outputs: dict[int, Tensor] = {}
        x_BTD, factors, more_values = x0, None, None
        gated = self.dynamic_gates
        gates: list[Gates] = [] if gated is None else gated(0, x0)
        mixes = self.mixes_of(gpt, scalars, shared, range(last + 1 if gated is None else gated.middle), gates)
        factors_L2 = scalars["values"] if c.output_scalar else None
        impls_at = products.of_layers(gpt.impls, gpt.blocks, projections, factors_L2, x0.dtype)
        for layer, block in enumerate(gpt.blocks):
            if gated is not None and layer == gated.middle:
                gates += gated(1, x_BTD)
                mixes += self.mixes_of(gpt, scalars, shared, range(layer, last + 1), gates)
            if layer in self.skips:
                x_BTD = self.skipped(x_BTD, x0, layer, outputs, scalars)
            if factors is None:
                x_BTD = mixes[layer](x_BTD)
            late = 0 <= c.late_attention_source < layer
            source = outputs[c.late_attention_source] if late else x_BTD
            short = layer not in self.long
            where = pairs[short] if layer in self.paired else (rotary, plans[short])
            impls = impls_at(layer)
            given = *where, impls, gpt, cache, (factors, more_values), gates[layer] if gates else None
            found = self.attend(block, source, values.get(layer), scalars["values"][layer], *given)
            x_BTD = self.added(x_BTD, found, impls, x0, bigram, factors)
            y_BTD = products.mlp_added(x_BTD, impls["w_in"], impls["w_out"], impls)
            x_BTD = y_BTD if factors is None else replaced(x_BTD, y_BTD, factors[1][4:6])
            outputs[layer] = x_BTD
            if self.dynamic is not None and layer == last - 1:
                middle = outputs[self.dynamic.middle]
                x_BTD, more_values, factors = self.dynamic.before_last(x_BTD, x0, middle)
        if c.backout_layer >= 0:  # #140: what the head does not need of the middle
            x_BTD = x_BTD - scalars["backout"][0] * outputs[c.backout_layer]
        if self.dynamic is not None:
            x_BTD = self.dynamic.before_head(x_BTD, x0, outputs, last, values.get(0))
        return norm(x_BTD)

    def entered(self, gpt: Any, seen_BS: Tensor, begin: int, scalars: dict[str, Tensor]) -> Tensor:
        """The stream at its beginning: norm of the (smeared) embedding."""
        e_BTD = looked_up(gpt.embed1, seen_BS[:, begin:], gpt.impls["tables"])
        if self.smear_w is not None:
            before = gpt.embed1(seen_BS[:, begin - 1 : begin]) if begin else None
            e_BTD = smeared(e_BTD, before, self.smear_w, scalars["smear"][0])
        return norm(e_BTD)

    def pairs(self, gpt: Any, seen_BS: Tensor, begin: int, ngrams: Tensor | None) -> Tensor | None:
        """What several tokens together pick: the rows of `bigram_rows` and of `ngram_rows`, added up."""
        found = []
        if self.bigram_embed is not None:
            found.append(looked_up(self.bigram_embed, self.bigram_rows(seen_BS)[:, begin:], gpt.impls["tables"]))
        if self.ngrams is not None:
            found.append(self.ngrams(seen_BS)[:, begin:] if ngrams is None else ngrams)
        return sum(found[1:], found[0]) if found else None

    def skipped(self, x_BTD: Tensor, x0: Tensor, layer: int, outputs: dict[int, Tensor], scalars: Any) -> Tensor:
        """x + w output; with `skip_gates` (#151) w = 2 sigmoid(b) sigmoid(h . x0[:16])."""
        output = outputs[self.skips[layer]]
        if self.skip_w is None:
            return x_BTD + scalars["skips"][layer] * output
        number = list(self.skips).index(layer)
        opened = 2 * torch.sigmoid(scalars["skips"][number])
        return x_BTD + opened * gate(x0, self.skip_w[number : number + 1]) * output

    def mixes_of(
        self, gpt: Any, scalars: dict[str, Tensor], shared: list[Tensor], layers: range, gates: list[Gates]
    ) -> list[Callable[[Tensor], Tensor]]:
        """How the stream that enters each of the layers is mixed with both embeddings and, if there is one, the bigram
        table: `resid_init` is its own factor at first, `bigram_init_weight` the table's. The last layer of
        `dynamic_skips` has none: it goes by its networks' factors."""
        layers = layers[: self.config.num_layers - 1 - layers.start] if self.dynamic is not None else layers
        if not layers:
            return []
        beta_L1 = None if self.bigram_mixes is None else self.bigram_mixes[:, None]
        tables = [table for table in (scalars["mixes"], self.mixes) if table is not None]
        own = torch.cat(tables, 1)[:, : 2 + (gpt.embed2 is not None)]
        factors = torch.cat([own, beta_L1], 1) if beta_L1 is not None else own
        between, pairs = [None] * (gpt.embed2 is not None), beta_L1 is not None
        by_token = [[gates[n].first, *between, *([gates[n].pairs] * pairs)] for n in layers] if gates else ()
        return mixes_of_layers(factors[layers.start : layers.stop], shared, by_token=by_token, impl=gpt.impls["mix"])

    def added(
        self, x_BTD: Tensor, found: HeadOutputs | None, impls: Any, x0: Tensor, bigram: Any, factors: Any
    ) -> Tensor:
        """Stream plus what attention found, projected back; in the last layer of `dynamic_skips`, their mixture."""
        y_BTD = x_BTD if found is None else products.added(x_BTD, found.y, impls["w_o"], impls, found.largest)
        if factors is None:
            return y_BTD
        m = factors[0]
        return replaced(x_BTD, y_BTD, m[4:6], (m[6], x0), *([] if bigram is None else [(m[7], bigram)]))

    def attend(
        self,
        block: Any,
        x_BTD: Tensor,
        ve_BTD: Tensor | None,
        scalars_2: Tensor,
        rotary: Any,
        plan: Any,
        impls: Any,
        gpt: Any,
        cache: Any,
        dynamic: Any,
        gates: Any = None,
    ) -> HeadOutputs | None:
        """What a layer's heads find, side by side, before it is projected back; None for a layer without attention.
        impls: of the layer, with its weights (`trainer.products.of_layers`)."""
        if not block.has_attention:
            return None
        c, layer, D, H = self.config, block.layer, x_BTD.size(-1), self.config.num_heads
        if c.norm_before_attention:
            qkv_BTE, y_BTG = products.normed_linear(x_BTD, impls["w_qkv"], impls, GATE_INPUTS)
        else:
            qkv_BTE, y_BTG = products.linear(x_BTD, impls["w_qkv"], impls), x_BTD
        narrow = narrow_rows(c, layer)
        R = D // H // 2  # columns of the tables for wide heads; those for narrow ones follow
        rotary = tuple(table[:, R:] if narrow else table[:, :R] for table in rotary)
        scale = c.narrow_qk_scale if narrow and c.narrow_qk_scale else c.attention_scale
        pair, impl = layer in self.paired, impls["attention_inputs"] if cache is None else "reference"
        q, k, v, own = head_inputs(
            qkv_BTE,
            rotary,
            heads=H,
            width=D // H,
            ve_BTD=ve_BTD,
            factor_BTH=None if ve_BTD is None else self.value_factor(y_BTG, layer, dynamic[0]),
            more_BTD=dynamic[1],
            s_2=None if c.output_scalar else scalars_2,
            query_factor=gpt.query_factor,
            value_norm=c.value_norm,
            offset=layer in self.offset,
            paired=pair,
            with_own=c.xsa and not pair,
            keys_before=None if cache is None else lambda k: cache.last_key(layer, k),
            impl=impl,
        )
        mixing = None
        if self.head_mixing is not None and layer == c.num_layers - 1:
            mixing = self.head_mixing(norm(x_BTD) if c.norm_before_attention else x_BTD)
        if cache is None:
            o_BTHDh = attention(q, k, v, plan, scale=scale, impl=impls["attention"])
            if mixing is not None:
                o_BTHDh = o_BTHDh + mixed_heads(q, k, v, mixing, plan.first_key_BT, scale)
        else:
            o_BTHDh = cache.attend(layer, q, k, v, plan.first_key_BT, scale, 2 if pair else 1, mixing)
        alpha, gate = None, self.opened(y_BTG, layer, gates) if c.output_gates else None  # #117
        if own is not None:
            alpha = self.xsa_w[layer] if self.xsa_w is not None else gates.alpha
        measured = products.in_8_bits(impls, "fp8")
        return head_outputs(o_BTHDh, own, alpha, gate, paired=pair, measured=measured, impl=impl)

    def opened(self, y_BTG: Tensor, layer: int, gates: Any) -> Tensor:
        """How far each head's gate is open, (B, T, H)."""
        if self.output_gates is None:
            return gates.output
        return gate(y_BTG, self.output_gates[layer].to(y_BTG.dtype))

    def value_factor(self, y_BTG: Tensor, layer: int, factors: Any) -> Tensor | None:
        """(B, T, H): with `value_gates` (#186) a value embedding comes with a factor 2 sigmoid(G y[:16]) a head, in the
        last layer of `dynamic_skips` with a network's; None: with what scalars say."""
        if factors is not None:
            H = self.config.num_heads
            return 2 + torch.cat([row[3].expand(-1, -1, H // 2) for row in factors], -1)
        if self.value_gates is None:
            return None
        return 2 * gate(y_BTG, self.value_gates[self.gated.index(layer)].to(y_BTG.dtype))
