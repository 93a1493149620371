"""Runs of the trainer that take a moment: four steps of a tiny model on random bytes."""

import numpy as np

import train_gpt
from data.shards import write_shard

SMALL = """--preset=nano --num_iterations=4 --tokens_per_step=128 --train_seq_len=64 --val_seq_len=64 --val_tokens=128
--val_loss_every=2 --warmup_steps=0 --num_layers=2 --model_dim=16 --num_heads=1 --unet_skips=0>1 --value_embeddings=0
--long_window_layers=0 --block_tokens=16 --device=cpu --run_name=run""".split()


def tokens(count, seed=0):
    drawn = np.random.default_rng(seed).integers(1, 256, size=count).astype(np.uint16)
    drawn[::50] = 0
    return drawn


def folder_of(folder, *parts, val=None):
    val = tokens(200, 1) if val is None else val
    folder.mkdir()
    for number, part in enumerate(parts):
        write_shard(folder / f"train_{number}.bin", part)
    write_shard(folder / "val_0.bin", val)
    return folder


def small(*words):
    """The words of a small run; of a field given twice, the last."""
    return list({word.partition("=")[0]: word for word in [*SMALL, *words]}.values())


def run(folder, out, *more):
    """Exit code of a small run on the shards of a folder."""
    files = [f"--train_files={folder}/train_*.bin", f"--val_files={folder}/val_*.bin", f"--output_dir={out}"]
    return train_gpt.main(small(*files, *more))
