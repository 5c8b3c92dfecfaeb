"""The kernels, as the model package sees them: the one module that imports `tve_kernels` (folder `kernels/`)."""

from tve_kernels.backend import Backend as Backend
from tve_kernels.backend import Choice as Choice
from tve_kernels.backend import Requested as Requested
from tve_kernels.backend import choose as choose
from tve_kernels.layout import Ragged as Ragged
from tve_kernels.limits import NARROWEST_HEAD as NARROWEST_HEAD
from tve_kernels.limits import WIDEST_HEAD as WIDEST_HEAD
from tve_kernels.limits import WIDEST_ROW as WIDEST_ROW
from tve_kernels.pack_tokens import bit_words as bit_words
from tve_kernels.pack_tokens import pack_masks as pack_masks
from tve_kernels.pack_tokens import pack_windows as pack_windows
from tve_kernels.pooled_attention import pooled_attention as pooled_attention
from tve_kernels.ragged_attention import ragged_attention as ragged_attention
from tve_kernels.residual_norm import residual_norm as residual_norm
from tve_kernels.transfer_map import transfer_map as transfer_map
