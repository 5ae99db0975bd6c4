"""The data loader and the tokenizer that `integrations.torchtitan` gives to torchtitan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer
from tyro.conf import Suppress

from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.torch import PlaneDataset

__all__ = ["PLANE_BATCH", "NoTokenizer", "PlaneDataLoader", "inputs_and_labels"]

PLANE_BATCH = "plane_batch"
"""Key of torchtitan's input dict that holds what `DataPlane.record` needs; `TitanTrainer` removes it."""


class PlaneDataLoader(BaseDataLoader):
    """The data loader of a `TitanTrainer`: micro-batches of this rank's part of each global batch.

    The labels of tokens that do not count are `IGNORE_INDEX`. Token positions start anew with every document, so that
    torchtitan's attention does not cross documents. The state is that of the data plane, the same on every rank: a
    checkpoint can be loaded by any number of ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """The data to train on."""

        # Not list[str]: torchtitan would split such values at commas.
        overrides: Sequence[str] = ()
        """Hydra overrides of the data plane, for example `experiment=demo dataplane.global_batch_size=256`."""

        _plane: Annotated[DataPlane | None, Suppress] = None
        """The open data plane; `TitanTrainer` sets it."""

    def __init__(self, config: Config, *, local_batch_size: int, **kwargs: Any) -> None:
        """Serve the open data plane; torchtitan calls this.

        Raises:
            ConfigError: the trainer is not a `TitanTrainer`, or the configuration names another dataset.
        """
        if config._plane is None:
            raise ConfigError(
                "PlaneDataLoader was built by a trainer that has not opened a data plane.\n"
                "  Use TitanTrainer.Config instead of Trainer.Config; put TitanTrainer before Trainer in the bases of "
                "a trainer of your own."
            )
        if config.dataset or config.dataset_path:
            raise ConfigError(
                f"dataloader.dataset={config.dataset!r} and dataset_path={config.dataset_path!r} mean nothing to "
                "PlaneDataLoader.\n  Remove them, and select the data with dataloader.overrides."
            )
        self._dataset = PlaneDataset(config._plane, micro_batch_size=local_batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield the remaining micro-batches of the run. **Collective.**"""
        for batch in self._dataset:
            inputs, labels = inputs_and_labels(batch)
            yield {**inputs, PLANE_BATCH: batch}, labels

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the data plane, see `DataPlane.state_dict`. **Collective.**"""
        return self._dataset.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of the data plane, see `DataPlane.load_state_dict`. **Collective.**"""
        self._dataset.load_state_dict(state_dict)


class NoTokenizer(BaseTokenizer):
    """Takes the place of torchtitan's tokenizer: the data plane serves tokens, so no assets are needed."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """No options."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__()

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "NoTokenizer cannot encode or decode.\n  Set tokenizer=HuggingFaceTokenizer.Config() and hf_assets_path."
        )

    encode = decode = get_vocab_size = _refuse


def inputs_and_labels(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch of `PlaneDataset` as torchtitan's input dict and labels; shape (B, T) each."""
    tokens = batch["tokens"]
    labels = tokens[:, 1:].masked_fill(~batch["loss_mask"], IGNORE_INDEX)
    documents = batch["document_ids"][:, :-1]
    # A token's position in its document: its index minus the index of the latest start of a document.
    index = torch.arange(documents.shape[1]).expand_as(documents)
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = torch.where(is_start, index, 0).cummax(dim=1).values
    return {"input": tokens[:, :-1].contiguous(), "positions": index - start}, labels
