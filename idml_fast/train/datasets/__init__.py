"""The paper's data sets and folders of one's own: which image is of which class, in which part.

Nothing is opened here but the files that list images; `idml_fast.train.images` opens those.
"""

from .files import DataError
from .readers import READERS, READERS_OF_DOMAINS
from .splits import PUBLISHED, Count, Listing, Splits, read

DOMAINS = tuple(READERS_OF_DOMAINS)  # the data sets that are learned from one domain
NAMES = *READERS, *DOMAINS

__all__ = ["DOMAINS", "NAMES", "PUBLISHED", "Count", "DataError", "Listing", "Splits", "read"]
