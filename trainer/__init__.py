"""What train_gpt.py stands on: options, processes, the exchange of gradients, checkpoints, the run's log.

It uses kernels/ and data/, and nothing above it: neither the trainer itself nor records/.
"""
