"""The choice between reading processes and a reading thread; decision 008 has the reasons."""

from mixtera_hpc.config.schema import Config

__all__ = ["may_use_processes"]


def may_use_processes(config: Config) -> bool:
    """Return True if reading processes may be started."""
    if config.dataplane.workers is not None:
        return config.dataplane.workers > 0
    # A process would pickle samples, which takes the trainer's thread longer than a reading thread disturbs it.
    return config.mixture.unit == "tokens"
