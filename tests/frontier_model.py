"""The runs behind presets record18 (F0) and f3 (F3) once more, in the slowest and most literal way: float64, one loop
or einsum a sentence of their description.

Nothing here is shared with train_gpt.py, trainer/ or kernels/ but the names of the parameters. `loss` is the model,
`Literal` a run: schedules, gradients by autograd, NorMuon and Adam, one matrix after the other."""

import math

import torch

WINDOWS = [3, 7, 11, 13, 15, 17, 19, 21, 23, 23, 23, 23]
POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
T_ = "techniques."


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def sees(tokens, eos, tokens_back):
    """(T, T): causal, same document, at most so many tokens back."""
    T, document, count = len(tokens), [], 0
    for token in tokens.tolist():
        count += token == eos
        document.append(count)
    seen = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        for j in range(max(0, i - tokens_back), i + 1):
            seen[i, j] = document[i] == document[j]
    return seen


def rotate(x_THDh, frequencies):
    half = x_THDh.shape[-1] // 2
    out = torch.zeros_like(x_THDh)
    angle = torch.arange(len(x_THDh), dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    for r in range(half):
        cos, sin = angle[:, r, None].cos(), angle[:, r, None].sin()
        out[..., r] = x_THDh[..., r] * cos + x_THDh[..., half + r] * sin
        out[..., half + r] = -x_THDh[..., r] * sin + x_THDh[..., half + r] * cos
    return out


def plain_frequencies(Dh):
    return [(1 / 1024) ** (i / (Dh // 4 - 1)) for i in range(Dh // 4)] + [0.0] * (Dh // 4)


def bigram_rows(tokens, rows):
    picked = [rows - 1]
    for t in range(1, len(tokens)):
        wrapped = (36313 * int(tokens[t])) ^ (27191 * int(tokens[t - 1]))
        picked.append(wrapped % (rows - 1))
    return torch.tensor(picked)


def network(w, j, x):
    """m (T, 2, 8) of network j."""
    hidden = x @ w[T_ + "dynamic.in_w"][j].T
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    m = hidden @ w[T_ + "dynamic.out_w"][j].T
    return 0.2 / math.sqrt(3) * (m.view(len(x), 2, 8) + w[T_ + "dynamic.bias"][j])


def gate16(x, g):
    return torch.sigmoid(x[:, :16] @ g.T)


def loss(
    w, tokens, targets, *, heads, W, eos, weights, f3, frequencies=None, scale=0.1, block=128, backout=11, late=11
):
    """Summed loss of one packed sequence in training; W: the long window of the step, weights: of the targets."""
    L, T, D = 16, len(tokens), w["head_w"].shape[1]
    Dh, long_layers = D // heads, (0, 4, 11, 15)
    frequencies = plain_frequencies(Dh) if frequencies is None else frequencies
    s = w["scalars"]
    b, r, s01 = s[:3], s[3:19], s[19:51].view(16, 2)
    a, c = s[51], None if f3 else s[52]
    p, q_ = w[T_ + "mixes"].unbind(1)
    masks = {True: sees(tokens, eos, block * W), False: sees(tokens, eos, block * min(11, W // 2))}
    # Input
    e = w["embed1.weight"][tokens]
    rows = [e[0]]
    for t in range(1, T):
        rows.append(e[t] + a * torch.sigmoid(w[T_ + "smear_w"][0] @ e[t, :16]) * e[t - 1])
    x0 = rms(torch.stack(rows))
    x2 = rms(w["embed2.weight"][tokens])
    B = w[T_ + "bigram_embed.weight"][bigram_rows(tokens, len(w[T_ + "bigram_embed.weight"]))] if f3 else None
    ve = [w[f"value_embeds.{i}.weight"][tokens] for i in range(5)]
    x, out, value_gate = x0, [], iter(range(10))
    m = v15 = None
    for i in range(L):
        for k, (source, target) in enumerate(((6, 9), (4, 10), (2, 11))):
            if i == target:
                h = w[T_ + "skip_w"][k]
                x = x + 2 * torch.sigmoid(b[k]) * torch.sigmoid(x0[:, :16] @ h)[:, None] * out[source]
        special = f3 and i == 15
        if not special:
            x = r[i] * x + p[i] * x0 + q_[i] * x2
            if f3:
                x = x + w[T_ + "bigram_mixes"][i] * B
        # Attention
        y = rms(out[late]) if f3 and i >= 12 else rms(x)
        wq, wk, wv, wo = w[f"blocks.{i}.qkvo_w"]
        q, k, v = ((y @ (s01[i, 0] * part).T).view(T, heads, Dh) for part in (wq, wk, wv))
        q, k = rotate(rms(q), frequencies), rotate(rms(k), frequencies)
        if special:
            v = v + v15.view(T, heads, Dh)
        table = i if i <= 4 else i - 11 if i >= 11 else None
        if special:
            half = heads // 2
            gate = torch.cat([(2 + m[:, 0, 3:4]).expand(T, half), (2 + m[:, 1, 3:4]).expand(T, half)], 1)
            v = v + gate[:, :, None] * ve[4].view(T, heads, Dh)
        elif table is not None:
            gate = 2 * gate16(y, w[T_ + "value_gates"][next(value_gate)])
            v = v + gate[:, :, None] * ve[table].view(T, heads, Dh)
        if i in long_layers:
            quarter, shifted = Dh // 4, k.clone()
            for t in range(1, T):
                for d in (*range(quarter, 2 * quarter), *range(3 * quarter, 4 * quarter)):
                    shifted[t, :, d] = k[t - 1, :, d]
            k = shifted
        logits = scale * torch.einsum("ihd,jhd->hij", q, k)
        weight = logits.masked_fill(~masks[i in long_layers], -math.inf).softmax(-1)
        o = torch.einsum("hij,jhd->ihd", weight, v) * gate16(y, w[T_ + "output_gates"][i])[:, :, None]
        attention = o.reshape(T, D) @ (s01[i, 1] * wo).T
        mlp = lambda z, i=i: (rms(z) @ w[f"blocks.{i}.mlp_in_w"].T).relu().square() @ w[f"blocks.{i}.mlp_out_w"].T  # noqa: E731
        if special:
            x = m[:, 0, 4:5] * x + m[:, 0, 5:6] * attention + m[:, 0, 6:7] * x0 + m[:, 0, 7:8] * B
            x = m[:, 1, 4:5] * x + m[:, 1, 5:6] * mlp(x)
        else:
            x = x + attention
            x = x + mlp(x)
        out.append(x)
        if f3 and i == 14:
            m = network(w, 0, x)
            v15 = 1.15 * (m[:, 0, 0:1] * x0 + m[:, 0, 1:2] * out[11] + m[:, 0, 2:3] * x)
            x = (1 + m[:, 1, 2:3]) * x + m[:, 1, 0:1] * x0 + m[:, 1, 1:2] * out[11]
    if f3:
        n = network(w, 1, x)
        x = x + n[:, 1, 0:1] * x0 + n[:, 1, 1:2] * out[11] + n[:, 1, 2:3] * out[14] + n[:, 1, 3:4] * ve[0]
        x = x + n[:, 1, 4:5] * out[4]
    else:
        x = x - c * out[backout]
    z = 23 * torch.sigmoid((rms(x) @ w["head_w"].T + 5) / 7.5)
    log_p = z.log_softmax(-1)
    total = 0.0
    for k, weight in enumerate(weights):
        for t in range(T - k):
            total = total - weight * log_p[t, targets[t + k]]
    return total


# ---- the run ------------------------------------------------------------------------------------------------------


def orthogonal(u):
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (1.02 * x.double().norm() + 1e-6).to(x.dtype)
    for a, b, c in POLAR:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def rate_factor(step, steps):
    """f of a step of `steps` scheduled ones."""
    most = 1.0
    for after, value in ((1, 1.52), (2, 1.73), (3, 2.0)):
        if step > after * steps / 12:
            most = value
    if step < 0.3 * steps:
        return most
    w = (1 - step / steps) / 0.7
    return w * most + 0.1 * (1 - w)


def target_weights(step, steps):
    x = 4 * step / steps
    if x < 1 / 3:
        return [1, 0.5, 0.25 * (1 - 3 * x)]
    return [1, 0.5 * (2 - 3 * x)] if x < 2 / 3 else [1]


def yarn(step, steps, frequencies, until, block):
    """(frequencies, scale of the logits) of a step: once for each change of the window so far."""
    scale, W = 0.1, WINDOWS[0]
    for s in range(1, step + 1):
        new = WINDOWS[12 * s // steps]
        if new != W and (until == 0 or new <= until):
            u = [min(max((block * W * f / (2 * math.pi) - 1) / 31, 0), 1) for f in frequencies]
            frequencies = [f * (W / new + part * (1 - W / new)) for f, part in zip(frequencies, u)]
            scale *= 1 + 0.2 * math.log(new / W)
        W = new
    return frequencies, scale


def adam_rule(name, f3):
    """(rate, b1, b2, d) of a parameter."""
    if name in ("head_w", "embed1.weight"):
        return 0.004, 0.8, 0.95, 150
    if name.startswith(("embed2", "value_embeds")):
        return 0.3, 0.8, 0.95, 5
    later = (0.9, 0.99) if f3 else (0.8, 0.95)
    return {
        "scalars": (0.02 if f3 else 0.04, 0.9, 0.99, 0),
        T_ + "mixes": (0.02, *later, 0),
        T_ + "smear_w": (4e-5, *later, 0),
        T_ + "skip_w": (4e-5, *later, 0),
        T_ + "bigram_embed.weight": (0.3, 0.75, 0.95, 5),
        T_ + "bigram_mixes": (0.004, 0.9, 0.95, 0),
        T_ + "output_gates": (0.0004, 0.9, 0.99, 1),
        T_ + "value_gates": (0.0004, 0.9, 0.99, 1),
        T_ + "dynamic.in_w": (0.001, 0.9, 0.99, 1),
        T_ + "dynamic.out_w": (0.001, 0.9, 0.99, 1),
        T_ + "dynamic.bias": (0.001, 0.9, 0.99, 0),
    }[name]


def multiplier(name, f3):
    """Of NorMuon's rate."""
    return 0.1 if "gates" in name else 4 if "mlp_out" in name else 2 if "mlp_in" in name or not f3 else 1


class Literal:
    """A run of `steps` scheduled steps. weights: float64, named as in train_gpt.GPT, changed in place by `step`."""

    def __init__(self, weights, steps, *, f3, **how):
        self.w = {n: t.clone().requires_grad_() for n, t in weights.items()}
        self.steps, self.f3, self.how = steps, f3, how
        self.split = math.ceil(steps / 6) | 1
        self.momentum, self.second, self.sums, self.adam, self.adam_count = {}, {}, {}, {}, 0

    def gradients(self, step, sequences, until, block):
        """(mean loss a token, {name: gradient}) of a step's sequences."""
        D, heads = self.w["head_w"].shape[1], self.how["heads"]
        frequencies, scale = yarn(step, self.steps, plain_frequencies(D // heads), until, block)
        how = dict(W=WINDOWS[12 * step // self.steps], weights=target_weights(step, self.steps), f3=self.f3)
        how |= dict(frequencies=frequencies, scale=scale, block=block)
        total = sum(loss(self.w, *pair, **how, **self.how) for pair in sequences)
        names = list(self.w)
        found = torch.autograd.grad(total / len(sequences), [self.w[n] for n in names])
        return total.item() / sum(len(tokens) for tokens, _ in sequences), dict(zip(names, found))

    @torch.no_grad()
    def update(self, step, gradients):
        f = rate_factor(step, self.steps)
        for name, g in gradients.items():
            if name.startswith("blocks.") or (not self.f3 and name.endswith("_gates")):
                self.normuon(name, g, 0.015 * f, 0.85 + 0.1 * step / 300)
            else:
                self.sums[name] = self.sums.get(name, 0) + g
        if step % 2:
            self.adam_step(step, f)

    def normuon(self, name, g, lr, mu):
        m = self.momentum.setdefault(name, torch.zeros_like(g))
        m += (1 - mu) * (g - m)
        u, p = g + mu * (m - g), self.w[name]
        if "mlp_out" in name:  # stored 4D x D
            u, p = u.T, p.T
        parts = [((), u, p)] if u.dim() == 2 else [((i,), u[i], p[i]) for i in range(len(u))]
        for where, part, weight in parts:
            X = orthogonal(part)
            v = self.second.setdefault((name, *where), torch.zeros(len(X), 1, dtype=X.dtype))
            v += 0.05 * (X.square().mean(1, keepdim=True) - v)
            before = X.norm()
            X = X * v.clamp(min=1e-10) ** -0.5
            X = X * before / X.norm()
            rate = lr * multiplier(name, self.f3)
            weight -= rate * X + 1.2 * lr * rate * weight * (X * weight >= 0)

    def adam_step(self, step, f):
        self.adam_count += 1
        tied = step <= self.split
        if tied:
            self.sums["head_w"] = self.sums["head_w"] + self.sums.pop("embed1.weight")
        for name, g in self.sums.items():
            p = self.w[name]
            rate, b1, b2, d = adam_rule(name, self.f3)
            m, v = self.adam.setdefault(name, [torch.zeros_like(g), torch.zeros_like(g)])
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            unbiased = (m / (1 - b1**self.adam_count)), (v / (1 - b2**self.adam_count))
            update = rate * f * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
            p -= update + (rate * f) ** 2 * 0.005 * d * p * (update * p > 0)
        self.sums = {}
        if tied:
            self.w["embed1.weight"].copy_(self.w["head_w"])
        if step == self.split:
            self.adam["embed1.weight"] = [t.clone() for t in self.adam["head_w"]]
