"""`sampled_softmax`: its classes and its loss against a literal float64 twin; worlds, resuming, graphs, refusals."""

import dataclasses
import math

import pytest
import torch
from small_runs import folder_of, in_worlds, losses, tokens
from torch._dynamo.testing import CompileCounter

import train_gpt
from kernels.runtime import INTERPRETED
from train_gpt import CHECKPOINT_FORMAT as FORMAT
from trainer import sampled_softmax, schedule
from trainer.checkpoints import load_tensors

CPU = torch.device("cpu")
CLASSES, EOS = 256, 7  # 200 tokens and the head's padding

SMALL = f"""--preset=nano-plain --num_layers=2 --model_dim=16 --num_heads=1 --unet_skips=0>1 --long_window_layers=0
--block_tokens=16 --vocab_size=200 --eos_id={EOS} --num_iterations=24 --tokens_per_step=128 --train_seq_len=32
--val_seq_len=32 --val_tokens=64 --sampled_softmax=48,64 --full_softmax_frac=0.25 --device=cpu --val_loss_every=8
--warmup_steps=2 --run_name=run""".split()


def config_of(*more):
    return train_gpt.parse_config(list({word.partition("=")[0]: word for word in [*SMALL, *more]}.values()))


def trainer_of(*more):
    """With a head that is not zero: through that one no gradient flows."""
    trainer = train_gpt.Trainer(config_of(*more), CPU)
    torch.nn.init.normal_(trainer.model.head_w, std=0.3)
    return trainer


def batch(seed, length=32, few=40):
    drawn = torch.randint(8, 8 + few, (length + 1,), generator=torch.Generator().manual_seed(seed))
    return drawn[:-1].int(), drawn[1:]


def classes_by_loops(targets, count, number):
    """The targets, then classes along the walk, which is as far as the sequences before have taken it."""
    chosen = {int(target) for target in targets}
    k = count * number
    while len(chosen) < count:
        chosen.add(20011 * k % CLASSES)
        k += 1
    return sorted(chosen)


def loss_by_loops(trainer, inputs, targets, classes, weights, window):
    """Summed over tokens, in float64; a leaf of the head's own, so that its gradient is seen row by row."""
    head = trainer.model.head_w.detach().double().requires_grad_()
    x = trainer.model.hidden(inputs[None], window)[0].detach().double()
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(inputs)):
        z = torch.stack([x[t] @ head[c] for c in classes])
        capped = 15 * z / (z * z + 225).sqrt()
        for k, weight in enumerate(weights):
            if t + k < len(targets):
                total = total + weight * (capped.logsumexp(0) - capped[classes.index(int(targets[t + k]))])
    return total, head


def agrees(trainer, step, sequence, count):
    """Loss and the head's gradient of one sequence of a step against the loops."""
    (inputs, targets), c = batch(step), trainer.config
    number = 4 * step + sequence
    (_, places), how = trainer.targets.sampled(step, sequence, (inputs, targets))
    classes = how["classes"].tolist()
    assert classes == classes_by_loops(targets, count, number)
    weights = schedule.target_weights(step, c)
    expected, head = loss_by_loops(trainer, inputs, targets, classes, weights, 2)
    trainer.model.zero_grad()
    how |= trainer.targets.at(step)
    ours = trainer.model(inputs[None], places[None], window_blocks=2, **how)
    ours.backward()
    expected.backward()
    scale = 1 if c.loss_sum else 1 / len(inputs)
    assert ours.item() == pytest.approx(scale * expected.item(), rel=1e-5)
    torch.testing.assert_close(trainer.model.head_w.grad.double(), scale * head.grad, rtol=1e-3, atol=1e-5)
    left_out = [c for c in range(CLASSES) if c not in classes]
    assert not trainer.model.head_w.grad[left_out].any()


@pytest.mark.parametrize("more", [[], ["--mtp=3", "--loss_sum=true"]], ids=["next", "three"])
def test_loss_and_gradient_are_those_over_the_sampled_classes(more):
    trainer = trainer_of(*more)
    agrees(trainer, 0, 0, 48)
    agrees(trainer, 1, 3, 48)
    agrees(trainer, 5, 2, 64)


def targets_that_are_not_mapped(monkeypatch):
    whole = sampled_softmax.SampledClasses.__call__
    monkeypatch.setattr(
        sampled_softmax.SampledClasses, "__call__", lambda self, s, n, batch: (batch, whole(self, s, n, batch)[1])
    )


def the_walk_begins_anew(monkeypatch):
    whole = sampled_softmax.SampledClasses.__call__
    monkeypatch.setattr(
        sampled_softmax.SampledClasses, "__call__", lambda self, step, n, batch: whole(self, step % 1, 0, batch)
    )


def the_softmax_is_over_all(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "index_select", lambda self, dim, rows: self.clone())


@pytest.mark.parametrize("plant", [targets_that_are_not_mapped, the_walk_begins_anew, the_softmax_is_over_all])
def test_a_fault_in_it_is_seen(plant, monkeypatch):
    trainer = trainer_of()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        agrees(trainer, 1, 3, 48)


def test_each_class_is_one_of_the_others_equally_often():
    """At the size of `medium`, over the 393 sequences after which the walk is where it was: within 2 %."""
    config = train_gpt.parse_config(["--sampled_softmax=14336"])
    chooser, found = sampled_softmax.SampledClasses(config, CPU), torch.zeros(50304)
    inputs, targets = batch(3, few=4)
    assert math.lcm(14336, 50304) == 393 * 14336
    for number in range(393):
        found[chooser(number // 8, number % 8, (inputs, targets))[1]["classes"]] += 1
    assert (found[targets] == 393).all()
    found[targets] = found[0].item()
    assert (found - found.mean()).abs().max() <= 0.02 * found.mean()


def test_the_schedule_ends_with_all_classes():
    c = config_of()
    found = [schedule.sampled_classes_at(step, c) for step in range(25)]
    assert found == [48] * 2 + [64] * 16 + [0] * 7
    assert schedule.shapes(c) == {(32, 1, 48): 0, (32, 1, 64): 2, (32, 1, 0): 18}
    assert "classes" in schedule.table(c) and "classes" not in schedule.table(config_of("--sampled_softmax="))
    none = dataclasses.replace(c, full_softmax_frac=0.0)
    assert schedule.sampled_classes_at(23, none) == 64 and len(schedule.shapes(none)) == 2
    assert sampled_softmax.mean_share(c) == pytest.approx((2 * 48 + 16 * 64 + 6 * 256) / (24 * 256))
    model = train_gpt.GPT(c)
    saved = train_gpt.flops_per_token(train_gpt.GPT(config_of("--sampled_softmax="))) - train_gpt.flops_per_token(model)
    assert saved == pytest.approx(6 * model.head_w.numel() * (1 - sampled_softmax.mean_share(c)))


def test_targets_that_do_not_fit_are_trained_over_all_classes(capsys):
    trainer = trainer_of("--train_seq_len=128", "--tokens_per_step=128")
    inputs, targets = batch(1, 128, 150)
    assert len(set(targets.tolist())) > 48
    given, how = trainer.targets.sampled(0, 0, (inputs, targets))
    assert given[1] is targets and how == {"classes": None}
    whole = trainer.model(inputs[None], targets[None], window_blocks=1).item()
    assert trainer.step(0, [(inputs, targets)]).item() == pytest.approx(whole)
    told = capsys.readouterr().err
    assert told.count("more than 48 classes") == 1 and f"{len(set(targets.tolist()))} different targets" in told


def test_a_validation_is_over_all_classes():
    """Of the same weights the same loss, whatever the field: the literal one over all."""
    trainer = trainer_of()
    inputs, targets = batch(4)
    seen, whole = [], trainer.forward
    trainer.forward = lambda *given, **how: seen.append(how) or whole(*given, **how)

    class Stream:
        def prefetch(self, numbers, pin_memory):
            return ((inputs, targets) for _ in numbers)

    loss = train_gpt.validate(trainer, Stream(), 24)
    assert "classes" not in seen[0]
    window = schedule.validation_window_at(24, trainer.config)
    expected, _ = loss_by_loops(trainer, inputs, targets, list(range(CLASSES)), [1], window)
    assert loss == pytest.approx(expected.item() / len(inputs), rel=1e-5)


def test_every_number_of_classes_is_one_graph_and_warm(monkeypatch):
    """Three to train and one to validate, in bfloat16 as `medium` is, none of them inside the clock."""
    counter, make = CompileCounter(), torch.compile
    counted = lambda f: make(f, backend=counter, dynamic=False, fullgraph=True)  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **_: counted(f) if isinstance(f, torch.nn.Module) else f)
    trainer = train_gpt.Trainer(config_of("--compile=on", "--dtype=bfloat16", "--val_seq_len=64"), CPU)

    class NeverStop:
        heard = staticmethod(lambda: 0)

    train_gpt.warm_up(trainer, NeverStop())
    assert counter.frame_count == 4
    for step in (0, 1, 2, 17, 18, 23):
        loss = trainer.step(step, [batch(10 * step + i) for i in range(4)])
        assert 0 < loss.item() < math.log(CLASSES) + 1
    assert counter.frame_count == 4, "a step compiled inside the clock"


@pytest.mark.skipif(not INTERPRETED, reason="no interpreter")
def test_interpreted_kernels_train_alike():
    """Steps before and after the switch, with every Triton kernel and with the references."""
    found = {}
    for kernels in ("auto", "triton"):
        trainer = trainer_of(f"--kernels={kernels}", "--num_layers=1", "--unet_skips=none", "--value_embeddings=0")
        found[kernels] = [trainer.step(step, [batch(step + i) for i in range(4)]).item() for step in (0, 17, 18)]
    assert max(abs(a - b) for a, b in zip(*found.values())) <= 5e-4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    parts = [tokens(9000) % 200, tokens(400, 1) % 200]
    return folder_of(tmp_path_factory.mktemp("sampled") / "data", parts[0], val=parts[1])


def words(shards, out, *more):
    files = [f"--train_files={shards}/train_*.bin", f"--val_files={shards}/val_*.bin", f"--output_dir={out}"]
    return list({word.partition("=")[0]: word for word in [*SMALL, "--checkpoint_every=4", *files, *more]}.values())


def test_a_run_resumes_bit_for_bit(shards, tmp_path):
    more = "--keep_checkpoints=0", "--tie_embeddings_frac=0.2", "--adam_every=2", "--mtp=2"
    assert train_gpt.main(words(shards, tmp_path, *more)) == 0
    first, folder = losses(tmp_path / "run.txt"), tmp_path / "run.checkpoints"
    last = load_tensors(folder / "step-000024.safetensors", FORMAT)[1]
    for path in folder.glob("*.safetensors"):
        if int(path.stem.removeprefix("step-")) > 12:
            path.unlink()
    assert train_gpt.main(words(shards, tmp_path, *more, "--resume=auto", "--warmup_steps=0")) == 0
    assert losses(tmp_path / "run.txt") == first
    again = load_tensors(folder / "step-000024.safetensors", FORMAT)[1]
    assert all(torch.equal(again[name], tensor) for name, tensor in last.items())


def test_two_and_four_processes_train_as_one_does(shards, tmp_path):
    """A sequence has its own classes, whichever process has it."""
    ways = [[1], [2, "--communication=overlap"], [4, "--communication=plain"]]
    in_worlds(words(shards, tmp_path), ways, double=True)
    one, *others = (losses(tmp_path / f"world{world}.txt") for world in (1, 2, 4))
    for other in others:
        assert [row[:2] for row in other] == [row[:2] for row in one]
        assert max(abs(float(a[2]) - float(b[2])) for a, b in zip(one, other)) <= 1e-6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sampled_softmax=100"], "sampled_softmax=100: 100 is no multiple of 16 below the head's 50304"),
        (["--sampled_softmax=14336,50304"], "50304 is no multiple of 16 below"),
        (["--sampled_softmax=few"], "positive numbers, one a twelfth"),
        (["--sampled_softmax=14336", "--prefix_loss=0.25", "--mtp=3"], "sampled_softmax with --prefix_loss"),
        (["--sampled_softmax=14336", "--full_softmax_frac=1.5"], "full_softmax_frac"),
    ],
)
def test_classes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(train_gpt.UsageError, match=message):
        train_gpt.parse_config(arguments)
