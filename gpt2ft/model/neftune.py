"""NEFTune: noise on the embeddings in training (Jain et al. 2023, "NEFTune: Noisy embeddings improve instruction
finetuning").

A sequence of L tokens, E wide, gets noise that is uniform within alpha / sqrt(L E). In a tree a token lies on several
paths, and is computed once: its L is that of the longest path through it. So a conversation with one path gets the
noise of the paper, and each token has one noise, the same for all paths that share it.

Noise comes from PyTorch's generator, which the loop seeds for every micro-batch: it depends neither on the number of
processes nor on where a run resumed. Shape letters: N tokens of a stream, E embedding width.
"""

import torch
from torch import Tensor


def embedding_noise(alpha: float, positions: Tensor, horizons: Tensor, width: int) -> Tensor:
    """Draw noise [N, E] for a stream, float32; see stream.py for positions and horizons [N]."""
    bound = alpha / (longest_paths(positions, horizons) * width).sqrt()  # [N]
    return torch.empty(len(positions), width, device=positions.device).uniform_(-1, 1) * bound[:, None]


def longest_paths(positions: Tensor, horizons: Tensor) -> Tensor:
    """Return [N] the tokens of the longest root-to-leaf path through each token: how deep its subtree goes.

    The largest position from a token to its horizon is that of two overlapping stretches, 2^k long each: their largest
    positions are known for all k after log2(N) steps.
    """
    index = torch.arange(len(positions), device=positions.device)
    largest = [positions]
    for k in range(len(positions).bit_length() - 1):
        largest.append(torch.maximum(largest[-1], largest[-1].roll(-(2**k))))
    k = torch.frexp((horizons - index).float()).exponent.long() - 1  # 2^k tokens fit
    of_length = torch.stack(largest)
    return 1 + torch.maximum(of_length[k, index], of_length[k, horizons - 2**k])
