"""The gradient of `nearest`, which looks at few pairs: Triton's."""

from idml_fast._triton.paired import backward, forward

__all__ = ["backward", "forward"]
