"""The lab: a ladder of small language models, and a microscope for their checkpoints.

`python -m lab.train --model=mlp --data=names` trains a rung, `python -m lab.tour` walks the whole ladder on
the embedded corpus, `python -m lab.analyses` looks into checkpoints (those of train_gpt.py included).
Dimension key, as in train_gpt.py: B batch, T time, V vocabulary, E embedding width, H hidden width, N tokens
of context.
"""

from trainer.threads import bound_spinning

bound_spinning()  # before any module here imports torch


class LabError(ValueError):
    """Input that the lab cannot use; the message names what, where and what to do. The commands exit with
    2."""
