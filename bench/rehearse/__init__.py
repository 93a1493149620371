"""The GPU path rehearsed without a GPU: `python -m bench.rehearse --preset medium --device h100 --world 8`."""
