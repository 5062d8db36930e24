"""A small network for text, named in a recipe as ``flatcompress.models.text_nets:text_cnn``."""

from __future__ import annotations

from torch import Tensor, nn

from flatcompress.errors import UserError


class TextCNN(nn.Module):
    """Token numbers [B, length] -> logits [B, classes]: an embedding, convolutions along the text, the largest of each.

    After Kim (arXiv 1408.5882), with one width and ``depth`` layers. Padding is embedded as zeros.
    """

    def __init__(self, num_classes: int, vocabulary: int, width: int, depth: int, embedding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=0)
        layers: list[nn.Module] = []
        for level in range(depth):
            layers += [nn.Conv1d(width if level else embedding, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm1d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool, self.flatten = nn.AdaptiveMaxPool1d(1), nn.Flatten()
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.features(self.embedding(x).transpose(1, 2)))))


def text_cnn(
    num_classes: int,
    input_shape: tuple[int, ...],
    vocabulary: int,
    width: int = 32,
    depth: int = 2,
    embedding: int = 32,
) -> nn.Module:
    """A `TextCNN`; ``vocabulary`` comes from the data. UserError for inputs that are no token numbers [length]."""
    if len(input_shape) != 1:
        raise UserError(f"text_cnn takes token numbers [length], found {tuple(input_shape)}.")
    return TextCNN(num_classes, vocabulary, width, depth, embedding)
