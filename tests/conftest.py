import os

# Nothing in the tests may need the network, or send anything over it.
# Two tests run at a time, each with one thread: threads that wait for each other make them five times as slow.
os.environ.update(
    UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)
# Notebooks choose their own backend for figures.
os.environ.pop("MPLBACKEND", None)
