"""Maps of chosen classes from a meta-attribution and a linear head."""

from tve_kernels.transfer_map.op import transfer_map as transfer_map
