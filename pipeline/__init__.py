"""nightrails: nightly top-k candidates under Mixture-of-Logits."""

import os

# PyTorch's OpenMP threads spin for milliseconds after each operation, on cores that the search's own threads need: on
# two cores stage 1 is a tenth slower by it. 3,000 turns are some microseconds, long enough for the next operation of a
# training step. libgomp reads the variable when it is loaded, so it is set before anything imports torch.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
