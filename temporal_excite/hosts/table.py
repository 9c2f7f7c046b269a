"""The known block classes: one line each, ``class: loc1, loc2, loc3, loc4``. See :class:`~.blocks.Host`."""

from .blocks import Host, register_host

_TABLE = {
    "timm.models.resnet.BasicBlock": Host("pre:conv1", "pre:conv2", "out:bn2", "out:bn2"),
    "timm.models.resnet.Bottleneck": Host("pre:conv1", "pre:conv2", "pre:conv3", "out:bn3"),
    # one relu, called after every convolution: loc2 is before it
    "timm.models.res2net.Bottle2neck": Host("pre:conv1", "out:bn1", "pre:conv3", "out:bn3"),
    "timm.models._efficientnet_blocks.InvertedResidual": Host(
        "pre:conv_s2d|conv_pw", "pre:conv_dw", "pre:conv_pwl", "out:bn3", live="has_skip"
    ),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": Host(
        "pre:conv_s2d|conv_dw", "out:bn1", "pre:conv_pw", "out:bn2", live="has_skip"
    ),
    "temporal_excite.models.bninception.InceptionBlock": Host("pre:", "out:"),
}

for _name, _host in _TABLE.items():
    register_host(_name, _host)
