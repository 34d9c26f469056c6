"""Where a token stands: places within documents, sinusoids, rotary angles and their scaling to longer sequences.

Shapes: B batch, T time, H heads, D model width, K head width.
"""

import math

import torch
import torch.nn.functional as F

from pretrain.config.schema import ModelConfig

YARN_FAST, YARN_SLOW = 32.0, 1.0  # turns over the original positions (YaRN's beta and alpha)


def begins_of_documents(documents_BT: torch.Tensor) -> torch.Tensor:
    """bool [B, T]: whether a document, or padding, begins here."""
    return F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)


def places_in_documents(documents_BT: torch.Tensor) -> torch.Tensor:
    """The place of each token in its document [B, T], from 0 on."""
    place_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = begins_of_documents(documents_BT)
    return place_T - (place_T * begins_BT).cummax(1).values


def sinusoids(place: torch.Tensor, width: int) -> torch.Tensor:
    """[..., D] of Vaswani et al., 2017, section 3.5: sin(place / 10000^(2i/D)) at 2i, the cosine at 2i + 1."""
    angles = place.float()[..., None] * _frequencies(width, 10000.0, place.device)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def rotations(place: torch.Tensor, head_width: int, config: ModelConfig, local: bool = False) -> torch.Tensor:
    """Cosines and sines of rotary positions (Su et al., RoFormer, 2021), in fp32; `local`: of layers with a window.

    Places [T] -> [2, T, K], the same for every row; places [B, T] -> [2, B, 1, T, K].
    """
    own_theta = local and config.local_rope_theta
    theta = config.local_rope_theta if own_theta else config.rope_theta
    frequencies, amplitude = _frequencies(head_width, theta, place.device), 1.0
    if not own_theta:
        frequencies, amplitude = SCALINGS[config.rope_scaling](frequencies, head_width, config)
    angles = place.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), -1)
    rope = torch.stack((angles.cos(), angles.sin())) * amplitude
    return rope if place.dim() == 1 else rope.unsqueeze(2)


def rotate(x_BHTK: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + K/2), LLaMA's and GPT-NeoX's pairing."""
    left, right = x_BHTK.chunk(2, -1)
    return x_BHTK * rope[0] + torch.cat((-right, left), -1) * rope[1]


def _frequencies(width: int, theta: float, device: torch.device) -> torch.Tensor:
    """Angles a position, float32[width / 2], rounded as Hugging Face rounds them: it shows at far positions."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def _unscaled(frequencies: torch.Tensor, head_width: int, config: ModelConfig) -> tuple[torch.Tensor, float]:
    return frequencies, 1.0


def _linear(frequencies: torch.Tensor, head_width: int, config: ModelConfig) -> tuple[torch.Tensor, float]:
    """All positions closer together (Chen et al., "Extending Context Window ... via Position Interpolation", 2023)."""
    return frequencies / config.rope_factor, 1.0


def _llama3(frequencies: torch.Tensor, head_width: int, config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Llama 3.1's: slow turns are stretched, fast ones stay, those between are mixed (Grattafiori et al., 2024)."""
    turns = config.rope_original_positions / (2 * math.pi / frequencies)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    stay = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - stay) * frequencies / config.rope_factor + stay * frequencies, 1.0


def _yarn(frequencies: torch.Tensor, head_width: int, config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Peng et al., "YaRN", 2023: as `_llama3` by the number of a pair of dimensions, and attention a little sharper."""

    def pair_that_turns(turns: float) -> float:
        inner = math.log(config.rope_original_positions / (turns * 2 * math.pi))
        return head_width * inner / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_that_turns(YARN_FAST)), 0)
    last = min(math.ceil(pair_that_turns(YARN_SLOW)), head_width - 1)
    pairs = torch.arange(head_width // 2, dtype=torch.float32, device=frequencies.device)
    stay = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    amplitude = 0.1 * math.log(config.rope_factor) + 1 if config.rope_factor > 1 else 1.0
    return (1 - stay) * frequencies / config.rope_factor + stay * frequencies, amplitude


SCALINGS = {"none": _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
