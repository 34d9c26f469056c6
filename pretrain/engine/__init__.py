"""DeepSpeed, and nothing of it elsewhere: its settings, what a rank owns, one training step."""

import os
import warnings

import torch

# DeepSpeed chooses its accelerator when it is first imported, which the modules of this folder do; by itself it goes by
# the packages that are installed. It is to be where the tensors are, which torch knows: in containers, WSL, ROCm too.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# DeepSpeed calls collectives by names that torch is renaming: nothing a user can act on.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
