"""TEA's and TEFE's equations written out plainly, and the released TEA network with its key names."""

import torch
import torch.nn.functional as F
from reference import at, batch_norm, first_tap, frames_of, motion, stack, temporal_conv
from torch import Tensor, nn


def unit_norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm that changes nothing."""
    return nn.BatchNorm2d(channels, eps=0).double().eval()


def full_temporal_conv(x: Tensor, weight: Tensor, n_segment: int, first: int = -1) -> Tensor:
    """y[t] = W0 x[t-1] + W1 x[t] + W2 x[t+1], W a matrix over channels."""
    return stack(
        [
            [
                sum(torch.einsum("oi,ihw->ohw", weight[:, :, k], at(clip, t + k + first)) for k in range(3))
                for t in range(n_segment)
            ]
            for clip in frames_of(x, n_segment)
        ]
    )


def motion_excitation(x: Tensor, module: nn.Module) -> Tensor:
    """TEA, Eqs. 1-5."""
    released = module.form == "released"
    norm = module.norm if released else unit_norm(len(module.squeeze.weight))
    weights = (module.squeeze.weight, norm, module.transform.weight)
    pooled = motion(x, *weights, module.n_segment, module.causal)
    expanded = (pooled @ module.expand.weight[:, :, 0, 0].T)[:, :, None, None]
    if released:
        gate = torch.sigmoid(batch_norm(expanded, module.norm2)) - 0.5
    else:
        gate = 2 * torch.sigmoid(expanded) - 1
    return x + x * gate if module.residual else x * gate


def mta(x: Tensor, module: nn.Module) -> Tensor:
    """TEA, Eqs. 6, 7, and the released order of the parts."""
    t, s, first = module.n_segment, module.scale, first_tap(module)
    width = x.shape[1] // s
    parts = {i + 1: x[:, i * width : (i + 1) * width] for i in range(s)}  # X_1 .. X_s
    y: dict[int, Tensor] = {}
    stride = module.convs[0].stride

    def pooled(part: Tensor) -> Tensor:
        return F.avg_pool2d(part, 3, stride, 1) if module.stage else part

    def spatial(i: int, part: Tensor) -> Tensor:
        conv = module.convs[i]
        return F.conv2d(part, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    if module.form == "text":
        y[1] = pooled(parts[1])
        for i in range(2, s + 1):
            part = parts[i] if i == 2 or module.stage else parts[i] + y[i - 1]
            y[i] = spatial(i - 2, temporal_conv(part, module.shifts[i - 2].weight, t, first))
    else:
        for i in range(1, s):
            part = parts[i] if i == 1 or module.stage else parts[i] + y[i - 1]
            y[i] = spatial(i - 1, temporal_conv(part, module.shifts[i - 1].weight, t, first))
            y[i] = torch.clamp(batch_norm(y[i], module.norms[i - 1]), min=0)
        y[s] = pooled(temporal_conv(parts[s], module.shifts[s - 1].weight, t, first))
    return torch.cat([y[i] for i in range(1, s + 1)], dim=1)


def tea_block(x: Tensor, block: nn.Module) -> Tensor:
    """TEA, Fig. 3."""
    y = torch.clamp(batch_norm(F.conv2d(x, block.conv1.weight), block.norm1), min=0)
    y = mta(motion_excitation(y, block.me), block.mta)
    y = batch_norm(F.conv2d(y, block.conv3.weight), block.norm3)
    shortcut = x
    if isinstance(block.downsample, nn.Sequential):
        conv, norm = block.downsample
        shortcut = batch_norm(F.conv2d(x, conv.weight, stride=conv.stride), norm)
    return torch.clamp(y + shortcut, min=0)


def temporal_extraction(x: Tensor, module: nn.Module) -> Tensor:
    """TEFE, Eqs. 1-6."""
    outputs = []
    for clip in frames_of(x, module.n_segment):
        s = torch.stack([frame.mean((1, 2)) for frame in clip], dim=1)  # (C, T), Eq. 1
        gate = F.conv1d(F.conv1d(s[None], module.reduce.weight, padding=1), module.expand.weight, padding=1)
        gate = torch.sigmoid(gate[0])  # Eqs. 2, 3
        x0 = [frame * gate[:, t, None, None] for t, frame in enumerate(clip)]  # Eq. 4
        hidden = s @ module.fc1.weight.T
        if isinstance(module.act, nn.ReLU):
            hidden = torch.clamp(hidden, min=0)
        q = torch.softmax(hidden @ module.fc2.weight.T, dim=1)  # (C, 3), Eq. 5
        outputs.append(
            [sum(q[:, k, None, None] * at(x0, t + k - 1) for k in range(3)) for t in range(len(clip))]
        )
    return stack(outputs)


def causal_extraction(x: Tensor, module: nn.Module) -> Tensor:
    """The same from the past alone: taps t-2, t-1, t, and at each frame a kernel from the last T means."""

    def conv(series: list[Tensor], weight: Tensor) -> list[Tensor]:
        return [sum(weight[:, :, k] @ at(series, t + k - 2) for k in range(3)) for t in range(len(series))]

    outputs, length = [], module.fc1.in_features
    for clip in frames_of(x, module.n_segment):
        s = [frame.mean((1, 2)) for frame in clip]
        gates = conv(conv(s, module.reduce.weight), module.expand.weight)
        x0 = [frame * torch.sigmoid(gate)[:, None, None] for frame, gate in zip(clip, gates, strict=True)]
        frames = []
        for t in range(len(clip)):
            window = torch.stack([at(s, i) for i in range(t - length + 1, t + 1)], dim=1)
            hidden = window @ module.fc1.weight.T
            if isinstance(module.act, nn.ReLU):
                hidden = torch.clamp(hidden, min=0)
            q = torch.softmax(hidden @ module.fc2.weight.T, dim=1)
            frames.append(sum(q[:, k, None, None] * at(x0, t + k - 2) for k in range(3)))
        outputs.append(frames)
    return stack(outputs)


def kernel_of(sides: nn.Conv2d, center: Tensor, causal: bool = False) -> Tensor:
    """The 3x3x3 kernel ``(O, I / groups, 3, kh, kw)`` of a centre tap and the two beside it, or before it."""
    groups = sides.groups
    per_group = len(center) // groups
    taps = sides.weight.reshape(groups, 2, per_group, *center.shape[1:])
    before, after = (taps[:, k].reshape(center.shape) for k in range(2))
    return torch.stack([before, after, center] if causal else [before, center, after], dim=2)


def feature_enhancement(x: Tensor, module: nn.Module, host: nn.Conv2d | None = None) -> Tensor:
    """TEFE, Eq. 10 without U, by conv3d."""
    clips = x.unflatten(0, (-1, module.n_segment)).transpose(1, 2)
    if module.causal:
        clips = F.pad(clips, (0, 0, 0, 0, 2, 0))
    factors = []
    for conv in (module.conv1, module.conv2):
        center = host if conv.center is None else conv.center
        like = conv.sides
        factors.append(
            F.conv3d(
                clips,
                kernel_of(like, center.weight, module.causal),
                center.bias,
                stride=(1, *like.stride),
                padding=(0 if module.causal else 1, *like.padding),
                dilation=(1, *like.dilation),
                groups=like.groups,
            )
        )
    return (factors[0] * factors[1]).transpose(1, 2).flatten(0, 1)


class ReleasedME(nn.Module):
    """Motion excitation with the released names, on clips."""

    def __init__(self, channels: int, n_segment: int) -> None:
        super().__init__()
        r = channels // 16
        self.n_segment = n_segment
        self.conv1 = nn.Conv2d(channels, r, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(r)
        self.conv2 = nn.Conv2d(r, r, 3, padding=1, groups=r, bias=False)
        self.conv3 = nn.Conv2d(r, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        f = self.bn1(self.conv1(x))
        g = self.conv2(f)
        difference = torch.zeros_like(f)
        for i in range(len(f)):
            if i % self.n_segment < self.n_segment - 1:
                difference[i] = g[i + 1] - f[i]
        gate = self.bn3(self.conv3(difference.mean((2, 3), keepdim=True))).sigmoid() - 0.5
        return x + x * gate


class ReleasedShift(nn.Module):
    """The temporal convolution of one part, under the released name ``conv``."""

    def __init__(self, channels: int, n_segment: int) -> None:
        super().__init__()
        self.n_segment = n_segment
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.shape
        series = x.view(-1, self.n_segment, c, h, w).permute(0, 3, 4, 2, 1).reshape(-1, c, self.n_segment)
        y = self.conv(series).view(-1, h, w, c, self.n_segment)
        return y.permute(0, 4, 3, 1, 2).reshape(nt, c, h, w)


class ReleasedBlock(nn.Module):
    """The released TEA bottleneck, scale 4."""

    def __init__(
        self, inplanes: int, planes: int, n_segment: int, stride: int = 1, stage: bool = False
    ) -> None:
        super().__init__()
        width = planes * 26 // 64
        self.conv1 = nn.Conv2d(inplanes, 4 * width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.me = ReleasedME(4 * width, n_segment)
        self.shifts = nn.ModuleList(ReleasedShift(width, n_segment) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, stride, 1, bias=False) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.conv3 = nn.Conv2d(4 * width, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.stage, self.stride = stage, stride
        if stage:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.me(self.bn1(self.conv1(x)).relu())
        first, second, third, last = out.chunk(4, dim=1)
        results = [self.bns[0](self.convs[0](self.shifts[0](first))).relu()]
        for i, part in ((1, second), (2, third)):
            if not self.stage:
                part = part + results[-1]
            results.append(self.bns[i](self.convs[i](self.shifts[i](part))).relu())
        last = self.shifts[3](last)
        results.append(F.avg_pool2d(last, 3, self.stride, 1) if self.stage else last)
        out = self.bn3(self.conv3(torch.cat(results, 1)))
        return (out + (self.downsample(x) if self.stage else x)).relu()


class ReleasedTEA(nn.Module):
    """The released network's logits per frame; its names without the prefix of the wrapped model."""

    def __init__(self, layers: tuple[int, ...], num_classes: int, n_segment: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inplanes = 64
        for number, depth in enumerate(layers, start=1):
            planes = 32 * 2**number
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and number > 1 else 1
                blocks.append(ReleasedBlock(inplanes, planes, n_segment, stride, stage=i == 0))
                inplanes = 4 * planes
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.new_fc = nn.Linear(inplanes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return self.new_fc(x.mean((2, 3)))

    def checkpoint(self) -> dict[str, dict[str, Tensor]]:
        """What a released file holds."""
        return {
            "state_dict": {
                f"module.{'' if key.startswith('new_fc') else 'base_model.'}{key}": value
                for key, value in self.state_dict().items()
            }
        }
