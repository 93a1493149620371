"""Which checkpoints stay, and which is the newest: by the step's number, also where it has a digit more."""

import torch

from trainer.checkpoints import checkpoints_of, find_checkpoint, load_tensors, newest_whole, save_run

FORMAT = "t-1"


def test_the_newest_are_those_of_the_highest_steps(tmp_path):
    for step in (5, 999_998, 999_999, 1_000_000, 10_000_000):
        save_run(tmp_path, step, {"w": torch.tensor([float(step)])}, {"format": FORMAT}, keep=2)
        assert find_checkpoint(str(tmp_path)).name == f"step-{step:06d}.safetensors"
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-10000000.safetensors", "step-1000000.safetensors"]
    path, _, tensors = newest_whole(tmp_path, FORMAT)
    assert tensors["w"].item() == 10_000_000
    path.write_bytes(path.read_bytes()[:-1])
    path, *_ = newest_whole(tmp_path, FORMAT)
    assert load_tensors(path, FORMAT)[1]["w"].item() == 1_000_000


def test_what_a_replaced_run_left_does_not_cost_the_new_one_its_checkpoint(tmp_path):
    """Two of later steps lie there; the new run's first one stays, and is the newest. With keep=0 nothing goes."""
    for step in (5, 7):
        save_run(tmp_path, step, {"w": torch.tensor([float(step)])}, {"format": FORMAT}, keep=2)
    path = save_run(tmp_path, 4, {"w": torch.tensor([4.0])}, {"format": FORMAT}, keep=0)
    assert len(checkpoints_of(tmp_path)) == 3
    assert save_run(tmp_path, 4, {"w": torch.tensor([4.0])}, {"format": FORMAT}, keep=2) == path
    assert checkpoints_of(tmp_path) == [path] == [find_checkpoint(str(tmp_path))]
