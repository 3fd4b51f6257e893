"""The trainer: the conventional and the introspective metric side by side, and a report.

Needs the extra ``idml_fast[train]``; ``import idml_fast`` does not load it.

>>> from idml_fast.train import Config, run
>>> results = run(Config(name="demo"))  # doctest: +SKIP
"""

from .config import Config, load_config
from .loop import run
from .model import TwoHeaded, load, load_loss
from .reproduce import reproduce
from .table import reproduce_table

__all__ = [
    "Config",
    "TwoHeaded",
    "load",
    "load_config",
    "load_loss",
    "reproduce",
    "reproduce_table",
    "run",
]
