"""A network for frames of 32x32 pixels, with the parts timm's models have."""

from collections.abc import Sequence

from torch import Tensor, nn


class SmallNet(nn.Module):
    """3x3 convolution of stride 2 to 16 channels, ``blocks``, mean over the frame, linear.

    Args:
        blocks: from 16 to ``num_features`` channels.
        num_features: channels the last block gives.
        num_classes: of the linear layer.
    """

    def __init__(self, blocks: Sequence[nn.Module], num_features: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.num_features = num_features
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
