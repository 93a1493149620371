"""Counted bytes and FLOPs of the `medium` run on 8 to 64 GPUs, and what they say about step time: docs/scaling.md.

    python -m bench.scaling                              # bench/results/scaling-counted.json and docs/scaling.md
    python -m bench.scaling --tokens "data/fineweb10B/fineweb_train_*.bin"    # also count the tokens of real batches

Nothing here is measured but the published figures of the reference run (`PUBLISHED`); the rest is counted from the
model's shapes, which are made on torch's meta device. Bandwidths are assumptions, named as such.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPO, RESULTS, table, write_json
from trainer.options import command, setting

# Public log of the track's second-input-embedding record: 8 H100 of one node, 65,536 tokens a GPU.
PUBLISHED = {"gpus": 8, "step_ms": 247.37, "peak_memory_mib": 53988, "tokens_per_gpu": 65536}
MATMUL_TFLOPS = 790.0  # measured on an H200 with large bf16 products (as the reference's floor was derived)
# GB/s that one GPU can send. Names of links, their nominal rates; what a ring reaches of them is not measured.
LINKS = {"NVLink 4 (450 GB/s)": 450.0, "400 Gb/s a GPU (50 GB/s)": 50.0, "400 Gb/s a node (6.25 GB/s)": 6.25}
GPUS = (8, 16, 32, 64)
RESULT = RESULTS / "scaling-counted.json"


def model_parts():
    """(config, {name: parameter}) of `medium` on the meta device: shapes without memory."""
    import torch

    import train_gpt

    config = train_gpt.Config()
    with torch.device("meta"):
        model = train_gpt.GPT(config)
    return config, dict(model.named_parameters())


def size_bytes(tensors) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def memory_bytes(parameters: dict) -> dict[str, int]:
    """Bytes of state on each GPU, by part; nothing of it is sharded."""
    matrices = [p for n, p in parameters.items() if n.startswith("blocks.")]
    tables = [p for n, p in parameters.items() if "embed" in n]
    head = [parameters["head_w"]]
    numbers = sum(p.numel() for p in matrices)
    return {
        "weights: matrices (bf16)": size_bytes(matrices),
        "weights: lower halves of the matrices (int16)": 2 * numbers,
        "weights: embedding tables (bf16)": size_bytes(tables),
        "weights: head (float32)": size_bytes(head),
        "momentum of Muon (float32)": 4 * numbers,
        "moments of Adam, tables (bf16)": 2 * size_bytes(tables),
        "moments of Adam, head (float32)": 2 * size_bytes(head),
        "gradients": size_bytes([*matrices, *tables, *head]),
    }


def product_flops_per_token(parameters: dict) -> dict[str, float]:
    """FLOPs a token in matrix products, forward and backward (6 a weight), by part."""
    groups = {"attention projections": "qkvo", "MLP": "mlp_", "head": "head_w"}
    return {name: 6.0 * sum(p.numel() for n, p in parameters.items() if key in n) for name, key in groups.items()}


def attention_flops_per_token(config, keys_long: float = 859.0, keys_short: float = 688.0) -> float:
    """FLOPs a token in attention itself, forward and backward (2 + 5 products of width D over the keys seen).

    keys_*: keys a token sees at windows 3456 and 1664 with FineWeb's documents (from public token counts)."""
    import train_gpt

    free, long = (train_gpt._layers(text) for text in (config.attention_free_layers, config.long_window_layers))
    keys = sum(keys_long if i in long else keys_short for i in range(config.num_layers) if i not in free)
    return 2.0 * 7 * config.model_dim * keys


def muon_flops(parameter) -> float:
    """FLOPs of orthogonalising one parameter's matrices: five steps of three products, on the shorter side."""
    m, n = sorted(parameter.shape[-2:])
    return parameter[..., 0, 0].numel() * 5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)


def count(gpus: int, parameters: dict, config, rows: int) -> dict:
    """What one GPU of `gpus` computes and sends in a step."""
    from trainer.exchange import bytes_per_step, owners

    matrices = {n: p for n, p in parameters.items() if n.startswith("blocks.")}
    tables = {n: p for n, p in parameters.items() if "embed" in n}
    sent = bytes_per_step(matrices, tables, parameters["head_w"], gpus, rows)
    load = dict.fromkeys(range(gpus), 0.0)
    for name, rank in owners(matrices, gpus).items():
        load[rank] += muon_flops(parameters[name])
    tokens = config.tokens_per_step // gpus
    flops = sum(product_flops_per_token(parameters).values()) + attention_flops_per_token(config)
    return {
        "gpus": gpus,
        "tokens_per_gpu": tokens,
        "train_seq_len": min(tokens, config.train_seq_len),
        "tflop_model": flops * tokens / 1e12,
        "tflop_orthogonalisation_all": sum(map(muon_flops, matrices.values())) / 1e12,
        "tflop_orthogonalisation_busiest_owner": max(load.values()) / 1e12,
        "bytes_plain": sent["plain"],
        "bytes_overlap": sent["overlap"],
    }


def predicted(counted: dict) -> dict:
    """Step time in ms by link: the published compute scaled with the tokens, and the bytes at the nominal rate.

    `hidden`: all communication behind compute; `exposed`: none of it. The truth lies between."""
    compute_ms = PUBLISHED["step_ms"] * counted["tokens_per_gpu"] / PUBLISHED["tokens_per_gpu"]
    owner_ms = counted["tflop_orthogonalisation_busiest_owner"] / MATMUL_TFLOPS * 1e3
    sent = sum(counted["bytes_overlap"].values())
    links = {}
    for name, gb_per_s in LINKS.items():
        send_ms = sent / gb_per_s / 1e6
        links[name] = {"send_ms": send_ms, "hidden_ms": max(compute_ms, send_ms), "exposed_ms": compute_ms + send_ms}
    return {"compute_ms": compute_ms, "orthogonalisation_floor_ms": owner_ms, "links": links}


def limit_gpus(counted: dict, gb_per_s: float) -> float:
    """GPUs at which sending takes as long as computing: beyond it more GPUs bring nothing, even if all is hidden."""
    send_ms = sum(counted["bytes_overlap"].values()) / gb_per_s / 1e6
    return PUBLISHED["step_ms"] * PUBLISHED["gpus"] / send_ms


def touched_rows(files: str, tokens: int, batches: int = 20) -> dict:
    """Distinct tokens in batches of `tokens` consecutive ones of real shards: mean, least and most."""
    import numpy as np

    from data.shards import TokenStream

    with_ends = TokenStream(files, sequence_tokens=tokens, sequences_per_step=1, vocab_size=50257)
    found = [len(np.unique(with_ends.window(i, 0))) for i in range(min(batches, with_ends.steps_per_epoch))]
    return {
        "batch_tokens": tokens,
        "batches": len(found),
        "mean": sum(found) / len(found),
        "min": min(found),
        "max": max(found),
    }


def result(rows: dict | None) -> dict:
    """Everything that the page says, as numbers."""
    config, parameters = model_parts()
    touched = config.vocab_size if rows is None else round(rows["mean"])
    counts = [count(gpus, parameters, config, touched) for gpus in GPUS]
    memory = memory_bytes(parameters)
    state = sum(memory.values())
    rest_mib = PUBLISHED["peak_memory_mib"] - state / 2**20
    return {
        "published": PUBLISHED,
        "links_gb_per_s": LINKS,
        "matmul_tflops": MATMUL_TFLOPS,
        "parameters": sum(p.numel() for p in parameters.values()),
        "rows": rows,
        "memory_bytes": memory,
        "state_mib": state / 2**20,
        "rest_mib": rest_mib,
        "product_flops_per_token": product_flops_per_token(parameters),
        "attention_flops_per_token": attention_flops_per_token(config),
        "counts": counts,
        "predicted": [predicted(c) for c in counts],
        "limit_gpus": {name: limit_gpus(counts[-1], rate) for name, rate in LINKS.items()},
    }


def page(r: dict) -> str:
    """docs/scaling.md."""
    counts, first, last = r["counts"], r["counts"][0], r["counts"][-1]
    memory = [{"part": name, "MiB": round(size / 2**20)} for name, size in r["memory_bytes"].items()]
    memory += [
        {"part": "**state, counted**", "MiB": round(r["state_mib"])},
        {"part": "activations and workspace: the published peak less the state", "MiB": round(r["rest_mib"])},
        {"part": "**peak, published**", "MiB": r["published"]["peak_memory_mib"]},
    ]
    share = [
        {
            "GPUs": c["gpus"],
            "tokens a GPU": c["tokens_per_gpu"],
            "sequence": c["train_seq_len"],
            "model TFLOP (full window)": round(c["tflop_model"], 1),
            "orthogonalisation TFLOP, busiest": round(c["tflop_orthogonalisation_busiest_owner"], 2),
            "activations MiB": round(r["rest_mib"] * c["tokens_per_gpu"] / r["published"]["tokens_per_gpu"]),
        }
        for c in counts
    ]
    parts = [
        {"part": part}
        | {
            f"{way}, {c['gpus']} GPUs": round(c[f"bytes_{way}"][part] / 2**20)
            for way in ("plain", "overlap")
            for c in (first, last)
        }
        for part in first["bytes_plain"]
    ]
    parts.append(
        {"part": "**all**"}
        | {
            f"{way}, {c['gpus']} GPUs": round(sum(c[f"bytes_{way}"].values()) / 2**20)
            for way in ("plain", "overlap")
            for c in (first, last)
        }
    )
    times = []
    for c, p in zip(counts, r["predicted"]):
        row = {"GPUs": c["gpus"], "compute": f"{p['compute_ms']:.0f}"}
        for name, t in p["links"].items():
            row[name] = f"{t['hidden_ms']:.0f} to {t['exposed_ms']:.0f}"
        times.append(row)
    rows = r["rows"]
    touched = (
        f"{rows['mean']:.0f} distinct tokens a batch of {rows['batch_tokens']:,} (counted in {rows['batches']} batches "
        f"of tokenised web text, {rows['min']} to {rows['max']})"
        if rows
        else "the whole vocabulary as a bound (no token shards were given to count in)"
    )
    limits = "; ".join(f"{name}: {gpus:.0f} GPUs" for name, gpus in r["limit_gpus"].items())
    at_limit = f"{last['tflop_orthogonalisation_busiest_owner'] / r['matmul_tflops'] * 1e3:.2f} ms"
    return "\n".join(
        [
            "# Scaling out",
            "",
            "Generated by `python -m bench.scaling`; do not edit. Counted from the shapes of `medium` "
            f"({r['parameters'] / 1e6:.0f}M parameters); the only measurements are the published ones of the reference run "
            f"({r['published']['step_ms']} ms a step and {r['published']['peak_memory_mib']:,} MiB on "
            f"{r['published']['gpus']} H100). **No run on more than eight GPUs, or on several hosts with GPUs, has been "
            "measured.**",
            "",
            "## How to run it",
            "",
            "On each of N hosts with 8 GPUs, the same command:",
            "",
            "    torchrun --nnodes=N --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=FIRST_HOST:29400 \\",
            "        --rdzv_id=NAME train_gpt.py --run_name=NAME",
            "",
            "Up to eight processes the training is the same as on one host. Beyond eight, a step's "
            f"{first['tokens_per_gpu'] * 8:,} tokens are cut into more, shorter sequences: documents and attention windows "
            "end at their borders, so it is another run, and the log says so. The number of processes must divide the "
            "tokens of a step. Data must be readable on every host; only the first host writes, and only it needs the "
            "checkpoints on `--resume=auto`. Tested with two hosts as network namespaces (gloo, CPU): tests/test_hosts.py.",
            "",
            "With `--max-restarts` on several hosts, set `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` for torchrun: otherwise "
            "restarted processes may read the addresses of dead ones (https://github.com/pytorch/pytorch/issues/135712). "
            "On one host the program sees to that itself.",
            "",
            "## Memory of a GPU",
            "",
            table(memory),
            "",
            "State is not sharded, so it does not shrink with more GPUs; activations go with the tokens of a GPU.",
            "",
            "## Work of a GPU and step",
            "",
            table(share),
            "",
            "## Bytes that a GPU sends in a step, MiB",
            "",
            table(parts),
            "",
            f"Rings are assumed. Tables under `overlap` send the rows that the batch touched: {touched}. `overlap` sends "
            "matrices and head half before and half after the update, where other work can hide it.",
            "",
            "## Step time to expect, ms (not measured)",
            "",
            "Compute is the published step time, scaled with the tokens. The columns add sending at a link's nominal rate: "
            "from all of it hidden to none of it.",
            "",
            table(times),
            "",
            "## Where it stops",
            "",
            f"Sending does not shrink with more GPUs, compute does. They are equal at: {limits}. Beyond that, more GPUs "
            "bring nothing even if everything overlaps. Well before it, three things eat the gain, none of them measured "
            "here: kernels lose efficiency on few tokens; the updates of embedding tables are done by every GPU; "
            f"orthogonalisation cannot be split below one parameter (at best {at_limit} at "
            f"{r['matmul_tflops']:.0f} TFLOP/s with {last['gpus']} GPUs).",
            "",
        ]
    )


@dataclass(frozen=True)
class Options:
    """What is counted."""

    tokens: str | None = setting(None, "glob", "of shards in which to count the distinct tokens of a batch")


def main(arguments: list[str] | None = None) -> int:
    """Count, keep the numbers, write the page."""
    _, options = command(__doc__, arguments, Options)
    before = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else None  # counted once, kept
    rows = touched_rows(options.tokens, 524288) if options.tokens else before
    found = result(rows)
    write_json(RESULT, found)
    path = REPO / "docs" / "scaling.md"
    path.write_text(page(found), encoding="utf-8")
    print(f"{RESULT.relative_to(REPO)}, {Path(path).relative_to(REPO)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
