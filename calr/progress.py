"""Progress on a terminal; elsewhere one line when a phase begins."""

import sys
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


def progress(items: Any = None, *, desc: str, unit: str, **options: Any) -> Any:
    """Show how far a loop over items is (or, without items, what `update` is told), on stderr.

    Where stderr is no terminal, the description alone is logged. options: those of tqdm.
    """
    if not sys.stderr.isatty():
        logger.info(desc)
        options["disable"] = True
    return logging.tqdm(items, desc=desc, unit=unit, **options)
