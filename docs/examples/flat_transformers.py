import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from flatcompress import flat


class FlatTrainer(Trainer):
    def create_optimizer(self, *args, **kwargs):
        base = super().create_optimizer(*args, **kwargs)
        self.flat = flat.create("sam", self.model, base, rho=0.05, max_grad_norm=1.0)
        return base

    def training_step(self, model, inputs, num_items_in_batch=None):
        forward_backward = super().training_step
        loss = self.flat.step(lambda: forward_backward(model, inputs, num_items_in_batch))
        self.flat.zero_grad()  # the step is done: the Trainer's own optimizer.step() finds no gradients
        return loss


config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(32)]
trainer = FlatTrainer(
    model=ResNetForImageClassification(config),
    args=TrainingArguments("runs/trainer", max_steps=4, use_cpu=True, report_to=[], save_strategy="no"),
    train_dataset=images,
)
print(f"loss {trainer.train().training_loss:.3f} after {trainer.flat.passes} passes")
