"""The pointing benchmark: its clips and its measure."""

import torch
from pointing import CLASSES, SIDE, STEPS, T, clips, point
from torch import nn

import temporal_excite as te


def test_one_disc_moves_and_the_other_stands():
    frames, labels, discs = clips(64, torch.Generator().manual_seed(0))
    assert frames.shape == (64, T, 3, SIDE, SIDE) and frames.min() >= 0 and frames.max() <= 1
    assert set(labels.tolist()) == set(range(len(CLASSES)))
    assert (discs[:, 1] == discs[:, 1, :1]).all()
    assert (discs.sum(dim=1) <= 1).all()  # they do not touch
    axis = torch.arange(SIDE) + 0.5
    mass = discs[:, 0].sum(dim=(2, 3))
    x = (discs[:, 0].sum(dim=2) * axis).sum(dim=2) / mass
    y = (discs[:, 0].sum(dim=3) * axis).sum(dim=2) / mass
    for n, label in enumerate(labels.tolist()):
        step = torch.stack([x[n].diff(), y[n].diff()], dim=1)
        assert ((step @ torch.tensor(STEPS[label], dtype=torch.float32)) > 0.9).all()
    same, _, _ = clips(64, torch.Generator().manual_seed(0))
    assert torch.equal(frames, same)


def test_measure():
    """A network whose map is the disc that moves points at it alone."""
    frames, labels, discs = clips(8, torch.Generator().manual_seed(0))

    class Oracle(nn.Module):
        def __init__(self, which):
            super().__init__()
            self.features, self.fc = discs[:, which].flatten(0, 1)[:, None], nn.Linear(1, len(CLASSES))
            nn.init.ones_(self.fc.weight)

        def get_classifier(self):
            return self.fc

        def forward_features(self, x):
            return self.features

        def forward_head(self, x):
            return self.fc(x.mean(dim=(2, 3)))

        def forward(self, x):
            return self.forward_head(self.forward_features(x))

    for which, name in enumerate(("mover", "other")):
        result = point(te.VideoClassifier(Oracle(which), T, dropout=0), frames, labels, discs)
        other = {"mover": "other", "other": "mover"}[name]
        assert result[f"point {name}"] == 100 and result[f"point {other}"] == 0
        assert result[f"share {name}"] > 90 and result[f"share {other}"] == 0
