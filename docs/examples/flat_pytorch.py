import torch
from torch import nn

from flatcompress import flat

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
batches = [(torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))) for _ in range(4)]

base = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer = flat.create("sam", model, base, rho=0.05, max_grad_norm=1.0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
for x, y in batches:

    def closure(x=x, y=y):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    schedule.step()
    print(f"loss {loss:.3f}, rise at the perturbed point {optimizer.last_gap:.4f}")
