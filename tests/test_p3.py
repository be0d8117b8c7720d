"""Problem 3, training on tiny data: what adaptation sees, how it is guided, and how it resumes."""

import copy
import csv
import math

import pytest
import torch
from torch import nn

import p3_train
from common.checkpoint import load_network, load_state, load_weights
from common.run import annealed
from datasets.augment import digit_input, geometry, negatives, neighbours, soften
from models.dann import NETWORKS, Dann
from tests.helpers import assert_user_error, run, smooth_images, write_index, write_pngs


@pytest.fixture
def unlabelled(domains, tmp_path):
    """The same data with no label column in the lists of the targets."""
    for name in ("mnistm", "svhn", "usps"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "data").symlink_to(domains / name / "data")
        index = domains / name / ("train.csv" if name == "mnistm" else "unlabelled.csv")
        (tmp_path / "d" / name / "train.csv").write_bytes(index.read_bytes())
    return tmp_path / "d"


def train(data, out, *options: object):
    common = ("--batch-size", 4, "--device", "cpu", "--no-bf16")
    if not {"source", "target"} & set(options):
        common += ("--dim", 2)
    return run(p3_train.main, "--data", data, "--out", out, *common, *options)


@pytest.mark.parametrize(("method", "target"), [("dann", "usps"), ("dann-st", "svhn")])
def test_adaptation_needs_no_target_labels(unlabelled, tmp_path, method, target):
    assert train(unlabelled, tmp_path, "--method", method, "--target", target, "--steps", 3).code == 0
    folder = tmp_path / f"p3_{method}_{target}_000"
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert all(rows[-1][c] for c in ("source", "validator", "domain_source", "domain_target", "loss_class"))
    assert sum(float(rows[-1][f"share_{c}"]) for c in range(10)) == pytest.approx(1, abs=1e-3)
    state, card = load_weights(folder / "best.safetensors")
    Dann(**card["config"]).load_state_dict(state)
    assert card["options"]["standardise"] is True


@pytest.mark.parametrize(("method", "target"), [("source", "svhn"), ("target", "usps")])
def test_baselines(domains, tmp_path, monkeypatch, method, target):
    """The report's ResNet34 (here a small network), or the one that is adapted; either as load_network reads it."""
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    monkeypatch.setitem(NETWORKS, "resnet34", lambda: nn.Sequential(*layers))
    for number, network in enumerate(NETWORKS):
        options = ("--method", method, "--target", target, "--steps", 1, "--network", network)
        assert train(domains, tmp_path, *options).code == 0
        path = tmp_path / f"p3_{method}_{target}_{number:03d}" / "best.safetensors"
        trained, card = load_network(path, NETWORKS)
        assert trained(torch.zeros(1, 3, card["options"]["size"], card["options"]["size"])).shape == (1, 10)
        assert set(card["held_out_scores"]) == {"error"}


def test_adaptation_is_of_one_network(domains, tmp_path):
    for size in (31, 64):
        assert_user_error(train(domains, tmp_path, "--size", size), f"--size {size}", "32 to 63")
    assert_user_error(train(domains, tmp_path, "--method", "dann", "--network", "resnet34"), "--network resnet34")


def test_baselines_do_not_adapt(domains, tmp_path):
    outcome = train(domains, tmp_path, "--method", "source", "--no-align", "--students", 0)
    assert_user_error(outcome, "--align, --students", "--method source", "leave it out")
    assert_user_error(train(domains, tmp_path, "--method", "target", "--cutout"), "--cutout", "--method target")


def test_options_that_would_do_nothing(domains, tmp_path):
    assert_user_error(train(domains, tmp_path, "--method", "source", "--dim", 2), "--dim 2", "--network dann")
    assert_user_error(train(domains, tmp_path, "--fit", "--no-geometry"), "--fit", "--no-geometry")


def test_the_upper_bound_needs_labels(unlabelled, tmp_path):
    outcome = train(unlabelled, tmp_path, "--method", "target", "--target", "svhn", "--steps", 1)
    assert_user_error(outcome, unlabelled / "svhn" / "train.csv", "label")


@pytest.mark.parametrize("method", ["source", "dann", "dann-st"])
def test_images_are_augmented_in_full_precision(domains, tmp_path, monkeypatch, method):
    seen = []

    def geometry(x, *_, **__):
        seen.append(torch.is_autocast_enabled("cpu"))
        return x

    monkeypatch.setattr(p3_train, "geometry", geometry)
    options = {"source": ("--geometry", "--network", "dann"), "dann": (), "dann-st": ("--students", 1)}[method]
    assert train(domains, tmp_path, "--method", method, "--steps", 2, "--bf16", *options).code == 0
    assert seen and not any(seen)


def test_every_network_needs_a_step(domains, tmp_path):
    wrong = train(domains, tmp_path, "--method", "dann-st", "--students", 4, "--steps", 4)
    assert_user_error(wrong, "--students 4 --steps 4")


def test_too_few_images(domains, tmp_path):
    for name in ("mnistm", "svhn"):
        paths = write_pngs(tmp_path / name / "data", smooth_images(19, 28))
        write_index(tmp_path / name / "train.csv", [(path.name, 1) for path in paths])
    for method, name in (("dann", "mnistm"), ("target", "svhn")):
        few = train(tmp_path, tmp_path / "runs", "--method", method)
        assert_user_error(few, tmp_path / name, "19 training images; at least 20 are needed")


def test_resume_is_bit_equal(domains, tmp_path, monkeypatch):
    options = ("--method", "dann-st", "--steps", 6, "--eval-every", 3, "--threshold", 0.1, "--students", 2, "--keep")
    assert train(domains, tmp_path / "a", *options).code == 0
    update = p3_train.AdaptationTrainer.update

    def killed(self):
        if self.step == 5:
            raise RuntimeError("killed")
        return update(self)

    monkeypatch.setattr(p3_train.AdaptationTrainer, "update", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(domains, tmp_path / "b", *options, "--save-every", 1e-9)
    monkeypatch.setattr(p3_train.AdaptationTrainer, "update", update)
    name = "p3_dann-st_svhn_000"
    assert run(p3_train.main, "--resume", tmp_path / "b" / name).code == 0
    a, b = (load_state(tmp_path / x / name / "state.pt") for x in "ab")
    (a_labels, a_place), (b_labels, b_place) = (x["parts"]["generation"].values() for x in (a, b))
    assert a_place == b_place == {"number": 2, "born": 4}
    assert torch.equal(a_labels, b_labels)
    for part in ("network", "average", "domain"):
        for key, tensor in a["parts"][part].items():
            assert torch.equal(tensor, b["parts"][part][key]), (part, key)
    kept = sorted((tmp_path / "b" / name).glob("step_*.safetensors"))
    assert [load_weights(path)[1]["steps"] for path in kept] == [3, 6]


def test_source_labels_fade(domains, tmp_path, monkeypatch):
    assert [p3_train.source_factor(p) for p in (0, 0.25, 0.5, 1)] == [1, 1, 0.5, 0.1]
    update, descend, descended, expected = p3_train.AdaptationTrainer.update, p3_train.DigitTrainer.descend, [], []

    def recorded_update(self):
        losses = update(self)
        source, domain, target = losses[:3].tolist()
        expected.append(p3_train.source_factor(self.progress) * source + domain + target)
        return losses

    def recorded_descend(self, loss):
        descended.append(loss.item())
        descend(self, loss)

    monkeypatch.setattr(p3_train.AdaptationTrainer, "update", recorded_update)
    monkeypatch.setattr(p3_train.DigitTrainer, "descend", recorded_descend)
    assert train(domains, tmp_path, "--method", "dann-st", "--target", "svhn", "--steps", 5, "--students", 0).code == 0
    assert descended == pytest.approx(expected)


def students(domains, tmp_path, *options):
    words = ("--method", "dann-st", "--target", "usps", "--students", 1, "--dim", 2, "--batch-size", 4, "--no-bf16")
    words += ("--data", domains, "--out", tmp_path, "--device", "cpu", *options)
    return p3_train.make_trainer(p3_train.parse_options(list(map(str, words))))


def test_an_update_is_that_of_the_paper(domains, tmp_path, monkeypatch):
    """Ganin et al. 2016, eq. 13 to 15: the features descend the class loss and climb the domain loss, which the domain
    classifier descends; the weight of the climb grows over the run."""
    t = students(domains, tmp_path, "--students", 0, "--self-training", 0, "--adversary", 0.5, "--method", "dann-st")
    for part in (t.network, t.domain):
        part.double()  # float32 sums depend on the processor, by 2e-6
    see = t.see
    monkeypatch.setattr(t, "see", lambda x: see(x).double())
    seen = []
    monkeypatch.setattr(t, "augmented", lambda x, _, as_target=False: seen.append((x, as_target)) or t.see(x))
    monkeypatch.setattr(t, "descend", lambda loss: loss.backward())
    drawn, draw = [], t.draw
    monkeypatch.setattr(t, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    network, domain, t.progress = copy.deepcopy(t.network), copy.deepcopy(t.domain), 0.1
    losses = dict(zip(t.losses, t.update().tolist(), strict=True))

    source, target = t.images[drawn[0]], t.target_images[drawn[1]]
    assert [as_target for _, as_target in seen] == [True, False]
    assert torch.equal(seen[0][0], source)
    assert torch.equal(seen[1][0], target)
    h_s, h_t = network.extractor(t.see(source)), network.extractor(t.see(target))  # statistics of each domain
    loss_class = torch.nn.functional.cross_entropy(network.predictor(h_s), t.labels[drawn[0]])
    logits, is_source = domain(torch.cat([h_s, h_t])), torch.tensor([1.0] * 4 + [0.0] * 4)
    loss_domain = torch.nn.functional.binary_cross_entropy_with_logits(logits, is_source)
    assert losses["loss_class"] == pytest.approx(loss_class.item(), rel=1e-5)
    assert losses["loss_domain"] == pytest.approx(loss_domain.item(), rel=1e-5)
    for module, factor, ours in (
        (network.extractor, -0.5 * 0.46211716, t.network.extractor),
        (network.predictor, 0, t.network.predictor),
        (domain, 1, t.domain),
    ):
        parameters = list(module.parameters())
        of_class, of_domain = (
            torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            for loss in (loss_class, loss_domain)
        )
        for a, b, p in zip(of_class, of_domain, ours.parameters(), strict=True):
            assert torch.allclose(p.grad, a + factor * b, atol=1e-6)
    trained = {p for group in t.optimiser.param_groups for p in group["params"]}
    assert trained == {*t.network.parameters(), *t.domain.parameters()}


@pytest.mark.parametrize(("as_target", "expected"), [(True, "gns"), (False, "igsc")])
def test_what_is_done_to_source_and_to_target_images(domains, tmp_path, monkeypatch, as_target, expected):
    """Source digits get the size and the neighbours of the target's; target images are inverted and lose a square."""
    done, sizes = [], []
    names = {"negatives": "i", "geometry": "g", "neighbours": "n", "soften": "s", "cutout": "c"}
    for name, letter in names.items():

        def step(x, _random, letter=letter, **options):
            done.append(letter)
            sizes.extend([options] if letter == "g" else [])
            return x

        monkeypatch.setattr(p3_train, name, step)
    t = students(domains, tmp_path, "--target", "svhn")
    t.augmented(t.images[:2], torch.Generator(), as_target)
    assert "".join(done) == expected
    assert sizes == [p3_train.FIT["svhn"] if as_target else {}]


def test_the_teacher_is_sure_and_its_classes_are_equal(domains, tmp_path, monkeypatch):
    t = students(domains, tmp_path, "--threshold", 0.9)
    p = torch.zeros(2, 10)
    p[0, :3], p[1, :2] = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.4])
    monkeypatch.setattr(t, "classes", lambda *_: p)
    images = t.target_images[:2]
    assert [x.tolist() for x in t.teach(images, 0.6, align=False)] == [[0, 0], [0, 1]]
    # over the means .55, .35, .1: .24 .23 .53 and .49 .51
    assert [x.tolist() for x in t.teach(images, 0.58, align=True)] == [[2, 1], [1, 0]]


def test_options_of_the_teacher_and_of_batch_statistics(domains, tmp_path, monkeypatch):
    """--align reaches the teacher; with --no-separate both domains go through the extractor in one batch."""
    for separate, align in ((True, False), (False, True)):
        words = [f"--{'' if on else 'no-'}{name}" for name, on in (("separate", separate), ("align", align))]
        t = students(domains, tmp_path, "--students", 0, "--threshold", 0, *words)
        aligned, teach = [], t.teach
        monkeypatch.setattr(t, "teach", lambda *a, teach=teach, seen=aligned: seen.append(a[2]) or teach(*a))
        sizes: list[int] = []
        t.network.extractor.register_forward_hook(lambda _, x, __, seen=sizes: seen.append(len(x[0])))
        t.progress = 0.5
        t.update()
        assert aligned == [align]
        assert sizes == ([4, 4] if separate else [8])


def test_a_budget_that_ends_before_a_student_begins(domains, tmp_path, monkeypatch):
    update = p3_train.AdaptationTrainer.update

    def killed(self):
        if self.step == 3:
            raise RuntimeError("killed")
        return update(self)

    words = ("--method", "dann-st", "--students", 1, "--steps", 8)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(p3_train.AdaptationTrainer, "update", killed)
        train(domains, tmp_path, *words, "--save-every", 1e-9)
    folder = tmp_path / "p3_dann-st_svhn_000"
    assert_user_error(run(p3_train.main, "--resume", folder, "--steps", 3), folder, "resume it with more")
    assert not (folder / "best.safetensors").exists()
    assert run(p3_train.main, "--resume", folder, "--steps", 8).code == 0
    assert (folder / "best.safetensors").exists()


def test_self_training_starts_after_a_while(domains, tmp_path):
    t = students(domains, tmp_path, "--students", 0, "--threshold", 0)
    for t.progress, starts in ((0.14, False), (0.16, True)):
        assert (dict(zip(t.losses, t.update().tolist(), strict=True))["loss_self"] > 0) == starts


def test_a_student_is_new_and_labelled_by_the_network_before(domains, tmp_path):
    t = students(domains, tmp_path, "--steps", 8, "--eval-every", 4)
    for step in range(4):
        t.progress, t.step = step / 8, step
        t.update()
    assert t.factor == pytest.approx(annealed(0.75))
    t.best, t.step, before = -2.0, 4, t.predict(t.target_images).argmax(1)
    t.begin(1)
    assert torch.equal(t.generation.labels, before)
    assert t.best is None  # the best weights of a run are those of its last network
    assert not t.optimiser.state
    torch.manual_seed(t.o.seed + 1)
    for name, tensor in Dann(2).state_dict().items():
        assert torch.equal(t.network.state_dict()[name], tensor), name
        assert torch.equal(t.average.state_dict()[name], tensor), name
    t.progress = 0.5
    assert (t.life, t.factor, t.age) == (0, 1, 0)


def test_a_students_validator_is_of_the_target_alone(domains, tmp_path):
    t = students(domains, tmp_path, "--steps", 8)
    for number in (0, 1):
        t.generation.number = number
        scores = t.evaluate()
        information = p3_train.mutual_information(t.predict(t.target_images)) / math.log(10)
        assert scores["validator"] == pytest.approx(-information - (0 if number else scores["source"] / 100))


def test_a_student_learns_the_target_alone(domains, tmp_path, monkeypatch):
    """First the labels it began with; its own from the share OWN of its steps on. No source digit is looked at."""
    t = students(domains, tmp_path, "--steps", 16, "--threshold", 0)
    t.progress, t.step = 0.5, 8
    t.images = t.labels = None  # reading them would fail
    wanted, cross_entropy = [], p3_train.F.cross_entropy
    monkeypatch.setattr(p3_train.F, "cross_entropy", lambda x, y, **k: wanted.append(y) or cross_entropy(x, y, **k))
    drawn, draw = [], t.draw
    monkeypatch.setattr(t, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    own = torch.full((4,), 7)
    monkeypatch.setattr(t, "teach", lambda target, reference, align: (own, torch.ones(4)))
    for step in range(8, 16):
        t.progress, t.step = step / 16, step
        losses = dict(zip(t.losses, t.update().tolist(), strict=True))
        assert losses["loss_self"] > 0
        assert losses["loss_class"] == losses["loss_domain"] == 0
    for step, (rows, labels) in enumerate(zip(drawn, wanted, strict=True)):
        assert torch.equal(labels, t.generation.labels[rows] if step < 4 else own), step


def test_digits_and_their_negatives_are_labelled_alike(domains, tmp_path):
    """With --negatives, by the teacher and by the labels a student begins with."""
    t = students(domains, tmp_path, "--steps", 8, "--threshold", 0)
    t.descend(sum(p.square().sum() for p in t.network.parameters()))  # an average that is not at its start
    inverted = 255 - t.target_images
    plain, both = t.predict(t.target_images), t.predict(t.target_images, both=True)
    t.o.negatives = True
    assert torch.equal(t.teach(t.target_images, 1.0, False)[0], t.teach(inverted, 1.0, False)[0])
    t.average.eval()
    assert not torch.allclose(plain, both)
    assert torch.allclose(t.classes(t.target_images, True), t.classes(inverted, True), atol=1e-5)
    mean = (t.classes(t.target_images, False) + t.classes(inverted, False)) / 2
    assert torch.allclose(t.classes(t.target_images, True), mean, atol=1e-5)
    t.begin(1)
    assert torch.equal(t.generation.labels, both.argmax(1))


def test_mutual_information():
    sure = torch.eye(10).repeat(3, 1)
    assert p3_train.mutual_information(sure) == pytest.approx(math.log(10))
    assert p3_train.mutual_information(sure[:1].repeat(9, 1)) == pytest.approx(0, abs=1e-6)  # a collapse
    assert p3_train.mutual_information(torch.full((9, 10), 0.1)) == pytest.approx(0, abs=1e-6)


def test_standardised_input():
    images = torch.from_numpy(smooth_images(5, 28)).permute(0, 3, 1, 2)
    x = digit_input(images, 32, standardised=True)
    assert x.shape == (5, 3, 32, 32)
    assert torch.allclose(x.mean((1, 2, 3)), torch.zeros(5), atol=1e-5)
    assert torch.allclose(x.std((1, 2, 3)), torch.ones(5), atol=1e-5)
    assert digit_input(torch.full((1, 3, 28, 28), 9, dtype=torch.uint8), 28, True).abs().max() < 1e-5
    assert torch.equal(digit_input(images, 28, standardised=False), images.float() / 127.5 - 1)
    gray = digit_input(images, 28, standardised=False, gray=True)
    assert torch.equal(gray[:, 0], gray[:, 2])
    assert torch.allclose(gray[:, 0], images.float().mean(1) / 127.5 - 1, atol=1e-6)


def test_digit_augmentations_are_small_and_reproducible():
    def random():
        return torch.Generator().manual_seed(0)

    x = torch.zeros(300, 1, 32, 32)
    x[:, :, 14:18, 14:18] = 1
    moved = geometry(x, random())
    assert torch.equal(moved, geometry(x, random()))
    rows = torch.arange(32.0).view(1, 1, 32, 1)
    centre = (moved * rows).sum((1, 2, 3)) / moved.sum((1, 2, 3))
    assert (centre - 15.5).abs().max() < 3
    assert (centre - 15.5).abs().max() > 1
    sides = moved.sum((1, 2, 3)).sqrt()
    assert 3 < sides.min() < 3.6 < 4.4 < sides.max() < 5.5  # 4 pixels over 0.8 ... 1.2
    bar = torch.zeros(300, 1, 32, 32)
    bar[:, :, 4:28, 15:17] = 1
    turned = geometry(bar, random(), zoom=0, shift=0)
    ends = [(half * torch.arange(32.0)).sum((1, 2, 3)) / half.sum((1, 2, 3)) for half in turned.split(16, dim=2)]
    slope = (ends[0] - ends[1]).abs() / 12  # of the bar's halves, whose centres are 12 rows apart
    assert 0.15 < slope.max() < 0.25

    larger = geometry(torch.nn.functional.pad(x, (1, 1, 1, 1)), random(), 0, 0, 0, width=(2, 2), height=(3, 3))
    assert (larger.sum(3).amax((1, 2)) / x.sum(3).amax((1, 2))).mean() == pytest.approx(2, abs=0.1)
    assert (larger.sum(2).amax((1, 2)) / x.sum(2).amax((1, 2))).mean() == pytest.approx(3, abs=0.1)

    stripes = torch.arange(32.0).expand(300, 1, 8, 32) + 100 * torch.arange(300.0).view(300, 1, 1, 1)
    crowded = neighbours(stripes, random())
    own = (crowded - stripes == 0).float()
    assert own[..., 10:22].min() == 1  # the digit in the middle stays
    assert 0.4 < own[:, 0, 0, 0].mean() < 0.6
    assert 0.4 < own[:, 0, 0, 31].mean() < 0.6
    foreign = crowded[:, 0, 0, 31][own[:, 0, 0, 31] == 0] % 100
    assert foreign.min() >= 4  # from the other image's near, left part
    assert foreign.max() <= 14

    inverted = negatives(x, random())
    assert torch.equal(inverted, negatives(x, random()))
    sign = inverted[:, :, 14, 14]
    assert torch.equal(inverted, x * sign[..., None, None])
    assert 0.4 < (sign == -1).float().mean() < 0.6

    soft = soften(x, random(), noise=0)
    assert torch.allclose(soft.sum((1, 2, 3)), x.sum((1, 2, 3)), atol=1e-4)
    assert soft[:, 0, 14, 14].max() > 0.9
    assert soft[:, 0, 14, 14].min() == pytest.approx(4 / 9, abs=0.05)
    assert soft[:, 0, 15, 15].min() == pytest.approx((8 / 9) ** 2, abs=0.05)  # reached by the second blur only
    assert soften(torch.zeros(300, 1, 8, 8), random(), noise=0.1).std((1, 2, 3)).max() == pytest.approx(0.1, abs=0.02)
