"""Settings of the whole test session."""

import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# torchao and executorch warn and log while they are imported; tests turn the warnings of tests into errors, not theirs.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

torch.set_num_threads(1)  # Two threads on shared cores wait for each other longer than one works.
