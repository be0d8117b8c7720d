"""Training by two processes, on the CPU, against one; and by torchrun."""

import os
import socket
import subprocess
import sys

import torch

import p1_train
import p2_train
import p3_train
from common.checkpoint import load_weights
from common.parallel import agree, average_gradients, leave, share
from tests.helpers import ROOT, assert_user_error, run


def test_one_process_has_all_of_a_batch():
    x = torch.arange(6).view(3, 2)
    assert torch.equal(share(x), x)
    assert agree(0.25, True) == [0.25, True]
    layer = torch.nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    average_gradients(torch.optim.SGD(layer.parameters()))
    assert torch.equal(layer.weight.grad, torch.ones(1, 2))


def test_shares_are_the_batch_in_order(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        shares.append(share(torch.arange(12)))
    assert [len(part) for part in shares] == [4, 4, 4]
    assert torch.equal(torch.cat(shares), torch.arange(12))


def test_a_batch_that_cannot_be_shared(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ("--data", digits, "--batch-size", 3, "--dim", 4, "--eval-images", 0, "--device", "cpu")
    assert_user_error(run(p2_train.main, *words, "--out", tmp_path / "runs"), "--batch-size 3", "a multiple of 2")
    assert not (tmp_path / "runs").exists()


def updates(script: str, words: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """All weights of a new trainer before and after three updates."""
    module = {"p1": p1_train, "p2": p2_train, "p3": p3_train}[script]
    make = {"p1": p1_train.FaceTrainer, "p2": p2_train.DiffusionTrainer, "p3": p3_train.make_trainer}[script]
    trainer = make(module.parse_options(words))
    for part in trainer.parts.values():  # batch statistics are those of a share, so there shall be none
        for layer in part.modules() if isinstance(part, torch.nn.Module) else ():
            if isinstance(layer, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                layer.eval().train = lambda _mode=True, layer=layer: layer

    def weights() -> torch.Tensor:
        networks = [part for part in trainer.parts.values() if isinstance(part, torch.nn.Module)]
        return torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])

    before = weights()
    trainer.progress = 0.5
    for trainer.step in range(3):
        trainer.update()
    leave()
    return before, weights()


def process(rank: int, port: int, jobs: list[tuple], folder: str) -> None:
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()})
    torch.set_num_threads(1)
    torch.save([updates(*job)[1] for job in jobs], f"{folder}/{rank}.pt")


def test_two_processes_train_what_one_does(faces, domains, tmp_path):
    """The same updates but for the order of sums."""
    common = ["--dim", "4", "--batch-size", "8", "--device", "cpu", "--no-bf16", "--out", str(tmp_path / "runs")]
    jobs = [
        ("p1", ["--data", str(faces), "--eval-images", "0", *common]),
        ("p2", ["--data", str(domains / "mnistm"), "--eval-images", "0", *common]),
        ("p2", ["--data", str(domains / "mnistm"), "--eval-images", "0", "--optimiser", "adamw", *common]),
        ("p3", ["--data", str(domains), "--method", "dann", *common]),
        ("p3", ["--data", str(domains), "--method", "dann-st", "--students", "0", "--threshold", "0.5", *common]),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, jobs, str(tmp_path)), nprocs=2)
    assert len(list((tmp_path / "runs").iterdir())) == len(jobs)
    both = zip(*(torch.load(tmp_path / name, weights_only=True) for name in ("0.pt", "1.pt")), strict=True)
    for job, (first, second) in zip(jobs, both, strict=True):
        before, alone = updates(*job)
        moved = (alone - before).norm()
        assert moved > 0
        assert torch.equal(first, second)
        assert (first - alone).norm() < 1e-3 * moved


def test_torchrun_goes_on_with_a_run(domains, tmp_path):
    runs = tmp_path / "runs"
    words = ("--data", domains, "--dim", 2, "--batch-size", 4, "--device", "cpu", "--steps", 2, "--out", runs)
    assert run(p3_train.main, *words).code == 0
    (folder,) = runs.iterdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["p3_train.py", "--resume", str(folder), "--steps", "4"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 1
    assert list(runs.iterdir()) == [folder]
    assert load_weights(folder / "last.safetensors")[1]["steps"] == 4
    assert len((folder / "metrics.csv").read_text().splitlines()) == 3
