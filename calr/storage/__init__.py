"""Files: checkpoints whole or not at all, parts that survive an interruption, model cards."""

from calr.storage.card import model_card, recipe_yaml
from calr.storage.checkpoint import (
    WORK,
    destination,
    finished,
    one_sentence,
    prepare,
    size,
    write,
    write_at_once,
    writing,
)
from calr.storage.durable import flush
from calr.storage.ledger import claim, read_ledger
from calr.storage.lock import locked
from calr.storage.manifest import read_manifest, verify
from calr.storage.offload import give_up, open_parts, remove_offloaded
from calr.storage.rungs import nearest_rung
from calr.storage.spilled import Spilled
from calr.storage.store import Store

__all__ = [
    "WORK",
    "Spilled",
    "Store",
    "claim",
    "destination",
    "finished",
    "flush",
    "give_up",
    "locked",
    "model_card",
    "nearest_rung",
    "one_sentence",
    "open_parts",
    "prepare",
    "read_ledger",
    "read_manifest",
    "recipe_yaml",
    "remove_offloaded",
    "size",
    "verify",
    "write",
    "write_at_once",
    "writing",
]
