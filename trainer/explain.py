"""`python train_gpt.py explain medium f3`: the fields in which two presets differ, a sentence and the source of each.

The sentence is the field's own, of `--help`. Sources are pull requests (#130) of the public speedrun,
https://github.com/KellerJordan/modded-nanogpt, or records of its folder by their dates; a field that is not in the
table is a number that the run it comes from was tuned to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.options import UsageError
from trainer.presets import OWN

#: The proposal that each preset repeats.
PRESETS = {"medium": "#124", "record18": "#188", "f2": "#252", "f3": "#261", "frontier": "put together here"}

#: Field -> where the technique that it switches or tunes was first shown.
SOURCES = {
    "align_documents": "#108", "max_document_tokens": "#108",
    "early_document_tokens": "#224", "batch_schedule": "#163", "lr_schedule": "#163",
    "extension_steps": "#131", "lr_floor": "#131, higher before an average: #347",
    "window_schedule": "#122", "validation_window": "#127",
    "short_window_max": "#188", "yarn_until": "#122; every window: #248; arXiv:2309.00071",
    "mtp": "#178; arXiv:2404.19737", "muon_momentum_cooldown": "#188", "adam_every": "#188",
    "tie_embeddings_frac": "#175, untied late: #178", "tied_init_std": "#175", "exact_windows": "#188",
    "attention_init_std": "#188", "value_init_std": "#188", "loss_sum": "#188", "resid_init": "#159",
    "norm_before_attention": "#188", "value_norm": "#188", "output_scalar": "#188", "attention_free_layers": "#188",
    "smear": "#130", "skip_gates": "#188", "backout_layer": "#140", "value_gates": "#186", "output_gates": "#117",
    "key_offset": "#169", "soft_cap": "#181", "normuon_beta2": "#144; arXiv:2510.05491",
    "muon_coefficients": "#134; arXiv:2505.16932", "cautious_decay": "#154, in Adam #172",
    "muon_lr_factors": "#188", "muon_weight_decay": "#154", "adam_weight_decay": "#172", "adam_decay": "#172",
    "bigram_rows": "#201", "bigram_init_weight": "#201", "bigram_mix_lr": "#201",
    "ngram_rows": "#360, in host memory #366; signs: #299", "ngram_lr": "#360",
    "gate_optimizer": "#187",
    "gate_lr": "#187", "adam_moments": "#187", "matrix_dtype": "#252",
    "products": "head: #248; MLP: #306, #344; Q, K, V, O: #322", "fp8_scales": "#248",
    "sampled_softmax": "#360; arXiv:1412.2007", "full_softmax_frac": "#360",
    "prefix_loss": "#337", "dynamic_skips": "#259; arXiv:2502.12170", "dynamic_hidden": "#259", "dynamic_lr": "#259",
    "dynamic_bias_dtype": "#261",
    "late_attention_source": "#241", "xsa": "#264", "paired_heads": "#191",
    "dynamic_gates": "#315", "head_mixing": "#315; arXiv:2405.08553", "untied_values": "#209",
    "narrow_qk": "#344", "narrow_qk_layers": "#360", "narrow_qk_scale": "#344",
    "adam_period": "#349", "adam_period_from": "#349",
    "two_rate_from": "#340", "muon_head_pairs": "#253",
    "ema_nesterov": "#308; arXiv:2605.25395",
    "tail_ema": "#347", "tail_ema_steps": "#347", "tail_ema_tables": "#347", "tail_ema_matrices": "#347",
}  # fmt: skip


def came_from(field: str, preset: str) -> str:
    """The source of a field of a preset: its technique's, else the run whose number it is."""
    if field in SOURCES:
        return SOURCES[field]
    while preset in OWN and field not in OWN[preset][1]:
        preset = OWN[preset][0]
    return f"tuned in {PRESETS[preset]}" if preset in PRESETS else f"preset {preset}"


def differences(kind: type, presets: Mapping[str, Mapping[str, Any]], one: str, other: str) -> list[dict[str, str]]:
    """A row a field in which presets `one` and `other` differ, in the order of the fields of the dataclass `kind`."""
    rows = []
    for field in dataclasses.fields(kind):
        before, now = (presets[name].get(field.name, field.default) for name in (one, other))
        if before != now:
            told = dict(field=field.name, before=_said(before), now=_said(now), text=field.metadata["help"])
            rows.append(told | {"unit": field.metadata["unit"], "source": came_from(field.name, other)})
    return rows


def _said(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value) if value == "" else str(value)


def explain_command(arguments: Sequence[str], kind: type, presets: Mapping[str, Mapping[str, Any]]) -> int:
    """Print the differences of two presets. Raises UsageError."""
    wrong = [name for name in arguments if name not in presets]
    if len(arguments) != 2 or wrong:
        raise UsageError(f"explain takes two of the presets {', '.join(presets)}: {' '.join(arguments) or 'none'}")
    rows = differences(kind, presets, *arguments)
    print(f"{arguments[1]} differs from {arguments[0]} in {len(rows)} fields:\n")
    for row in rows:
        print(f"--{row['field']}={row['now']}  (was {row['before']})")
        print(f"        {row['text']} ({row['unit']}). Source: {row['source']}")
    print("\n#N: https://github.com/KellerJordan/modded-nanogpt/pull/N")
    return 0
