"""Engines elsewhere than on the CPU, as far as that shows without a GPU.

A tensor on the device "meta" has a shape and no numbers, and an operation that mixes it with one
of the CPU fails, as it would on a GPU: so a step that makes a tensor in the wrong place is found.
"""

import msgspec
import pytest

pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from aivillage.models import gpu  # noqa: E402
from aivillage.models.inference import (  # noqa: E402
    engine_choice,
    engine_torch,
    gguf_model,
    placement,
    sameness,
)
from aivillage.models.inference.catalogue import DEFAULT, KnownModel, known  # noqa: E402
from aivillage.models.inference.engine_stage import StageEngine  # noqa: E402
from aivillage.models.inference.fingerprint import family  # noqa: E402
from aivillage.models.inference.generate import GenerateRequest  # noqa: E402
from aivillage.models.inference.linear import rule  # noqa: E402
from aivillage.models.inference.llama import Llama, Span  # noqa: E402
from aivillage.models.inference.placement import HOST, Placement  # noqa: E402
from aivillage.models.inference.session_engine import SessionEngine  # noqa: E402
from aivillage.models.inference.stage import ProbedStage, Stage, bytes_of  # noqa: E402
from aivillage.models.inference.stages import StageInput, StageRequest, shape_of_model  # noqa: E402
from aivillage.models.inference.tokenizer import Prompt  # noqa: E402
from aivillage.protocols.codec import pack  # noqa: E402
from aivillage.protocols.errors import ConfigError, JobError  # noqa: E402
from aivillage.protocols.ports import EngineInfo  # noqa: E402
from tests.unit.models import tiny_gguf  # noqa: E402

CONTEXT = 512
META = Placement(torch.device("meta"), torch.bfloat16)
HALF = Placement(torch.device("cpu"), torch.bfloat16)
"""What a GPU computes with, on the CPU: slow, and the same code."""
SPANS = (Span(0, 0, (5, 6, 7)), Span(1, 0, (9,)), Span(2, 256, (4, 3)))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("placed") / "tiny.gguf"
    tiny_gguf.write(path)
    return path


def model(file, at, slots=3):
    weights = placement.placed(gguf_model.load(file), at)
    return Llama(weights, slots=slots, context_tokens=CONTEXT)


def step(llama):
    """What a step of an engine asks of its model: states and logits."""
    states = llama.forward(list(SPANS))
    rows = states[torch.tensor([0, 2], device=states.device)]
    llama.copy_slot(0, 1, 3)
    return states, llama.logits(rows)


class NothingOnTheHost(TorchDispatchMode):
    """Fails on whatever gives a tensor of more than one number on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):
                assert one.device.type != "cpu" or one.ndim == 0, f"{func} gave it on the CPU"
        return made


def test_a_step_computes_where_the_weights_are_and_nowhere_else(file):
    llama = model(file, META)
    with NothingOnTheHost():
        states, logits = step(llama)
    assert {states.device.type, logits.device.type} == {"meta"}
    assert states.shape == (8, tiny_gguf.WIDTH)
    assert logits.shape == (2, tiny_gguf.WORDS)
    assert {states.dtype, logits.dtype} == {torch.bfloat16}


def test_the_watch_notices_a_tensor_on_the_host(file, monkeypatch):
    llama = model(file, META)
    monkeypatch.setattr(Llama, "forward", lambda *_: torch.zeros(8, tiny_gguf.WIDTH))
    with NothingOnTheHost(), pytest.raises(AssertionError, match="on the CPU"):
        step(llama)


@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (0, 2)])
def test_a_stage_computes_where_its_weights_are_whatever_comes_in(file, layers):
    stage = Stage(file, *layers, slots=3, context_tokens=CONTEXT, at=META)
    fed = None if stage.is_first else torch.randn(6, tiny_gguf.WIDTH)
    states = stage.read(list(SPANS), fed)
    assert (states.device.type, states.dtype) == ("meta", torch.bfloat16)
    if stage.is_last:
        assert stage.logits(states[:2]).shape == (2, tiny_gguf.WORDS)


def test_on_the_cpu_no_weight_is_moved_or_converted(file):
    before = gguf_model.load(file)
    layers = list(before.layers)
    after = placement.placed(msgspec.structs.replace(before, layers=iter(layers)), HOST)
    assert after.embedding is before.embedding
    assert after.head is after.embedding
    assert after.norm is before.norm
    for old, new in zip(layers, after.layers, strict=True):
        assert all(getattr(new, name) is getattr(old, name) for name in old.__struct_fields__)
    states = torch.randn(2, 3)
    assert placement.on_host(states) is states


def test_a_shared_head_stays_shared_elsewhere(file):
    there = placement.placed(gguf_model.load(file), HALF)
    assert there.head is there.embedding


def test_in_bfloat16_it_says_nearly_what_it_says_in_float32(file):
    exact, half = (step(model(file, at))[1].float() for at in (HOST, HALF))
    assert not torch.equal(exact, half)
    assert float((exact - half).norm() / exact.norm()) < 0.02


def test_the_probe_and_the_wire_take_bfloat16(file):
    llama = model(file, HALF, slots=8)
    assert len(sameness.probe(llama, slots=8, context_tokens=CONTEXT).digest) == 8
    stage = Stage(file, 0, 1, slots=8, context_tokens=CONTEXT, at=HALF)
    assert len(sameness.probe(ProbedStage(stage), slots=8, context_tokens=CONTEXT).digest) == 8
    states = stage.read([Span(0, 0, (1, 2))], None)
    assert len(bytes_of(states)) == 4 * states.numel()


# ------------------------------------------------------------------ classes


class Properties:
    """As torch tells of a GPU."""

    name, major, minor, total_memory = "NVIDIA H100 80GB HBM3", 9, 0, 80 << 30


class Gpu:
    """Stands for a placement on a GPU where there is none: its tensors are of the CPU."""

    is_host, device, dtype = False, torch.device("cpu"), torch.bfloat16


@pytest.fixture
def gpu_here(monkeypatch):
    """torch, as if there were a GPU; what is set there is kept."""
    said = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: said.update(index=index))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *share: said.update(share=share)
    )
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **how: said.update(how))
    return said


def test_a_gpus_class_is_its_own_and_holds_nobody_to_account(gpu_here):
    """The CPU's are compared bit for bit or up to rounding; a GPU's with nobody's."""
    here = engine_torch.kernel_class("a" * 64, "digest")
    there = engine_torch.kernel_class("a" * 64, "digest", Gpu())
    assert here.split("/")[3:5] == ["float32", "cpu"]
    assert there.split("/")[3:6] == ["bfloat16", "cuda", "sm90-NVIDIA-H100-80GB-HBM3"]
    assert family(here)
    assert not family(there)
    assert len(there) <= 256


def test_a_gpu_promises_nothing_whatever_its_probe_gave():
    passed = sameness.Sameness(passed=True, digest="d")
    assert engine_torch.promise(passed, HOST) == "guaranteed"
    assert engine_torch.promise(passed, Gpu()) == "best effort"
    failed = sameness.Sameness(passed=False, digest="d")
    assert engine_torch.promise(failed, HOST) == "best effort"


def test_products_are_packed_on_the_cpu_in_float32_alone(file):
    assert rule(torch.empty(0, dtype=torch.bfloat16)) == "mm"
    assert rule(torch.empty(0, device="meta")) == "mm"


# ------------------------------------------------------------------ a GPU that is full


class FullModel:
    """A model whose first step does not fit."""

    draws_as_it_reads = True

    def __init__(self):
        self.steps = 0

    def forward(self, spans):
        self.steps += 1
        if self.steps == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return torch.zeros(sum(len(span.token_ids) for span in spans), 4)

    def logits(self, states):
        return torch.zeros(len(states), len(WORDS))

    def copy_slot(self, source, target, tokens):
        """Nothing is kept."""


WORDS = [b"a", b"b", b"c"]


class Speaker:
    """A tokenizer of three words."""

    end_token_ids = frozenset()

    def prompt(self, _messages):
        return Prompt(token_ids=(0, 1), content_bytes=(1, 2))

    def token_bytes(self, token):
        return WORDS[token]


def test_a_full_gpu_fails_the_sessions_of_its_step_and_no_others():
    info = EngineInfo(
        engine="torch", model=DEFAULT, kernel_class="k", identical="best effort",
        active_parameters=1, context_tokens=64, vocabulary=len(WORDS), weights_sha256="w",
    )  # fmt: skip
    engine = SessionEngine(FullModel(), Speaker(), info, slots=2)
    request = GenerateRequest(prompt="ab", max_tokens=1)
    for number in (1, 2):
        engine.add(number, request, ())
    engine.allow(1, 100)
    (frame,) = engine.step()
    assert (frame.session, frame.finished) == (1, "error")
    assert "the GPU's memory is full" in frame.error
    engine.allow(2, 100)
    (frame,) = engine.step()
    assert (frame.session, frame.finished, frame.error) == (2, "length", "")
    assert engine.free_slots == 2


def test_a_full_gpu_fails_the_sessions_of_a_stages_pass(file, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = KnownModel(
        name=DEFAULT, active_parameters=1, vocabulary=tiny_gguf.WORDS, context_tokens=CONTEXT,
        end_token_id=2, sha256=gguf_model.load(file).sha256, parameters=1, memory_bytes=1,
        folder=str(file.parent), file=file.name, layers=2, width=tiny_gguf.WIDTH,
    )  # fmt: skip
    engine = StageEngine(model, 0, 1, slots=2, at=HALF)
    request = StageRequest(first=0, last=1, rows=4, shape=shape_of_model(model))
    engine.add(1, request, ())
    engine.feed(1, pack(StageInput(position=0, token_ids=(1, 2))))
    monkeypatch.setattr(engine.stage, "read", full)
    (frame,) = engine.step()
    assert (frame.session, frame.finished) == (1, "error")
    assert "the GPU's memory is full" in frame.error


# ------------------------------------------------------------------ choosing


def test_without_a_gpu_wanting_one_is_a_clear_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="no engine can compute on a GPU here") as caught:
            engine_choice.engine_of(
                known(DEFAULT), slots=1, engine="torch", device=gpu.Device(name)
            )
        assert "device = cpu" in caught.value.next_step


def test_the_engine_of_the_cpu_takes_no_gpu():
    with pytest.raises(ConfigError, match="openvino computes on the CPU"):
        engine_choice.engine_of(
            known(DEFAULT), slots=1, engine="openvino", device=gpu.Device("cuda")
        )


def test_a_gpu_is_made_ready_with_its_share_of_memory(gpu_here):
    at = placement.prepare(gpu.Device("cuda:1", 8 << 30))
    assert at == Placement(torch.device("cuda", 1), torch.bfloat16)
    assert gpu_here["share"] == (0.1, 1)
    assert gpu_here["warn_only"]
    placement.prepare(gpu.Device("cuda"))
    assert gpu_here["share"] == (gpu.MEMORY_SHARE, 0)
    assert placement.memory_share(200 << 30, 80 << 30) == 1.0


def test_a_gpu_that_is_not_there_or_too_old_is_a_clear_error(gpu_here, monkeypatch):
    with pytest.raises(ConfigError, match="no cuda:2: torch finds 2 devices"):
        placement.prepare(gpu.Device("cuda:2"))
    monkeypatch.setattr(Properties, "major", 7)
    with pytest.raises(ConfigError, match="has no bfloat16"):
        placement.prepare(gpu.Device("cuda"))


def test_a_gpu_too_small_for_the_model_is_typed(gpu_here, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_torch, "TorchEngine", full)
    with pytest.raises(JobError, match="out of memory") as caught:
        engine_choice.engine_of(known(DEFAULT), slots=1, device=gpu.Device("cuda"))
    assert "gpu_memory_mb" in caught.value.next_step
