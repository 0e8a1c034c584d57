"""From the best trial to a model people use: merge, GGUF, quantise, verify, chat."""

import os

# Before OpenMP is loaded, which reads it once. Otherwise threads wait in a loop for the others of their
# matrix product: where another process wants a core, the loop takes the time that the others need, and
# merging and scoring take several times as long (torch and llama.cpp alike).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
