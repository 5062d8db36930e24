import torch
from accelerate import Accelerator
from torch import nn

from flatcompress import flat

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
images = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,)))

accelerator = Accelerator(cpu=True)
model, base, loader = accelerator.prepare(
    model, torch.optim.SGD(model.parameters(), lr=0.1), torch.utils.data.DataLoader(images, batch_size=16)
)
optimizer = flat.create("sagm", model, base, rho=0.05, alpha=1e-3)  # takes the scaler of Accelerate's optimizer too
accelerator.register_for_checkpointing(optimizer)
for x, y in loader:

    def closure(x=x, y=y):
        loss = nn.functional.cross_entropy(model(x), y)
        accelerator.backward(loss)
        return loss

    loss = optimizer.step(closure)
print(f"loss {loss:.3f} after {optimizer.passes} passes")
