"""TensorBoard beside metrics.jsonl: `tensorboard --logdir runs` shows the curves and samples of all runs together."""

from pathlib import Path


def require_tensorboard() -> None:
    """Raises ModuleNotFoundError, in one line, where the package is missing: it is not one that training needs."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError("tensorboard is not installed: pip install tensorboard, or leave it out") from None


class TensorBoard:
    """Writes the lines of a `History` as they come, into `tensorboard` in the run directory.

    Numbers become curves of their own names, the sample a text. first_step: where a resumed run goes on; what an
    earlier process wrote of later steps is not shown.
    """

    def __init__(self, run_directory: Path, first_step: int = 0):
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_directory / "tensorboard", purge_step=first_step + 1 if first_step else None)

    def __call__(self, line: dict) -> None:
        for name, value in line.items():
            if isinstance(value, str):
                # four spaces: as it is, line breaks included, for what is shown is Markdown
                self._writer.add_text(name, "    " + value.replace("\n", "\n    "), line["step"])
            elif value is not None and name != "step":
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()
