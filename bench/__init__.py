"""One harness for everything that is timed: `python -m bench.gpu` is the command for a machine with a GPU.

`bench.common` measures, compares and writes results; `bench.step` times a training step; the other modules
time one kernel family each. Results are JSON files under bench/results/, with their environment.
"""

from trainer.threads import bound_spinning

bound_spinning()  # before any module here imports torch
