"""Training with pytorch-metric-learning: learn the digits 0 to 4, find the unseen 5 to 9."""

import torch
from pytorch_metric_learning.losses import CrossBatchMemory, MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.datasets import load_digits
from torch import nn

from idml_fast.interop import IntrospectiveSimilarity, Joined


class TwoHeaded(nn.Sequential):
    def forward(self, images):
        return super().forward(images).split([8, 4], dim=1)  # sem, unc


torch.manual_seed(0)
images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images, seen = images.float().view(-1, 1, 8, 8) / 16, labels < 5
convolutions = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
model = Joined(TwoHeaded(*convolutions, nn.Flatten(), nn.Linear(256, 8 + 4)))
distance = IntrospectiveSimilarity(sem_dim=8)
miner = MultiSimilarityMiner(distance=distance)
loss = CrossBatchMemory(MultiSimilarityLoss(distance=distance), 8 + 4, 512, miner)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
calculator = AccuracyCalculator(("precision_at_1",), knn_func=CustomKNN(distance))
for _ in range(5):
    for batch in seen.nonzero()[:, 0][torch.randperm(int(seen.sum()))].split(120):
        optimizer.zero_grad()
        loss(model(images[batch]), labels[batch]).backward()
        optimizer.step()

found = calculator.get_accuracy(model(images[~seen]).detach(), labels[~seen])
print(f"Recall@1 among unseen digits: {found['precision_at_1']:.1%}")
