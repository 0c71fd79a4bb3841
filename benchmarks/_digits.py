"""Three tasks in sequence on scikit-learn's digits, and a small transformer to learn them.

Shape suffixes: B images, H image side, T tokens, D width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

TASKS = {"zero-one-two": (0, 1, 2), "three-four-five": (3, 4, 5), "six-seven-eight": (6, 7, 8)}
"""Each task names three digits 0, 1, 2: the label space is the same, its meaning is not."""
LOOKS = ((1.0, 0.0), (0.5, 0.5), (-1.0, 1.0))
"""Each task has its own scanner, ``a x + b``: white on black, white on grey, black on white."""
SIDE = 8


@dataclass(frozen=True)
class Split:
    """Images ``[B, 8, 8]`` from 0 to 1 and their digits, or the labels of a task."""

    x_BHH: Tensor
    y_B: Tensor

    def task(self, name: str) -> Split:
        """The images of a task as its scanner shows them, labelled 0, 1, 2."""
        scale, shift = LOOKS[list(TASKS).index(name)]
        label = torch.full((10,), -1)
        label[list(TASKS[name])] = torch.arange(3)
        kept_B = label[self.y_B] >= 0
        return Split(scale * self.x_BHH[kept_B] + shift, label[self.y_B][kept_B])

    def to(self, device: str) -> Split:
        """The same on a device."""
        return Split(self.x_BHH.to(device), self.y_B.to(device))

    def draw(self, count: int) -> Split:
        """Random images, from torch's default generator."""
        chosen = torch.randint(len(self.y_B), (count,)).to(self.y_B.device)
        return Split(self.x_BHH[chosen], self.y_B[chosen])


def splits(seed: int) -> dict[str, Split]:
    """1,797 scans: 1,077 to train, 270 to choose learning rates, 450 to test; stratified."""
    x, y = load_digits(return_X_y=True)
    fit_x, test_x, fit_y, test_y = train_test_split(
        x, y, test_size=450, stratify=y, random_state=seed
    )
    train_x, choice_x, train_y, choice_y = train_test_split(
        fit_x, fit_y, test_size=270, stratify=fit_y, random_state=seed
    )
    found = {"train": (train_x, train_y), "choose": (choice_x, choice_y), "test": (test_x, test_y)}
    return {
        name: Split(
            torch.tensor(x, dtype=torch.float32).reshape(-1, SIDE, SIDE) / 16, torch.tensor(y)
        )
        for name, (x, y) in found.items()
    }


class Block(nn.Module):
    """Pre-norm attention and MLP, in plain linears."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, D]`` to the same."""
        h_BTD = self.norm1(x_BTD)
        q, k, v = (
            part(h_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BTD = x_BTD + self.out(mixed)
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))


class Reader(nn.Module):
    """A transformer over the sixteen 2 x 2 patches of a scan; the head has one output per turn."""

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.place = nn.Parameter(torch.randn(16, width) * 0.1)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x_BHH: Tensor) -> Tensor:
        """``[B, 8, 8]`` to logits ``[B, 4]``."""
        x_BTP = x_BHH.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(x_BHH), 16, 4)
        x_BTD = self.blocks(self.patch(x_BTP) + self.place)
        return self.head(self.norm(x_BTD).mean(1))


def pretrain(train: Split, *, steps: int, seed: int) -> Reader:
    """Learn by how many quarter turns a scan was rotated, whatever scanner it is from."""
    torch.manual_seed(seed)
    model = Reader().to(train.x_BHH.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        scale, shift = LOOKS[torch.randint(3, ()).item()]
        x_BHH = scale * train.draw(32).x_BHH + shift
        turned = torch.cat([x_BHH.rot90(turn, (1, 2)) for turn in range(4)])
        loss = F.cross_entropy(
            model(turned), torch.arange(4).repeat_interleave(32).to(turned.device)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
