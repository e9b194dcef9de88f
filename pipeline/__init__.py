"""nightrails: nightly top-k candidates under Mixture-of-Logits."""

import os

# PyTorch's OpenMP threads (libgomp reads this when it is loaded) spin for milliseconds after each operation, on cores
# that the search's own threads want: two threads lose a tenth of stage 1 by it. So many turns are some microseconds,
# which is long enough for the next operation of a training step.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
