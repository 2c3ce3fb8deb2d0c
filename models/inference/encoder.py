"""The encoder engine: text -> vector, or pair of texts -> score. One text at a time, in float32.

Nothing is ever padded, so a vector cannot depend on the texts beside it: its bits are those that it
has alone. For texts of a paragraph that is as fast as a padded batch on one core, or faster.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from pathlib import Path
from typing import Any, Final

import torch

from aivillage.models.inference import catalogue, encoder_files, vectors
from aivillage.models.inference.bert import Bert
from aivillage.models.inference.catalogue import KnownModel
from aivillage.models.inference.embed import Read
from aivillage.models.inference.template_tokenizer import TOKENIZER_BYTES_MAX, read_text
from aivillage.models.library import manifest as manifests
from aivillage.models.library.hashing import require_whole, sha256_of
from aivillage.protocols.errors import JobError, RequestError

ENGINE_VERSION: Final = 1
"""Raise it when a change of ours may change a bit of any vector."""
MODELS_LOADED_MAX: Final = 1
"""Of one worker process; another model puts the last one away."""
_PROBE: Final = "Two machines of one class have computed the same bits of this."


class Encoder:
    """One model, loaded."""

    def __init__(self, model: KnownModel, threads: int) -> None:
        """Loads: seconds. `threads` are the whole process's.

        Raises:
            ConfigError: the weights are not on this machine, or not those that were pulled.
            RequestError: the files are of a kind that is not read here.
        """
        torch.set_num_threads(threads)
        folder = catalogue.weights_path(model)
        if model.folder:
            require_whole(folder, manifests.read(folder))
        else:
            catalogue.require_same(model, sha256_of(catalogue.weights_file(model)))
        self.shape = encoder_files.read(folder)
        self._tokenizer = tokenizer_of(folder)
        self._tokenizer.enable_truncation(max_length=self.shape.tokens_max)
        self._bert = Bert(folder, self.shape)
        self.kernel_class = _kernel_class(model, self._digest())

    def vector(self, text: str) -> Read:
        """Of unit length, as `vectors` has it.

        Raises:
            JobError: the model computed what is no number.
        """
        encoded = self._tokenizer.encode(text)
        states = self._bert.states(encoded.ids, encoded.type_ids).double()  # (tokens, width)
        pooled = states.mean(0) if self.shape.pooling == "mean" else states[0]
        length = float(pooled.norm())
        if not math.isfinite(length) or length == 0:
            raise JobError("the model computed something that is no vector")
        return Read(vectors.packed((pooled / length).float().tolist()), bool(encoded.overflowing))

    def score(self, query: str, document: str) -> Read:
        """Of a model that ranks: how well `document` answers `query`, 0 to 1, packed alike.

        Raises:
            JobError: the model computed what is no number.
        """
        encoded = self._tokenizer.encode(query, document)
        logit = self._bert.logit(encoded.ids, encoded.type_ids)
        if not math.isfinite(logit):
            raise JobError("the model computed something that is no score")
        said = 1 / (1 + math.exp(-logit)) if logit > -500 else 0.0
        return Read(vectors.packed([said]), bool(encoded.overflowing))

    def _digest(self) -> str:
        found = self.score(_PROBE, _PROBE) if self.shape.ranks else self.vector(_PROBE)
        return hashlib.blake2b(found.value, digest_size=8).hexdigest()


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in `folder`: in a text its marks are text, and nothing is padded.

    Raises:
        RequestError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(read_text(folder / "tokenizer.json", TOKENIZER_BYTES_MAX))
    except RequestError:
        raise
    except Exception as error:  # the library raises bare Exception for a bad file
        raise RequestError(f"tokenizer.json cannot be read: {str(error)[:300]}") from None
    found.no_padding()
    found.no_truncation()
    found.encode_special_tokens = True
    return found


def _kernel_class(model: KnownModel, digest: str) -> str:
    parts = (
        f"encoder{ENGINE_VERSION}",
        torch.__version__,
        model.sha256[:16],
        "float32",
        "cpu",
        torch.backends.cpu.get_cpu_capability(),
        f"threads{torch.get_num_threads()}",
        digest,
    )
    return "/".join(parts)


def encoder_of(name: str) -> Encoder:
    """This process's encoder of that model, loaded once.

    Raises:
        AivillageError: as `Encoder`, or there is no such model.
    """
    model = catalogue.known(name)
    return _loaded(model, int(os.environ.get("OMP_NUM_THREADS", "1")))


@functools.lru_cache(maxsize=MODELS_LOADED_MAX)
def _loaded(model: KnownModel, threads: int) -> Encoder:
    return Encoder(model, threads)
