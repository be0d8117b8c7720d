"""Files, checkpoints, random numbers, averages, options, budgets, pictures."""

import argparse
import errno
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import checkpoint, options
from common.checkpoint import load_network, load_state, load_weights, save_state, save_weights
from common.device import device_and_format, hardware, noise, pick_device, step_generator
from common.ema import EMA
from common.errors import Parser, UserError, describe_os_error
from common.files import atomic, check_file, check_writable
from common.pictures import save_images, sheet, to_uint8
from common.results import check_record, read_results, record, weights_name
from common.run import Budget, Run, StopFlag, annealed, given_options, resume_options
from tests.helpers import ROOT, assert_user_error, run

CPU = torch.device("cpu")


def test_atomic_leaves_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    with atomic(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    assert stat.S_IMODE(path.stat().st_mode) & 0o044  # readable by others, unlike mkstemp's files
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half of the sec")
        raise ZeroDivisionError
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def save_small(path) -> nn.Module:
    network = small_network()
    save_weights(path, network.state_dict(), {"model": "small", "config": {}, "steps": 7})
    return network


def test_weights_round_trip(tmp_path):
    network = save_small(tmp_path / "w.safetensors")
    loaded, card = load_network(tmp_path / "w.safetensors", {"small": small_network})
    assert card["steps"] == 7
    assert not loaded.training
    for name, tensor in network.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name].float(), tensor.float(), rtol=1e-3)
        assert loaded.state_dict()[name].dtype == tensor.dtype


def test_checksums_are_those_of_sha256sum(tmp_path):
    save_small(tmp_path / "a.safetensors")
    save_small(tmp_path / "b.safetensors")
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("OK") == 2


@pytest.mark.parametrize("checksums", [True, False])
def test_damaged_weights_are_refused(tmp_path, checksums):
    path = tmp_path / "w.safetensors"
    save_small(path)
    data = path.read_bytes()
    if not checksums:
        (tmp_path / "SHA256SUMS").unlink()
    damages = [data[: len(data) // 2], b"", b"a text"]
    if checksums:  # a flipped bit of a number can only be seen with them
        damages.append(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"w\.safetensors"):
            load_weights(path)


def test_weights_of_another_network_are_refused(tmp_path):
    save_small(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="'small'"):
        load_network(tmp_path / "w.safetensors", {"sngan": small_network})
    with pytest.raises(UserError, match="do not fit"):
        load_network(tmp_path / "w.safetensors", {"small": lambda: nn.Linear(3, 4)})


def test_state_round_trip_and_damage(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"a": torch.ones(3), "b": [1, {"c": None}]})
    assert load_state(path)["b"] == [1, {"c": None}]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        load_state(path)
    with pytest.raises(UserError, match="no training state"):
        load_state(tmp_path / "none.pt")


def test_a_state_is_not_called_damaged_for_want_of_memory(tmp_path, monkeypatch):
    def load(*_args, **_options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    save_state(tmp_path / "state.pt", {})
    monkeypatch.setattr(torch, "load", load)
    assert_user_error(run(lambda: load_state(tmp_path / "state.pt")), "not enough memory")


@pytest.fixture
def small_files():
    """Files cannot grow beyond 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_state_that_does_not_fit_is_a_user_error(tmp_path, small_files):
    def main():
        save_state(tmp_path / "state.pt", {"a": torch.ones(10_000)})

    assert_user_error(run(main), "check this path, or choose another place")
    assert os.listdir(tmp_path) == []


def test_too_little_memory_is_a_user_error():
    def main(*sizes):
        torch.empty(10**16)

    def on_a_gpu():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    def of_python():
        raise MemoryError

    for lacking in (main, on_a_gpu, of_python):
        assert_user_error(run(lacking), "not enough memory; choose another --device, or lower --batch-size")
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(lambda: torch.ones(2) + torch.ones(3))


def test_weights_whose_writing_was_stopped_can_be_read(tmp_path, monkeypatch):
    """Between the weights and their checksum."""
    save_small(tmp_path / "w.safetensors")
    write = checkpoint.write_checksum

    def stopped(path, digest):
        if digest:
            raise KeyboardInterrupt
        write(path, digest)

    monkeypatch.setattr(checkpoint, "write_checksum", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path / "w.safetensors", nn.Linear(1, 1).state_dict(), {"model": "other"})
    assert load_weights(tmp_path / "w.safetensors")[1] == {"model": "other"}


def test_noise_of_a_sample_depends_on_seed_and_index_only():
    rows = noise(5, range(20), 100)
    assert torch.equal(noise(5, [7], 100)[0], rows[7])
    assert len({tuple(row.tolist()) for row in torch.cat([rows, noise(6, range(20), 100)])}) == 40
    many = noise(0, range(2000), 10)
    assert many.mean().abs() < 0.03
    assert many.std().item() == pytest.approx(1, abs=0.03)
    assert (many[1:] * many[:-1]).mean().abs() < 0.03  # neighbours are independent


def test_step_generators_repeat():
    def draw(*seeds: int) -> float:
        return torch.rand(1, generator=step_generator(CPU, *seeds)).item()

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(a, b) for a in range(-3, 10) for b in range(10)}) == 130


def test_unknown_and_absent_devices():
    torch.backends.cudnn.allow_tf32 = True
    assert pick_device("cpu") == CPU
    assert not torch.backends.cudnn.allow_tf32  # float32 means float32 on a GPU, too
    for name in ("abacus", "meta"):
        with pytest.raises(UserError, match=f"--device {name}: unknown"):
            pick_device(name)
    with pytest.raises(UserError, match="cuda:99"):
        pick_device("cuda:99")


def test_a_gpu_that_does_not_work(monkeypatch, capsys):
    """One that this PyTorch has no code for, say. Here is none at all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def broken(*_args, **_options):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with more")

    monkeypatch.setattr(torch, "ones", broken)
    assert pick_device("auto") == CPU
    assert capsys.readouterr().err == (
        "note: the GPU does not work (CUDA error: no kernel image is available); the CPU computes\n"
    )
    with pytest.raises(UserError, match=r"--device cuda: does not work \(CUDA error: .*\); use --device cpu"):
        pick_device("cuda")


def test_each_of_several_processes_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("common.device.gpu_fault", lambda _: "")
    assert pick_device("cuda:3") == torch.device("cuda", 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("cuda", "cuda:0"):
        assert pick_device(name) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("vendor", "flags", "pays"),
    [
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx512f", False),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", True),
    ],
)
def test_processors_on_which_bfloat16_pays(monkeypatch, vendor, flags, pays):
    info = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: Abacus 9\nflags\t\t: fpu {flags}\n"
    monkeypatch.setattr("common.device.cpu_info", lambda: info)
    assert device_and_format("cpu", None) == (CPU, pays)
    assert [device_and_format("cpu", said)[1] for said in (True, False)] == [True, False]
    assert hardware(CPU).startswith("Abacus 9, ")
    monkeypatch.setattr("common.device.cpu_info", lambda: "")
    assert not device_and_format("cpu", None)[1]
    assert hardware(CPU).startswith("CPU, ")


def test_average_follows_the_closed_form():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = EMA(network, 0.9)
    nn.init.ones_(network.weight)
    for _ in range(5):
        ema.update(network, step=10**6)
    assert ema.module.weight.item() == pytest.approx(1 - 0.9**5)
    assert not ema.module.weight.requires_grad


def test_average_ramps_up_and_can_be_off():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ramped, off = EMA(network, 0.999), EMA(network, 0.0)
    nn.init.ones_(network.weight)
    ramped.update(network, step=0)
    off.update(network, step=0)
    assert ramped.module.weight.item() == pytest.approx(0.9)
    assert off.module.weight.item() == 1


@pytest.mark.parametrize("power", [0, 1, 2])
def test_an_average_without_a_bound_weighs_steps_by_a_power_of_their_number(power):
    network, values = nn.Linear(1, 1, bias=False), torch.randn(50)
    nn.init.constant_(network.weight, values[0])
    ema = EMA(network, 1.0, power)
    for step, value in enumerate(values[1:]):
        nn.init.constant_(network.weight, value)
        ema.update(network, step)
    number = torch.arange(1, 51)  # 1 for the first weights, s + 2 for those of step s
    counts = (torch.ones(50), number, number * (number + 1))[power]
    assert ema.module.weight.item() == pytest.approx(float((counts * values).sum() / counts.sum()), abs=1e-5)


def test_annealing_holds_then_falls_to_zero():
    assert [annealed(p) for p in (0, 0.25, 0.5, 0.75, 1, 1.5)] == [1, 1, 1, 0.5, 0, 0]


def stopped_by(number: int, handler: signal.Handlers) -> bool:
    """Whether a signal stops a training that was started with this handler of it."""
    before = signal.signal(number, handler)
    try:
        with StopFlag() as flag:
            os.kill(os.getpid(), number)
        return flag.set
    finally:
        signal.signal(number, before)


def test_a_training_in_the_background_can_be_interrupted():
    """Where the shell has it ignore Ctrl-C, ``kill -INT`` still stops it."""
    assert stopped_by(signal.SIGINT, signal.SIG_IGN)


def test_hangups_are_left_to_nohup():
    assert not stopped_by(signal.SIGHUP, signal.SIG_IGN)
    assert stopped_by(signal.SIGHUP, signal.SIG_DFL)


def test_budget_is_whichever_ends_first():
    assert Budget(100, None).progress(25) == 0.25
    assert Budget(100, 1.0, elapsed=30).progress(25) == pytest.approx(0.5, abs=0.01)
    assert Budget(100, 1.0, elapsed=61).progress(25) == 1


def options_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    for name in ("--resume", "--data", "--out", "--record"):
        parser.add_argument(name, type=type(ROOT), default=None)
    return parser


def test_given_options_are_told_from_defaults():
    parser = options_parser()
    assert given_options(parser, ["--lr", "0.1", "--no-flip"]) == {"lr", "flip"}
    assert given_options(parser, []) == set()


def test_resume_names_every_changed_option(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["./p1_train.py"])
    parser = options_parser()
    saved = {"lr": 0.2, "flip": True, "data": "d", "out": "o", "resume": None}
    command = {"command": "python3 p1_train.py --lr 0.2"}
    (tmp_path / "options.json").write_text(json.dumps(command | {"options": saved}))

    def resumed(*argv: str) -> argparse.Namespace:
        argv = ["--resume", str(tmp_path), *argv]
        return resume_options(parser, parser.parse_args(argv), argv)

    assert resumed().lr == 0.2
    assert resumed("--lr", "0.2", "--data", "elsewhere").data.name == "elsewhere"
    with pytest.raises(UserError, match=r"--flip \(run True, given False\), --lr \(run 0\.2, given 0\.1\), --out"):
        resumed("--lr", "0.1", "--no-flip", "--out", "elsewhere")
    (tmp_path / "options.json").write_text(json.dumps({"command": "python3 p9_train.py", "options": saved}))
    with pytest.raises(UserError, match=r"is a run of p9_train\.py; resume it with python3 p9_train\.py"):
        resumed()
    for damaged in ("{", "[]", "{}", '{"command": "", "options": {}}', '{"command": 1, "options": {}}'):
        (tmp_path / "options.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            resumed()
    with pytest.raises(UserError, match="not found"):
        resume_options(parser, argparse.Namespace(resume=tmp_path / "none"), [])


def test_run_folders_are_numbered_and_rows_after_a_step_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["p1_train.py", "--lr", "1"])
    o = argparse.Namespace(out=tmp_path, resume=None)
    runs = [Run.start("p1", o) for _ in range(2)]
    assert [r.folder.name for r in runs] == ["p1_000", "p1_001"]
    assert runs[1].record["command"] == "python3 p1_train.py --lr 1"
    monkeypatch.setattr(sys, "argv", ["./p1_train.py", "--resume", "x", "--max-minutes", "9"])
    runs[1].resumed(argparse.Namespace(max_minutes=9.0))
    record = runs[1].record
    assert record["command"] == "python3 p1_train.py --lr 1"
    assert record["resumed"][0]["command"] == "python3 p1_train.py --resume x --max-minutes 9"
    assert record["options"]["max_minutes"] == record["budget"]["max_minutes"] == 9
    for step in (10, 20, 30):
        runs[0].log({"step": step, "loss": step / 7})
    kept = ["step,loss", "10,1.4286", "20,2.8571"]
    with runs[0].metrics_path.open("a") as f:
        f.write("2")  # of a row for step 25, cut
    runs[0].forget_after(20)
    assert runs[0].metrics_path.read_text().split() == kept
    for cut in ("", "step,lo"):
        runs[0].metrics_path.write_text(cut)
        runs[0].forget_after(20)
        for step in (10, 20):
            runs[0].log({"step": step, "loss": step / 7})
        assert runs[0].metrics_path.read_text().split() == kept


def test_runs_that_start_together_have_folders_of_their_own(tmp_path):
    o = argparse.Namespace(out=tmp_path, resume=None)
    (tmp_path / "p1_0998").mkdir()
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: Run.start("p1", o).folder.name, range(8)))
    assert sorted(folders) == sorted(f"p1_{number}" for number in range(999, 1007))


def test_weights_of_runs_have_names_of_their_own(tmp_path):
    run = Run.start("p1", argparse.Namespace(out=tmp_path, resume=None))
    assert weights_name(run.folder / "last.safetensors") == "p1_000/last"
    assert weights_name(tmp_path / "p1_sngan.safetensors") == "p1_sngan"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    run = Run.start("p1", argparse.Namespace(out=tmp_path, resume=None))
    with run.alone(), run.alone():
        assert run.folder.name == "p1_000"


def test_what_a_link_points_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "labels.csv"
    link.symlink_to(tmp_path / "there" / "real.csv")
    with atomic(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "there" / "real.csv").read_text() == "new"


def test_links_in_a_loop_are_replaced(tmp_path):
    link = tmp_path / "labels.csv"
    link.symlink_to(link)
    with atomic(link) as temporary:
        temporary.write_text("new")
    assert link.read_text() == "new"


def test_what_happens_inside_is_not_taken_for_another_process(tmp_path):
    run = Run.start("p1", argparse.Namespace(out=tmp_path, resume=None))
    with pytest.raises(BlockingIOError), run.alone():
        raise BlockingIOError
    with pytest.raises(UserError, match="is being trained by another process"), run.alone(), run.alone():
        pass


def test_help_tells_defaults_but_for_those_of_a_recipe(capsys):
    parser = Parser("What it does.\n  Second line.")
    parser.add_argument("--seed", default=0, help="seed of it")
    parser.add_argument("--lr", default=0.5, help="* the rate")
    parser.add_argument("--device", default="auto", help="auto or cpu (default: auto)")
    parser.add_argument("--out", help="a folder")
    parser.add_argument("--flip", default=True, help="* mirror (default: %(default)s)")  # as Python 3.10 completes it
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "What it does.\n  Second line.\n" in text
    assert [line.partition("  ")[2].strip() for line in text.split("\n  --")[1:]] == [
        "seed of it (default: 0)",
        "* the rate",
        "auto or cpu (default: auto)",
        "a folder",
        "* mirror",
    ]


def test_pixels_are_rounded_and_clamped():
    x = torch.tensor([-2, -1, 0, 0.999, 1, 3]).view(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255, 255]


def test_sheet_is_filled_row_by_row():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    picture = sheet(images, columns=3, gap=1)
    assert picture.shape == (3, 7, 10)
    assert picture[0, 1, 1::3].tolist() == [0, 1, 2]
    assert picture[0, 4, 1::3].tolist() == [3, 4, 255]


def test_images_appear_together_or_not_at_all(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    names = ["0001.png", "0002.png", "0003.png"]
    save_images(images, names, tmp_path / "a" / "out")
    assert sorted(os.listdir(tmp_path / "a" / "out")) == names
    with Image.open(tmp_path / "a" / "out" / "0002.png") as image:
        read = np.asarray(image)
    assert np.array_equal(read, images[1].permute(1, 2, 0).numpy())

    def full(image, path):
        if path.name == "0002.png":
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(b"png")

    (tmp_path / "way" / "0003.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"0003\.png: is a folder"):
        save_images(images, names, tmp_path / "way")
    assert os.listdir(tmp_path / "way") == ["0003.png"]

    monkeypatch.setattr("common.pictures.save_png", full)
    with pytest.raises(OSError, match="No space"):
        save_images(images, names, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def started(code: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(command, cwd=ROOT, env=environment, stderr=-1, text=True, check=False, **options)


def test_output_without_room_is_one_line():
    code = "from common.errors import run_main; run_main(lambda: print('all done'))"
    with Path("/dev/full").open("w") as full:
        done = started(code, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "-c: error: the output folder: the disk is full; free some space or choose another place\n"


def test_names_that_the_terminal_cannot_show_are_escaped():
    code = "import sys; sys.stdout.reconfigure(encoding='ascii'); from common.errors import run_main; "
    done = started(code + "run_main(lambda: print('caf\\xe9 \\udce9'))", stdout=-1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\udce9\n", "")


def test_closed_standard_error():
    code = "import os, sys; os.close(2); sys.stderr = None; from common.errors import run_main; from tqdm import tqdm; "
    assert started(code + "run_main(lambda: list(tqdm([1], disable=False)))", stdout=-1).returncode == 0


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        ("import no_such_package", 1, "-c: error: the package no_such_package is not installed; use .venv/bin/python"),
        ("raise KeyboardInterrupt", 130, "-c: interrupted\n"),
    ],
)
def test_what_happens_before_a_script_runs_is_one_line(raised, code, line):
    done = started(f"import common.start; {raised}", stdout=-1)
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_every_script_starts_alike():
    scripts = [
        path for path in (*ROOT.glob("*.py"), ROOT / "datasets" / "prepare.py") if "run_main(main)" in path.read_text()
    ]
    assert len(scripts) == 9
    for path in scripts:
        first = next(line for line in path.read_text().splitlines() if re.match("import|from", line))
        assert first.startswith("import common.start"), path


def test_a_reader_that_leaves_is_no_error():
    """As in ``bash hw2_3.sh IMAGES CSV --evaluate TRUTH | head -1``."""
    code = "from common.errors import run_main; run_main(lambda: [print(i) for i in range(10**6)])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bogus 3", "unrecognized arguments: --bogus 3"),
        ("--steps 0", "argument --steps: 0 is not a positive whole number"),
        ("--steps ten", "argument --steps: ten is not a positive whole number"),
        ("--minutes nan", "argument --minutes: nan is not a positive number"),
        ("--minutes long", "argument --minutes: long is not a positive number"),
        ("--ema 1", "argument --ema: 1 is not a number from 0 to below 1"),
        ("--ema -0.1", "argument --ema: -0.1 is not a number from 0 to below 1"),
        ("--weight inf", "argument --weight: inf is not a number from 0"),
        ("--batch 1", "argument --batch: 1 is not a whole number from 2"),
        ("--images 1", "argument --images: 1 is not 0 or a whole number from 2"),
        (f"--seed {2**63}", f"argument --seed: {2**63} is not a whole number from -2.63 to below 2.63"),
        ("--steps=--", "--steps=--: -- is no value; a path of that name is ./--"),
        ("--steps " + "9" * 400, "argument --steps: 9+ is not a positive whole number"),
    ],
)
def test_wrong_options_are_one_line(capsys, words, message):
    parser = Parser("docstring")
    parser.add_argument("--steps", type=options.positive_int)
    parser.add_argument("--minutes", type=options.positive_float)
    parser.add_argument("--ema", type=options.share_of_one)
    parser.add_argument("--weight", type=options.weight)
    parser.add_argument("--batch", type=options.several)
    parser.add_argument("--images", type=options.several_or_none)
    parser.add_argument("--seed", type=options.seed)
    with pytest.raises(UserError, match=f"^{message}; --help lists the options$"):
        parser.parse_args(words.split())
    assert capsys.readouterr() == ("", "")


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        check_file(tmp_path)
    with pytest.raises(UserError, match="is a folder"), atomic(tmp_path):
        pass
    check_file(tmp_path / "new" / "file.png")
    for place in (ROOT / "README.md", ROOT / "README.md" / "x"):
        with pytest.raises(UserError, match="not a folder"):
            check_writable(place)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line():
    error = OSError(28, "No space left on device", "/x/y")
    assert describe_os_error(error) == "/x/y: the disk is full; free some space or choose another place"


# Result files


def test_result_rows_are_replaced_by_key_and_sorted(tmp_path):
    weights = tmp_path / "w"
    weights.write_bytes(b"abc")
    path = tmp_path / "r.json"
    for seed, value in ((1, 0.5), (0, 1 / 3), (1, 0.7)):
        record(path, {"seed": seed}, {"fd": value}, weights, CPU)
    rows = read_results(path)
    assert [(row["key"]["seed"], row["scores"]["fd"]) for row in rows] == [(0, 0.333333), (1, 0.7)]
    assert {row["weights"] for row in rows} == {"ba7816bf8f01"}  # SHA-256 of "abc"
    assert all(row["command"].startswith("python3 ") and row["commit"] and row["hardware"] for row in rows)
    assert len(path.read_text().splitlines()) == 4


def test_a_row_whose_key_has_a_tuple_is_replaced_too(tmp_path):
    """JSON gives it back as a list."""
    path = tmp_path / "r.json"
    for value in (0.5, 0.7):
        record(path, {"guide": (250, 500)}, {"fd": value}, None, CPU)
    assert [(row["key"], row["scores"]) for row in read_results(path)] == [({"guide": [250, 500]}, {"fd": 0.7})]


def test_scripts_that_record_at_the_same_time_lose_no_row(tmp_path):
    path = tmp_path / "r.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: record(path, {"seed": seed}, {"fd": 1.0}, None, CPU), range(16)))
    assert {row["key"]["seed"] for row in read_results(path)} == set(range(16))


def test_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a device or a pipe"):
        check_file(tmp_path / "pipe")
    with pytest.raises(UserError, match="a device or a pipe"):
        check_record(tmp_path / "pipe", scored=True)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"scores": {}}]'])
def test_foreign_result_files(tmp_path, content):
    path = tmp_path / "r.json"
    with pytest.raises(UserError, match="no such result file"):
        read_results(path)
    path.write_text(content)
    with pytest.raises(UserError, match="not a result file"):
        check_record(path, scored=True)
