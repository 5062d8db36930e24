import lightning
import torch
from torch import nn

from flatcompress import flat


class Classifier(lightning.LightningModule):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))

    def configure_optimizers(self):
        base = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return flat.create("gsam", self, base, rho=0.05, alpha=0.4)

    def training_step(self, batch, index):
        def closure():
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        self.log("loss", self.optimizers().step(closure))


images = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,)))
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(Classifier(), torch.utils.data.DataLoader(images, batch_size=16))
print(f"loss {trainer.callback_metrics['loss']:.3f} after {trainer.optimizers[0].passes} passes")
