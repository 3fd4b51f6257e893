"""A training loop in plain PyTorch: learn the digits 0 to 4, find the unseen 5 to 9 again."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import normalize

from idml_fast import losses, nearest


class TwoHeaded(nn.Module):
    def __init__(self):
        super().__init__()
        convolutions = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()
        self.trunk = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten())
        self.sem, self.unc = nn.Linear(256, 8), nn.Linear(256, 4)

    def forward(self, images):
        x = self.trunk(images)
        return normalize(self.sem(x)), self.unc(x)


torch.manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
images, seen = images.float().view(-1, 1, 8, 8) / 16, labels < 5
model, loss = TwoHeaded(), losses.MultiSimilarityLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(5):
    for batch in seen.nonzero()[:, 0][torch.randperm(int(seen.sum()))].split(120):
        optimizer.zero_grad()
        sem, unc = model(images[batch])
        loss(sem, unc, labels[batch]).backward()
        optimizer.step()

with torch.no_grad():
    sem, _ = model(images[~seen])
    _, closest = nearest(sem, "zero", k=1, exclude_self=True)
right = labels[~seen][closest[:, 0]] == labels[~seen]
print(f"Recall@1 among unseen digits: {right.float().mean():.1%}")
