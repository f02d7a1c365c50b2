"""What cards can do at best: the table is the trainer's, whose progress bar shows it a share of that."""

from train.metrics import PEAKS, Peak, peak_of

__all__ = ["PEAKS", "Peak", "peak_of"]
