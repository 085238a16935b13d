"""PyTorch Geometric: `attach`, as in any loop."""

import torch
from autoclip_torch import attach
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import batch_of, play, steps_of
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, global_mean_pool


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = GCNConv(4, 8), torch.nn.Linear(8, 1)

    def forward(self, data):
        return self.last(global_mean_pool(self.conv(data.x, data.edge_index).relu(), data.batch))


def graphs(first):
    ring = torch.stack([torch.arange(8), (torch.arange(8) + 1) % 8])
    return [Data(x=x, edge_index=ring, y=y.sum().view(1, 1)) for x, y in map(batch_of, range(2 * first, 2 * STEPS))]


def train(folder, *, resume):
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    # page
    clip = attach(optimizer, PERCENTILE)
    kept = {"model": model, "optimizer": optimizer, "clip": clip}
    # end of page
    first = HALF if resume else 0
    data_of = DataLoader(graphs(first), batch_size=2)
    for _, data in zip(steps_of(folder, kept, resume=resume), data_of, strict=True):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(data), data.y).backward()
        optimizer.step()
    return Trained(STEPS - first, list(model.parameters()), clip.log())


if __name__ == "__main__":
    play("torch-geometric", train)
