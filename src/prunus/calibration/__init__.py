"""Text → token batches that statistics are taken on, with a record of where they came from.

Sources, as `load_calibration` (and `--calibration`) takes them:

    default                  the manual that ships inside Python; works offline on any machine
    self                     text that the model itself writes
    FILE.txt, FILE.md        one document
    FILE.jsonl, FILE.json    one document per line
    FILE.parquet             one document per row
    c4, wikipedia, code, …   from the Hugging Face hub (needs the package datasets and the network)
    mixture                  of four of these
    OWNER/NAME[:CONFIG[:SPLIT]]   any other text data set of the hub
"""

from prunus.calibration.batches import Batch, Calibration, Provenance
from prunus.calibration.loading import calibration_from_texts, calibration_from_tokens, load_calibration
from prunus.calibration.reading import Reading

__all__ = [
    "Batch",
    "Calibration",
    "Provenance",
    "Reading",
    "calibration_from_texts",
    "calibration_from_tokens",
    "load_calibration",
]
