"""What must outlive a loss of power: on disk before anything relies on it."""

import json
import os
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Have a file's data, or the names in a directory, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(file: Path, value: Any) -> None:
    """Write a value and flush it to disk."""
    with file.open("w") as opened:
        json.dump(value, opened, indent=2)
    flush(file)
