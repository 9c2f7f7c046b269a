"""One thread a test process: the tensors are small, and threads would only fight."""

import torch

torch.set_num_threads(1)
