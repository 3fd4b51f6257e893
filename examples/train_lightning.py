"""Training in Lightning with a memory bank: learn the digits 0 to 4, find the unseen 5 to 9."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from idml_fast import MemoryBank, losses, nearest


class TwoHeaded(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        trunk = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
        self.trunk = nn.Sequential(*trunk, nn.Flatten())
        self.sem, self.unc = nn.Linear(256, 8), nn.Linear(256, 4)
        self.loss, self.bank = losses.ContrastiveLoss(), MemoryBank(480, 8, 4)

    def training_step(self, batch, _):
        x = self.trunk(batch[0])
        self.items = nn.functional.normalize(self.sem(x)), self.unc(x), batch[1]
        return self.loss(*self.items) + self.loss(*self.items, *self.bank.columns)

    def on_train_batch_end(self, *_):
        self.bank.add(*self.items)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


lightning.seed_everything(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
images, seen, model = images.float().view(-1, 1, 8, 8) / 16, labels < 5, TwoHeaded()
train = DataLoader(TensorDataset(images[seen], labels[seen]), 120, shuffle=True)
lightning.Trainer(max_epochs=5, accelerator="cpu", logger=False).fit(model, train)
sem = nn.functional.normalize(model.sem(model.trunk(images[~seen])).detach())
closest, unseen = nearest(sem, "zero", k=1, exclude_self=True)[1][:, 0], labels[~seen]
print(f"Recall@1 among unseen digits: {(unseen[closest] == unseen).float().mean():.1%}")
