"""One thread a process: the tensors of tests are small, and threads that wait for each other cost time."""

import torch

torch.set_num_threads(1)
