import os

# Nothing in the tests may need the network, or send anything over it.
os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Notebooks choose their own backend for figures.
os.environ.pop("MPLBACKEND", None)
