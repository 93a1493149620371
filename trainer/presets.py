"""The presets beside those of train_gpt.py: the fastest runs of the medium track, each as fields over the one it came
from, and small stand-ins for them.

`record18` is the fastest merged one (#188 of https://github.com/KellerJordan/modded-nanogpt), `f2` and `f3` the
proposals since (#252: bigram table; #261: dynamic skips). `frontier` is f3 with the safe scales of the 8-bit head and
YaRN at every window, which another proposal (#248) has and f3 has not, and with techniques of the short track and the
optimizer track that no run of the medium track has combined: a guess until it is measured. `nano-frontier` is
`frontier` for a laptop. `nano-text` is `nano` for real text, whose many contexts want rows of their own: four times as
many, 4.2M of its 4.3M parameters, and smaller blocks. `micro` is for studies of real tokens: medium's architecture with
1.1M parameters in its blocks, on GPT-2 tokens of which the 4,095 most frequent are kept (data/reduce.py). `medium`,
`small` and `nano`, which they all start from, stand in train_gpt.py.
"""

from typing import Any

# fmt: off
OWN: dict[str, tuple[str, dict[str, Any]]] = {  # name: (the preset that it starts from, fields that differ)
    "record18": ("medium", dict(
        num_iterations=4740, extension_steps=40, val_loss_every=250, batch_schedule="131072,262144,393216",
        lr_schedule="1,1.52,1.73,2", lr_floor=0.1, muon_momentum_cooldown=50, mtp=3, loss_sum=True,
        align_documents=True, max_document_tokens=4096,
        # The model
        attention_free_layers="", attention_scale=0.1, soft_cap="sigmoid", exact_windows=True,
        window_schedule="3,7,11,13,15,17,19,21,23", validation_window=27, short_window_max=11, yarn_until=13,
        tie_embeddings_frac=1 / 6, tied_init_std=0.005, value_init_std=0.0, attention_init_std=1.0, resid_init=1.05,
        smear=True, skip_gates=True, backout_layer=11, norm_before_attention=True, value_norm=False, output_scalar=True,
        value_gates=True, output_gates=True, key_offset="0,4,11,15",
        # The optimizers
        normuon_beta2=0.95, muon_coefficients="record18", muon_lr=0.015, muon_weight_decay=1.2, matrix_dtype="float32",
        muon_lr_factors="qkvo=2,mlp_in=2,mlp_out=4,gates=0.1", cautious_decay=True,
        adam_every=2, adam_eps=1e-8, adam_weight_decay=0.005, adam_decay="head=150,tables=5",
        adam_betas="scalars=0.9:0.99", head_lr=0.004, embed_lr=0.3, mix_lr=0.02, input_gate_lr=4e-5, scalar_lr=0.04,
    )),
    "f2": ("record18", dict(
        num_iterations=4620, bigram_rows=251520, bigram_init_weight=0.05, bigram_mix_lr=0.004,
        products="fp8_head",
        fp8_scales="32,2.25,1.5",  # of #248: the proposal's own 1.6 is less than weights of the head were seen to reach
        muon_lr_factors="qkvo=1,mlp_in=2,mlp_out=4", matrix_dtype="", gate_optimizer="adam", gate_lr=4e-4,
        scalar_lr=0.02, adam_moments="float32", adam_decay="head=150,tables=5,bigram=5,gates=1",
        adam_betas="scalars=0.9:0.99,mixes=0.9:0.99,inputs=0.9:0.99,gates=0.9:0.99,bigram=0.75:0.95,bigram_mixes=0.9:0.95",
    )),
    "f3": ("f2", dict(
        num_iterations=4150, extension_steps=25, tune=False, backout_layer=-1, late_attention_source=11,
        dynamic_skips="4,11", dynamic_hidden=64, dynamic_lr=0.001,
        adam_decay="head=150,tables=5,bigram=5,gates=1,dynamic=1",
        adam_betas="scalars=0.9:0.99,mixes=0.9:0.99,inputs=0.9:0.99,gates=0.9:0.99,bigram=0.75:0.95,"
        "bigram_mixes=0.9:0.95,dynamic=0.9:0.99,dynamic_bias=0.9:0.99",
    )),
    "frontier": ("f3", dict(
        yarn_until=0, xsa=True, two_rate_from=0.3, muon_head_pairs=True, untied_values=True, paired_heads="1,5,9",
        ngram_rows=2**24, dynamic_gates=6, head_mixing=True,
        tail_ema=0.9933, tail_ema_steps=300, lr_floor=0.15,  # the average wants a rate that ends higher
        products="fp8", sampled_softmax="10240,14336,24576",  # each costs some loss and saves more time than that
    )),
    "nano-frontier": ("frontier", dict(
        train_files="embedded", val_files="embedded", vocab_size=256, eos_id=0, drop_shard_tail=False,
        num_iterations=700, extension_steps=0, tokens_per_step=1024, train_seq_len=1024, val_seq_len=8192,
        val_tokens=65536, val_loss_every=100, target_loss=0.7, batch_schedule="",
        num_layers=4, model_dim=64, num_heads=2, value_embeddings=1, unet_skips="1>3", attention_scale=0.35,
        block_tokens=32, long_window_layers="0,3", window_schedule="1,2,3,4,5,6,7,8", validation_window=0,
        short_window_max=4, key_offset="0,3", late_attention_source=1, dynamic_skips="0,1", dynamic_hidden=16,
        bigram_rows=4096, ngram_rows=8192, dynamic_gates=2, paired_heads="1,2", embed_lr=0.1, head_lr=0.01,
        muon_momentum=0.9, muon_momentum_warmup=100, dtype="float32", products="bf16", sampled_softmax="",
        tail_ema=0.0, lr_floor=0.1, log_train_loss=True,
    )),
    "nano-text": ("nano", dict(
        num_iterations=310, context_rows=32768, second_embedding_context=5, mlp_ratio=2, attention_free_layers="1,2",
        warmup_steps=0,
    )),
    "micro": ("medium", dict(
        train_files="data/micro/train_*.bin", val_files="data/micro/val_*.bin", vocab_size=4096, eos_id=0,
        drop_shard_tail=False, num_iterations=300, tokens_per_step=2048, train_seq_len=2048, val_seq_len=16384,
        val_tokens=131072, val_loss_every=100, warmup_steps=2, target_loss=4.5,
        num_layers=6, model_dim=128, num_heads=2, value_embeddings=2, unet_skips="2>4,1>5", attention_free_layers="3",
        attention_scale=0.25, block_tokens=32, window_max_tokens=512, long_window_layers="0,5",
        head_lr=0.01, muon_momentum_warmup=100, dtype="float32", log_train_loss=True,
    )),
}
# fmt: on


def frontier_presets(base: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name: all fields that differ from the defaults} of the presets above. base: those that they may start from."""
    found = dict(base)
    for name, (start, fields) in OWN.items():
        found[name] = found[start] | fields
    return {name: found[name] for name in OWN}
