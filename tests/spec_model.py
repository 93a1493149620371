"""The model of docs/spec.md once more, in the slowest and most literal way: float64, T x T masks, one line a sentence.

Nothing here is shared with train_gpt.py or kernels/ but the names of the parameters. The block mask is read
word by word: full and partial key blocks are listed and counted, nearest first."""

import math

import torch


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def block_mask(tokens: torch.Tensor, eos_id: int, window: int, block: int = 128) -> torch.Tensor:
    """Boolean (T, T): whether query i sees key j, with `window` counted in blocks."""
    T = tokens.numel()
    document = (tokens == eos_id).cumsum(0)
    allowed = torch.tril(torch.ones(T, T, dtype=torch.bool)) & (document[:, None] == document[None, :])
    seen = torch.zeros(T, T, dtype=torch.bool)
    for b in range(math.ceil(T / block)):
        rows = slice(b * block, min((b + 1) * block, T))
        full, partial = [], []
        for a in range(b, -1, -1):  # nearest first
            columns = slice(a * block, min((a + 1) * block, T))
            pairs = allowed[rows, columns]
            if pairs.all() and pairs.shape[1] == block:
                full.append(columns)
            elif pairs.any():
                partial.append(columns)
        kept = full[: max(window - 1, 0)] + partial[: max(window - len(full), 1)]
        for columns in kept:
            seen[rows, columns] = allowed[rows, columns]
    return seen


def rotate(x_THDh: torch.Tensor) -> torch.Tensor:
    T, _, Dh = x_THDh.shape
    frequencies = (1 / 1024) ** torch.linspace(0, 1, Dh // 4, dtype=torch.float64)
    frequencies = torch.cat([frequencies, torch.zeros(Dh // 4, dtype=torch.float64)])
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x1, x2 = x_THDh.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], dim=-1)


def spec_loss(
    weights: dict,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    *,
    layers: int,
    heads: int,
    window: int,
    eos_id: int,
    no_attention: set,
    long_layers: set,
    skips: dict,
    tables: int,
):
    """Mean cross-entropy of one packed sequence; `weights` are float64, named as in train_gpt.GPT."""
    scalars = weights["scalars"]
    skip_w, lambdas = scalars[:layers], scalars[layers : 4 * layers].view(layers, 3)
    mix = scalars[4 * layers :].view(layers, 2)
    masks = {True: block_mask(tokens, eos_id, window), False: block_mask(tokens, eos_id, window // 2)}
    x00, x01 = rms(weights["embed1.weight"][tokens]), rms(weights["embed2.weight"][tokens])
    x, outputs = x00, []
    for i in range(layers):
        if i in skips:
            x = x + skip_w[i] * outputs[skips[i]]
        x = lambdas[i, 0] * x + lambdas[i, 1] * x00 + lambdas[i, 2] * x01
        if i not in no_attention:
            wq, wk, wv, wo = weights[f"blocks.{i}.qkvo_w"]
            q, k, v = ((x @ w.T).view(len(tokens), heads, -1) for w in (wq, wk, wv))
            q, k, v = rotate(rms(q)), rotate(rms(k)), mix[i, 0] * rms(v)
            table = i if i < tables else i - layers + tables if i >= layers - tables else None
            if table is not None:
                v = v + mix[i, 1] * weights[f"value_embeds.{table}.weight"][tokens].view_as(v)
            logits = torch.einsum("ihd,jhd->hij", q, k) * 0.12
            weight = logits.masked_fill(~masks[i in long_layers], -math.inf).softmax(-1)
            x = x + torch.einsum("hij,jhd->ihd", weight, v).flatten(1) @ wo.T
        hidden = (rms(x) @ weights[f"blocks.{i}.mlp_in_w"].T).relu().square()
        x = x + hidden @ weights[f"blocks.{i}.mlp_out_w"].T
        outputs.append(x)
    z = rms(x) @ weights["head_w"].T
    z = 15 * z / (z * z + 225).sqrt()
    return (z.logsumexp(-1) - z.gather(-1, targets[:, None])[:, 0]).mean()
