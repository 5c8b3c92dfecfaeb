"""What the compile proof needs to know of a kernel: how it is called in practice."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One specialisation of one Triton program.

    `signature` maps every runtime argument to Triton's type ("*bf16", "*i32", "i32", "fp32"), in the kernel's order;
    `constexprs` maps the others to their values. Pointers and integer arguments named in `divisible_by_16` (all
    pointers, and the strides of aligned widths) are compiled as such: without it register counts mean little.
    """

    name: str  # such as "bf16 W=64"
    kernel: Any  # what @triton.jit made
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible_by_16: frozenset[str]
    num_warps: int = 4
    num_stages: int = 2
