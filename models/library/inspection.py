"""Looks into the files of a model in a process that can reach nothing else.

`look` starts it: `python -m aivillage.models.library.inspection FOLDER PARENT`. It puts the fences
of a worker on itself, reads headers, tables and templates as an engine would, and prints what it
found. A file that breaks the reader breaks that process only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

import aivillage
from aivillage.models import sandbox
from aivillage.models.file_fence import fence_files
from aivillage.models.library.layers import LAYERS_MAX, WIDTH_MAX, LayerFacts, packing_bytes
from aivillage.models.library.manifest import Facts
from aivillage.protocols.errors import AivillageError, JobError, RequestError, from_code

MEMORY_BYTES_MAX: Final = 4 << 30
SECONDS_MAX: Final = 120.0
SECONDS_A_GB: Final = 30.0
"""Every tensor of a GGUF is unpacked once, as a load would."""
ANSWER_BYTES_MAX: Final = 1 << 16
RUNTIME_BYTES: Final = 300_000_000
"""An engine's process without a model."""
_VARIABLES: Final = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class Found(NamedTuple):
    """`layers`: of a model that can be split."""

    facts: Facts
    layers: LayerFacts | None = None


class _Said(msgspec.Struct, frozen=True, kw_only=True):
    """The one line that the process prints."""

    facts: Facts | None = None
    layers: LayerFacts | None = None
    code: str = ""
    message: str = ""
    next_step: str = ""


def look(folder: Path) -> Found:
    """What is in the model's files in `folder`.

    Raises:
        RequestError: they are of no kind that runs here, hostile, or damaged.
        JobError: the process that looked died of them.
    """
    size_gb = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    with tempfile.TemporaryDirectory(prefix="aivillage-look-") as scratch:
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, str(folder.absolute()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                cwd=scratch,
                env=_environment(scratch),
                timeout=SECONDS_MAX + SECONDS_A_GB * size_gb,
            )
        except subprocess.TimeoutExpired:
            raise _died("it took too long") from None
    try:
        said = msgspec.json.decode(done.stdout[-ANSWER_BYTES_MAX:], type=_Said)
    except msgspec.DecodeError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise _died(f"status {done.returncode} {''.join(last)[:300]}") from None
    if said.facts is None:
        raise from_code(said.code, said.message[:1000], said.next_step[:300])
    return Found(said.facts, said.layers)


def _died(why: str) -> JobError:
    return JobError(
        f"the process that looked into the model's files did not come to an end: {why}",
        next_step="the files are damaged or hostile; pull another model",
    )


def _environment(scratch: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    source = str(Path(aivillage.__file__).parent.parent)
    paths = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": scratch,
        "TMPDIR": scratch,
        "OMP_NUM_THREADS": "1",
    }


# --------------------------------------------------------------------------- inside the fence


def main() -> None:
    """Prints a `_Said`; nothing else goes to standard output."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sandbox.die_with_parent(parent)
    sandbox.limit(memory_bytes_max=MEMORY_BYTES_MAX, nice=0)
    fence_files(readable=[str(folder)], writable=[str(Path.cwd())])
    sandbox.deny_network()
    try:
        found = facts_of(folder)
        said = _Said(facts=found.facts, layers=found.layers)
    except AivillageError as error:
        said = _Said(code=error.code, message=error.message, next_step=error.next_step)
    except Exception as error:  # a file that breaks a reader in a way nobody thought of
        said = _Said(code="BAD_REQUEST", message=f"the model cannot be read: {error!r}"[:1000])
    out.write(msgspec.json.encode(said))
    out.close()


def facts_of(folder: Path) -> Found:
    """As `look`, in this very process: for the fenced one, and for tests.

    Raises:
        RequestError: as `look`.
    """
    weights = sorted(folder.glob("*.gguf"))
    if len(weights) == 1 and not list(folder.glob("*.safetensors")):
        return _facts_of_gguf(weights[0])
    if not weights and list(folder.glob("*.safetensors")):
        from aivillage.models.inference import encoder_files

        if encoder_files.is_encoder(folder):
            return Found(_facts_of_encoder(folder))
        return Found(_facts_of_safetensors(folder))
    raise RequestError(
        "a model is one .gguf file, or a folder of .safetensors files with their config.json and "
        "tokenizer.json",
        next_step="name one of the .gguf files, where there are several",
    )


def _facts_of_gguf(path: Path) -> Found:
    """Reads all of it the way the engine will."""
    from aivillage.models.inference import gguf_model
    from aivillage.models.inference.gguf_file import GgufFile
    from aivillage.models.inference.tokenizer import ChatTokenizer

    file = GgufFile(path)
    shape = gguf_model.read_shape(file)
    tokenizer = ChatTokenizer(file)
    tokenizer.encode("one look")
    for _layer in gguf_model.load(path).layers:
        continue
    counts = {name: tensor.count for name, tensor in file.tensors.items() if len(tensor.shape) > 1}
    head = counts.pop("output.weight", 0)
    table = counts.pop("token_embd.weight")
    parameters = sum(tensor.count for tensor in file.tensors.values())
    held = parameters + (0 if head else table)  # a shared table is packed once more, as the head
    kept = 2 * 4 * shape.layers * shape.key_heads * shape.head_width * shape.context_tokens
    layer = sum(counts.values()) // shape.layers
    licence = file.metadata.get("general.license", "")
    facts = Facts(
        format="gguf",
        architecture=file.field("general.architecture", str),
        parameters=parameters,
        active_parameters=sum(counts.values()) + (head or table),
        vocabulary=shape.vocabulary,
        context_tokens=shape.context_tokens,
        end_token_ids=(tokenizer.end_token_id,),
        memory_bytes=4 * held + kept + RUNTIME_BYTES + packing_bytes(layer, head or table),
        licence=licence[:128] if isinstance(licence, str) else "",
    )
    layers = LayerFacts(
        layers=shape.layers,
        width=shape.width,
        layer_parameters=layer,
        head_parameters=head or table,
        context_bytes=kept,
    )
    can_be_split = shape.layers <= LAYERS_MAX and shape.width <= WIDTH_MAX
    return Found(facts, layers if can_be_split else None)


def _facts_of_safetensors(folder: Path) -> Facts:
    """Headers, tables and template; the tensors' bytes are read when it is loaded."""
    from aivillage.models.inference import safetensors_model
    from aivillage.models.inference.generate import ChatMessage
    from aivillage.models.inference.template_tokenizer import TemplateTokenizer
    from aivillage.models.library.safetensors_file import read_header

    places = [place for path in sorted(folder.glob("*.safetensors")) for place in read_header(path)]
    config = safetensors_model.read_config(folder)
    ends = safetensors_model.end_token_ids(folder, config)
    TemplateTokenizer(folder, frozenset(ends)).prompt([ChatMessage(content="one look")])
    model = safetensors_model.without_weights(config)
    parameters = sum(place.count for place in places)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if parameters < wanted:
        raise RequestError(f"the files hold {parameters:,} weights, the model has {wanted:,}")
    context = safetensors_model.context_tokens(config)
    return Facts(
        format="safetensors",
        architecture=str(config.model_type),
        parameters=wanted,
        active_parameters=safetensors_model.active_parameters(model, config),
        vocabulary=config.vocab_size,
        context_tokens=context,
        end_token_ids=ends,
        memory_bytes=4 * wanted
        + safetensors_model.key_value_bytes(config) * context
        + 2 * RUNTIME_BYTES,
    )


def _facts_of_encoder(folder: Path) -> Facts:
    """Headers and tables. Its end token is the one that ends a text."""
    from aivillage.models.inference import encoder, encoder_files

    shape = encoder_files.read(folder)
    ids = encoder.tokenizer_of(folder).encode("one look").ids
    if not ids or max(ids) >= shape.config.vocab_size:
        raise RequestError("the tokenizer's tables do not fit the model")
    return Facts(
        format="ranker" if shape.ranks else "encoder",
        architecture=shape.config.model_type,
        parameters=shape.parameters,
        active_parameters=shape.active_parameters,
        vocabulary=shape.config.vocab_size,
        context_tokens=shape.tokens_max,
        end_token_ids=(ids[-1],),
        memory_bytes=5 * shape.parameters + RUNTIME_BYTES,
    )


if __name__ == "__main__":
    main()
