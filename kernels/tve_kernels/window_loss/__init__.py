"""The regression loss over drawn windows, with its gradient."""

from tve_kernels.window_loss.op import window_loss as window_loss
