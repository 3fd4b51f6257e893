"""The paper's data sets and folders of one's own: which image is of which class, in which part.

Nothing is opened here but the files that list images; `idml_fast.train.images` opens those.
"""

from .files import DataError
from .splits import PUBLISHED, Count, Listing, Splits, read

__all__ = ["PUBLISHED", "Count", "DataError", "Listing", "Splits", "read"]
