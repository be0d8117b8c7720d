"""LeNet: the course's digit classifier, by which generated digits are scored.

Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", with ReLU, max pooling
and three input channels; the names are those in the course's weight file.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """RGB images (N, 3, 28, 28) in [-1, 1] -> logits of the ten digits (N, 10)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))  # (N, 6, 12, 12)
        x = self.pool(F.relu(self.conv2(x)))  # (N, 16, 4, 4)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
