"""Train a small image-text model on two unlike sets: a WebDataset of captions, and questions as LLaVA writes them.

python examples/vlm/train.py --out runs/vlm --steps 60
mpiexec -n 2 python examples/vlm/train.py --out runs/vlm --steps 60
mixtera-hpc trace runs/vlm --verify

The sources `captions`, `noisy` (whose captions are of other pictures) and `instruct` are the domains of a mixture that
ADO learns. Every sample has one loss, and its weight is the number of bytes of its answer.
"""

import sys
from pathlib import Path

import torch
from make_data import make_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from mixtera_hpc import DataPlane, PlaneDataset, Replicas, RunFolder, compose
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.integrations.domain_metrics import domain_losses

sys.path.append(str(Path(__file__).resolve().parents[1] / "trainers"))
from command_line import TrainingRecord, parse_arguments


class ImageText(nn.Module):
    """A recurrent network that sees a picture and predicts the next byte of its text."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()
        ).append(nn.Linear(32 * 2 * 2, width))
        self.bytes = nn.Embedding(256, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.next_byte = nn.Linear(width, 256)

    def forward(self, picture: Tensor, tokens: Tensor) -> Tensor:
        """Return the loss of every byte but the first; (B, MAX_BYTES - 1)."""
        seen = self.picture(picture)[:, None]
        hidden, _ = self.recurrent(self.bytes(tokens[:, :-1]) + seen)
        return cross_entropy(self.next_byte(hidden + seen).transpose(1, 2), tokens[:, 1:], reduction="none")


def overrides_of(data: Path) -> list[str]:
    """Return the settings of the example; those of the command line come after them."""
    return [
        f"data.sets.captions={{root: {data}/captions, include: ['*.tar'], properties: {{source: json.source}}}}",
        f"data.sets.instruct={{root: {data}/instruct, include: ['*.json'], properties: {{source: source}}}}",
        "data.text=null",
        "data.transform=vlm_samples.picture_and_bytes",
        f"index.path={data}/index.h5",
        "mixture=ado",
        "mixture.unit=samples",
        "mixture.group_by=[source]",
        "mixture.algorithm={warmup: 10, refit_interval: 5}",
        "query.holdout.fraction=0.1",
        "dataplane={global_batch_size: 24, chunk_steps: 2, audit: true}",
    ]


def loss_sums(model: ImageText, samples: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of all bytes, which of them count, and their sum per sample."""
    counted = samples["counted"][rows]
    loss = model(samples["picture"][rows], samples["tokens"][rows])
    return loss, counted, (loss * counted).sum(dim=1)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with Replicas(device="cpu") as replicas:
        data = arguments.out / "data"
        config = compose([*overrides_of(data), *arguments.overrides])
        if replicas.comm.rank == 0 and not data.exists():
            make_data(data)
            build_index(config)
        replicas.comm.Barrier()
        with DataPlane.open(config, folder=RunFolder(arguments.out)) as plane:
            train(arguments, plane, replicas)


def train(arguments, plane, replicas) -> None:
    model = ImageText()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    record = TrainingRecord(arguments.out, replicas.comm.rank)
    if arguments.resume:
        state = torch.load(arguments.out / "checkpoint.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        plane.load_state_dict(state["data"])

    for samples in DataLoader(PlaneDataset(plane), batch_size=None):
        step = int(samples["step"])
        num_counted = samples["counted"].sum()
        replicas.all_reduce(num_counted)
        for part in torch.arange(len(samples["tokens"])).chunk(arguments.accumulate):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            loss, counted, sums = loss_sums(model, samples, rows)
            (sums.sum() / num_counted).backward()
            plane.record(samples, sums, rows=rows, num_tokens=counted.sum(dim=1))
            record.add(samples["positions"][rows], samples["tokens"][rows], loss, counted)
        for parameter in model.parameters():
            replicas.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        record.end_step(step)

        num_done, stop = step + 1, plane.stop_requested()
        if stop or num_done in (arguments.save_at, arguments.steps):
            # As a tensor, which torch.load reads without pickle.
            data = {name: torch.from_numpy(array) for name, array in plane.state_dict().items()}
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "data": data}
            if replicas.comm.rank == 0:
                torch.save(state, arguments.out / "checkpoint.pt")
        record.log(domain_losses(plane.completed_statistics(), plane.domain_names, "train_loss"), step)
        if stop or num_done in (arguments.steps, arguments.stop_after):
            break
    validate(model, plane, record)


def validate(model: ImageText, plane: DataPlane, record: TrainingRecord) -> None:
    """Log the loss of every source on samples that are never trained on."""
    held_out = plane.held_out()
    for batch in held_out.batches():
        samples = {name: torch.stack([torch.from_numpy(p[name]) for p in batch.payloads]) for name in batch.payloads[0]}
        with torch.no_grad():
            _, counted, sums = loss_sums(model, samples, slice(None))
        held_out.record(batch, sums, num_tokens=counted.sum(dim=1))
    losses = domain_losses([held_out.reduce(plane.next_step)], plane.domain_names, "held_out_loss")
    record.log(losses, plane.next_step - 1)


if __name__ == "__main__":
    main()
