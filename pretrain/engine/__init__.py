"""DeepSpeed, and nothing of it elsewhere: its settings, what a rank owns, one training step."""

import os
import warnings

# DeepSpeed chooses its accelerator when it is first imported, which the modules of this folder do.
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidia0") else "cuda")

# DeepSpeed calls collectives by names that torch is renaming: nothing a user can act on.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
