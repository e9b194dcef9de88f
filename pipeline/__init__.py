"""nightrails: nightly top-k candidates under Mixture-of-Logits."""

import os

# After each operation PyTorch's OpenMP threads spin for some milliseconds on cores that the search's own threads want:
# two threads lose a tenth of stage 1. 3,000 turns are a few microseconds, enough to wait for the next operation of a
# training step. It is set here because libgomp reads it when it is loaded, and any module of ours may load it first.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
