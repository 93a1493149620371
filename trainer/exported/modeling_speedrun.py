"""The GPT of train_gpt.py for the transformers library, in plain torch: what `trust_remote_code=True` loads.

Two input embeddings mixed into every layer, value embeddings, U-net skips, half-truncated rotary, attention within a
document and a sliding window of blocks, a soft-capped head. A document begins with the end-of-text token: put it before
a prompt. Names of parameters are those of train_gpt.py's checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class SpeedrunConfig(PretrainedConfig):
    """The fields of train_gpt.py's Config that make the model; layer lists are written 0,4,11 and skips 6>9,4>10."""

    model_type = "speedrun-gpt"

    def __init__(
        self,
        vocab_size=256,
        eos_id=0,
        num_layers=4,
        model_dim=64,
        num_heads=2,
        mlp_ratio=4,
        attention_scale=0.4,
        soft_cap="rsqrt",
        second_input_embedding=True,
        second_embedding_context=1,
        value_embedding_context=1,
        context_rows=32768,
        value_embeddings=1,
        unet_skips="1>3",
        attention_free_layers="",
        half_truncated_rotary=True,
        block_tokens=32,
        window_max_tokens=256,
        long_window_layers="0,3",
        **kwargs,
    ):
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.num_layers, self.model_dim, self.num_heads, self.mlp_ratio = num_layers, model_dim, num_heads, mlp_ratio
        self.num_hidden_layers, self.hidden_size, self.num_attention_heads = num_layers, model_dim, num_heads
        self.attention_scale, self.soft_cap = attention_scale, soft_cap
        self.second_input_embedding, self.value_embeddings = second_input_embedding, value_embeddings
        self.second_embedding_context, self.value_embedding_context = second_embedding_context, value_embedding_context
        self.context_rows = context_rows
        self.unet_skips, self.attention_free_layers = unet_skips, attention_free_layers
        self.half_truncated_rotary, self.block_tokens = half_truncated_rotary, block_tokens
        self.window_max_tokens, self.long_window_layers = window_max_tokens, long_window_layers
        kwargs = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id, "use_cache": False} | kwargs
        super().__init__(**{**kwargs, "tie_word_embeddings": False})


def _layers(text):
    return {int(number) for number in text.split(",") if number.strip()}


def _skips(text):
    pairs = [pair.split(">") for pair in text.split(",") if pair.strip() and pair.strip() != "none"]
    return {int(target): int(source) for source, target in pairs}


def _norm(x):
    return F.rms_norm(x, (x.size(-1),))


class SpeedrunBlock(nn.Module):
    """Residual mix, attention (if the layer has it), MLP."""

    def __init__(self, config, layer):
        super().__init__()
        D, self.heads, self.scale = config.model_dim, config.num_heads, config.attention_scale
        self.has_attention = layer not in _layers(config.attention_free_layers)
        if self.has_attention:
            self.qkvo_w = nn.Parameter(torch.zeros(4, D, D))
        self.mlp_in_w = nn.Parameter(torch.zeros(config.mlp_ratio * D, D))
        self.mlp_out_w = nn.Parameter(torch.zeros(D, config.mlp_ratio * D))

    def forward(self, x, x00, x01, value_embedding, mix, value_mix, allowed, rotary):
        mixed = mix[0] * x.float() + mix[1] * x00.float()
        if x01 is not None:
            mixed = mixed + mix[2] * x01.float()
        x = mixed.to(x.dtype)
        if self.has_attention:
            x = x + self.attend(x, value_embedding, value_mix, allowed, rotary)
        return x + F.linear(F.linear(_norm(x), self.mlp_in_w).relu().square(), self.mlp_out_w)

    def attend(self, x, value_embedding, value_mix, allowed, rotary):
        B, T, D = x.shape
        q, k, v = F.linear(x, self.qkvo_w[:3].flatten(0, 1)).view(B, T, 3 * self.heads, -1).chunk(3, dim=2)
        cos, sin = (table[:, None] for table in rotary)

        def rotate(x):
            x1, x2 = _norm(x).chunk(2, dim=-1)
            return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)

        v = value_mix[0].to(v.dtype) * _norm(v)
        if value_embedding is not None:
            v = v + value_mix[1].to(v.dtype) * value_embedding.view(B, T, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q), rotate(k), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale)
        return F.linear(y.transpose(1, 2).reshape(B, T, D), self.qkvo_w[3])


class SpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits (B, T, V) in float32; with `labels` the mean cross-entropy of the next token over all head classes."""

    config_class = SpeedrunConfig
    _no_split_modules = ["SpeedrunBlock"]
    _keep_in_fp32_modules_strict = ["scalars", "head_w"]

    def __init__(self, config):
        super().__init__(config)
        D, L = config.model_dim, config.num_layers
        self.embed1 = nn.Embedding(config.vocab_size, D)
        contexts = config.second_embedding_context, config.value_embedding_context
        rows2, rows_v = (config.vocab_size if length == 1 else config.context_rows for length in contexts)
        self.embed2 = nn.Embedding(rows2, D) if config.second_input_embedding else None
        tables = [nn.Embedding(rows_v, D) for _ in range(config.value_embeddings)]
        self.value_embeds = nn.ModuleList(tables)
        self.blocks = nn.ModuleList([SpeedrunBlock(config, layer) for layer in range(L)])
        self.head_w = nn.Parameter(torch.zeros(-(-config.vocab_size // 128) * 128, D))
        self.scalars = nn.Parameter(torch.zeros(6 * L))
        self.post_init()

    def _init_weights(self, module):
        """Weights are read from a file."""

    def get_input_embeddings(self):
        return self.embed1

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _allowed(self, input_ids, attention_mask, blocks):
        """Bool (B, 1, T, T): the key is not later, in the same document, and among the query's `blocks` of keys."""
        position = torch.arange(input_ids.size(1), device=input_ids.device)
        opens = input_ids == self.config.eos_id
        if attention_mask is not None:  # padding is a document of its own
            seen = attention_mask.bool()
            opens = opens | (seen != F.pad(seen, (1, 0))[:, :-1])
        first = torch.where(opens, position, 0).cummax(dim=1).values
        size = self.config.block_tokens
        oldest = position - position % size - (max(blocks, 1) - 1) * size
        first = torch.maximum(first, oldest)
        return ((position[None, :] <= position[:, None]) & (position >= first[:, :, None]))[:, None]

    def _rows(self, input_ids, length):
        """The row that each position's last `length` tokens pick; those before the document count as its first."""
        mixed, T = input_ids, input_ids.size(1)
        document = (input_ids == self.config.eos_id).cumsum(-1)
        for back in range(1, length):
            earlier, theirs = (F.pad(x, (back, 0), value=-1)[:, :T] for x in (input_ids, document))
            mixed = (mixed * 1_000_003 + torch.where(theirs == document, earlier, self.config.eos_id)) % (2**31 - 1)
        return mixed if length == 1 else mixed % self.config.context_rows

    def _rotary(self, length, device):
        c = self.config
        width = c.model_dim // c.num_heads
        rotating = width // 4 if c.half_truncated_rotary else width // 2
        frequencies = (1 / 1024) ** torch.linspace(0, 1, steps=rotating, dtype=torch.float32, device=device)
        frequencies = torch.cat([frequencies, frequencies.new_zeros(width // 2 - rotating)])
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        return angles.cos(), angles.sin()

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        c, L = self.config, self.config.num_layers
        blocks = -(-c.window_max_tokens // c.block_tokens)
        long, short = (self._allowed(input_ids, attention_mask, w) for w in (blocks, blocks // 2))
        rotary = self._rotary(input_ids.size(1), input_ids.device)
        skip_w, mixes, value_mixes = self.scalars.split([L, 3 * L, 2 * L])
        rows2 = self._rows(input_ids, c.second_embedding_context)
        rows_v = self._rows(input_ids, c.value_embedding_context)
        tables = [table(rows_v) for table in self.value_embeds]
        values = dict(enumerate(tables)) | {L - len(tables) + i: table for i, table in enumerate(tables)}
        x00 = x = _norm(self.embed1(input_ids))
        x01 = None if self.embed2 is None else _norm(self.embed2(rows2))
        skips, long_layers = _skips(c.unet_skips), _layers(c.long_window_layers)
        outputs: dict = {}
        for layer, block in enumerate(self.blocks):
            if layer in skips:
                x = (x + skip_w[layer] * outputs[skips[layer]]).to(x00.dtype)
            mix, value_mix = mixes.view(L, 3)[layer], value_mixes.view(L, 2)[layer]
            allowed = long if layer in long_layers else short
            outputs[layer] = x = block(x, x00, x01, values.get(layer), mix, value_mix, allowed, rotary)
        x = _norm(x)
        z = self._capped(F.linear(x, self.head_w.to(x.dtype)).float())
        loss = None
        if labels is not None:
            loss = F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=z[..., : c.vocab_size])

    def _capped(self, z):
        if self.config.soft_cap == "rsqrt":
            return 15 * z * torch.rsqrt(z * z + 225)
        return 23 * torch.sigmoid((z + 5) / 7.5) if self.config.soft_cap == "sigmoid" else z
