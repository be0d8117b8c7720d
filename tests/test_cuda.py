"""A GPU is imitated: tensors without values, which know their device and refuse to be mixed with those of another.
What a GPU computes is not tested, only that all tensors of an update are where they belong.
"""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import fake_tensor as fake_tensors

import datasets.digits
import p1_train
import p2_test
import p2_train
import p3_train
from models.diffusion import Process

pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # copies ask for it
    pytest.mark.skipif(
        torch.__version__ < (2, 14), reason="imitated tensors of torch 2.4 crash; they were tried with 2.14"
    ),
]
CUDA = torch.device("cuda", 0)


def move(module: nn.Module, device: torch.device, **_: object) -> nn.Module:
    """``module.to(device)``, which cannot exchange the contents of imitated tensors."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None:
                    moved = x.detach().to(device)
                    tensors[name] = nn.Parameter(moved, x.requires_grad) if isinstance(x, nn.Parameter) else moved
    return module


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """Inside of it, ``--device cuda`` is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(torch.Tensor, "backward", lambda _: None)  # its engine asks the driver
    monkeypatch.setattr(torch.autograd, "grad", lambda y, x, **_: (y * torch.zeros_like(x),))  # as does this
    monkeypatch.setattr(p2_train, "CLASSES", 1)  # fewer and shorter samples
    monkeypatch.setattr(p2_train.EVAL, "steps", 2)
    for optimiser in (torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(optimiser, "step", lambda _: None)
    monkeypatch.setattr(Process, "signal", lambda _, t: 1 - t / 601)  # samplers read these values
    monkeypatch.setattr(Process, "sigma", lambda _, t: t / 601)
    monkeypatch.setattr(p3_train, "reestimate_batch_norm", lambda *_: None)  # its mean reads a counter
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("common.device.gpu_fault", lambda _: "")
    monkeypatch.setattr(fake_tensors.FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False)
    for module in (p1_train, p2_train, p3_train, p2_test, datasets.digits):
        for name, value in {
            "step_generator": lambda *_: None,
            "describe": lambda _: "",
            "load_faces": lambda *_: torch.zeros(3000, 3, 64, 64, dtype=torch.uint8),
            "load_digits": lambda *_: torch.zeros(3000, 3, 28, 28, dtype=torch.uint8),
            "load_labels": lambda *_: torch.zeros(3000, dtype=torch.long),
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    with fake_tensors.FakeTensorMode(allow_non_fake_inputs=True):
        yield


def test_the_imitation_refuses_to_mix_devices(cuda):
    with pytest.raises(RuntimeError):
        torch.zeros(3, device=CUDA) + torch.zeros(3)
    network = move(nn.Linear(2, 2), CUDA)
    assert {p.device for p in copy.deepcopy(network).parameters()} == {CUDA}
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("script", "make", "words"),
    [
        (p1_train, p1_train.FaceTrainer, "--model dcgan --dim 4 --eval-images 0"),
        (p1_train, p1_train.FaceTrainer, "--model sngan --dim 4 --eval-images 0 --recipe report"),
        (p2_train, p2_train.DiffusionTrainer, "--dim 8 --eval-images 0"),
        (p2_train, p2_train.DiffusionTrainer, "--dim 8 --eval-images 0 --optimiser adamw"),
        (p2_train, p2_train.DiffusionTrainer, "--dim 8 --eval-images 0 --recipe report"),
        (p3_train, p3_train.make_trainer, "--method dann-st --target svhn"),
        (p3_train, p3_train.make_trainer, "--method dann --target usps"),
        (p3_train, p3_train.make_trainer, "--method source"),
    ],
)
def test_updates_and_pictures_stay_on_the_gpu(cuda, script, make, words):
    trainer = make(script.parse_options([*words.split(), "--device", "cuda", "--no-bf16", "--batch-size", "4"]))
    for progress in (0, 0.25, 0.75):  # of DANN-ST: without a teacher, with one, and a student that teaches itself
        trainer.step, trainer.progress = int(progress * trainer.o.steps), progress
        losses = trainer.update()
        assert losses.device == CUDA
        assert losses.shape == (len(trainer.losses),)
    if script is not p3_train:
        assert trainer.picture().device.type == "cpu"
